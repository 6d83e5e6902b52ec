//! One file as bytes in memory: mapped if it is large, read if it is small.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use memmap2::Mmap;

use crate::TextError;

/// Below this many bytes a file is read, not mapped. A mapping takes whole pages and one of the
/// 65,530 that Linux grants a process, so a folder of many small files would run out of them.
const MAPPED_FROM: u64 = 64 * 1024;

/// The content of a UTF-8 file, without a copy of it in the heap if the file is large.
///
/// **The file must not change while this value lives.** Of a mapped file, bytes that another
/// process writes appear here, so that what was checked as UTF-8 may no longer be; and if another
/// process truncates it, reading a page that is gone raises `SIGBUS`, which ends this process. No
/// library can turn that into an error. To replace a text during a run, write a new file and
/// rename it over the old one: the mapping keeps the old content.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("ember.txt");
/// use emberlm_text::MappedText;
///
/// std::fs::write(&path, "a glowing coal")?;
/// assert_eq!(MappedText::open(&path)?.as_bytes(), b"a glowing coal");
/// # Ok(())
/// # }
/// ```
pub struct MappedText {
    content: MappedBytes,
}

impl MappedText {
    /// Opens a file and checks that all of it is UTF-8. An empty file gives no bytes.
    ///
    /// # Errors
    /// [`TextError::Missing`], [`TextError::Unreadable`] and [`TextError::InvalidUtf8`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, TextError> {
        let path = path.as_ref();
        let content = MappedBytes::open(path).map_err(|cause| TextError::from_io(path, cause))?;
        let text = Self { content };
        match std::str::from_utf8(text.as_bytes()) {
            Ok(_) => Ok(text),
            Err(error) => Err(TextError::InvalidUtf8 {
                path: path.to_owned(),
                byte: error.valid_up_to(),
            }),
        }
    }

    /// The content. Bytes, not `str`: a mapped file that someone writes to is UTF-8 no longer.
    pub fn as_bytes(&self) -> &[u8] {
        self.content.as_slice()
    }
}

impl fmt::Debug for MappedText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mapped = matches!(self.content, MappedBytes::Mapped(_));
        f.debug_struct("MappedText")
            .field("bytes", &self.as_bytes().len())
            .field("mapped", &mapped)
            .finish()
    }
}

/// The content of any file. What [`MappedText`] asks of the file, this asks too.
pub(crate) enum MappedBytes {
    Mapped(Mmap),
    Read(Vec<u8>),
}

impl MappedBytes {
    /// Small files, which are read, include the empty one, which some systems refuse to map.
    pub(crate) fn open(path: &Path) -> std::io::Result<Self> {
        let mut file = File::open(path)?;
        if file.metadata()?.len() < MAPPED_FROM {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            return Ok(Self::Read(bytes));
        }
        map(&file).map(Self::Mapped)
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Read(bytes) => bytes,
        }
    }
}

#[expect(
    unsafe_code,
    reason = "a mapped file that someone else truncates raises SIGBUS, one that someone else \
              writes changes under a shared reference; MappedText documents both"
)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the mapping is private to this file's type and read-only. That nobody changes the
    // file meanwhile is asked of the caller; should it happen, the bytes are only ever read as
    // `u8`, for which every value is valid, and never as the `str` they were checked to be.
    unsafe { Mmap::map(file) }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::ErrorKind;

    use super::*;

    fn open(content: &[u8]) -> Result<MappedText, TextError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text");
        fs::write(&path, content).unwrap();
        MappedText::open(path)
    }

    #[test]
    fn small_files_are_read_and_large_ones_mapped() {
        for (length, mapped) in [
            (0, false),
            (1, false),
            (65_535, false),
            (65_536, true),
            (200_001, true),
        ] {
            let content: Vec<u8> = (0..length).map(|at| b'a' + (at % 23) as u8).collect();
            let text = open(&content).unwrap();
            assert_eq!(text.as_bytes(), content);
            assert_eq!(
                format!("{text:?}"),
                format!("MappedText {{ bytes: {length}, mapped: {mapped} }}")
            );
        }
    }

    #[test]
    fn a_mapping_outlives_a_renamed_and_deleted_file() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        fs::write(&old, vec![b'o'; 100_000]).unwrap();
        fs::write(&new, "n").unwrap();
        let text = MappedText::open(&old).unwrap();
        fs::rename(&new, &old).unwrap();
        assert_eq!(text.as_bytes(), vec![b'o'; 100_000]);
    }

    #[test]
    fn invalid_bytes_are_named_with_file_and_offset() {
        let mut large = vec![b'a'; 100_000];
        large[70_000] = 0xFF;
        let cut = "ember \u{1F525}".as_bytes();
        for (content, offset) in [
            (&b"caf\xE9 noir"[..], 3),
            (&large[..], 70_000),
            (&cut[..cut.len() - 1], 6), // a character that the end of the file cuts
        ] {
            match open(content) {
                Err(TextError::InvalidUtf8 { path, byte }) => {
                    assert!(path.ends_with("text"), "{path:?}");
                    assert_eq!(byte, offset);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn missing_and_unreadable_paths_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let nowhere = folder.path().join("nowhere");
        match MappedText::open(&nowhere) {
            Err(TextError::Missing { path }) => assert_eq!(path, nowhere),
            other => panic!("{other:?}"),
        }
        match MappedText::open(folder.path()) {
            Err(TextError::Unreadable { path, cause }) => {
                assert_eq!(path, folder.path());
                assert_ne!(cause.kind(), ErrorKind::NotFound);
            }
            other => panic!("{other:?}"),
        }
    }
}
