//! Functions that run on vectors.

/// Defines a function whose body runs with the machine's vectors: `simd` proves that the instructions exist, and `S` is
/// their type.
///
/// ```
/// use emberlm_kernels::{Real, kernel, lanes};
///
/// kernel! {
///     /// Doubles every element.
///     fn double<'a, R: Real>(simd: S, x: &'a mut [R]) -> () {
///         for chunk in x.chunks_exact_mut(lanes::<R, S>()) {
///             // Safety: a chunk has as many elements as a vector.
///             unsafe {
///                 let vector = R::load(simd, chunk.as_ptr());
///                 R::store(simd, chunk.as_mut_ptr(), R::vadd(simd, vector, vector));
///             }
///         }
///     }
/// }
///
/// let mut x = [1.0_f32; 64];
/// double(&mut x);
/// assert_eq!(x, [2.0; 64]);
/// ```
#[macro_export]
macro_rules! kernel {
    (
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident<$($lifetime:lifetime,)* $($generic:ident: $bound:path),+>(
            $simd:ident: $vectors:ident, $($argument:ident: $type:ty),* $(,)?
        ) -> $output:ty $body:block
    ) => {
        $(#[$attribute])*
        $visibility fn $name<$($lifetime,)* $($generic: $bound),+>($($argument: $type),*) -> $output {
            struct Kernel<$($lifetime,)* $($generic: $bound),+> {
                $($argument: $type),*
            }
            impl<$($lifetime,)* $($generic: $bound),+> $crate::pulp::WithSimd
                for Kernel<$($lifetime,)* $($generic),+>
            {
                type Output = $output;

                #[inline(always)]
                fn with_simd<$vectors: $crate::pulp::Simd>(self, $simd: $vectors) -> $output {
                    let Self { $($argument),* } = self;
                    $body
                }
            }
            $crate::pulp::Arch::new().dispatch(Kernel { $($argument),* })
        }
    };
}
