//! Files that come with the repository.

use std::path::{Path, PathBuf};

/// A file of the folder `data`: beside the current folder, or where the program was built.
pub fn shipped(name: &str) -> PathBuf {
    let here = Path::new("data").join(name);
    if here.exists() {
        here
    } else {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../data")
            .join(name)
    }
}
