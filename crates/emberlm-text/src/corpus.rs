//! A corpus: documents from files and folders, and the two streams of bytes they are read as.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{MappedText, TextError};

/// The extensions, in any case, of the files of a folder that are documents.
const EXTENSIONS: [&str; 2] = ["txt", "md"];

/// Documents in a fixed order, each with its last tenth held out for validation.
///
/// A document is a file. Holding out a part of each, and not some documents, makes the held-out
/// text like the training text whatever the files are, and works for a single file. The tenth is
/// counted in bytes, rounded down, and begins at the next character, so that none is cut; of a
/// document under 10 bytes nothing is held out.
///
/// The content of each file must not change while the corpus lives: see [`MappedText`].
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let folder = folder.path();
/// use emberlm_text::Corpus;
///
/// std::fs::write(folder.join("a.txt"), "coal, ash, ember, fire")?;
/// std::fs::write(folder.join("b.md"), "# Wood\nIt burns.\n")?;
/// std::fs::write(folder.join("c.png"), [0xFF])?;
///
/// let corpus = Corpus::open(&[folder.to_owned()])?;
/// assert_eq!(corpus.documents().len(), 2);
/// assert_eq!(corpus.skipped(), 1);
/// assert_eq!(corpus.training().len(), 20 + 16);
/// assert_eq!(corpus.held_out().len(), 2 + 1);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Corpus {
    documents: Arc<[Document]>,
    skipped: usize,
}

impl Corpus {
    /// Opens files and folders, in the order given, and reads each document once to check it.
    ///
    /// A file that is named is a document whatever it is called. Of a folder and all folders in it,
    /// the files `*.txt` and `*.md` are documents, sorted by their whole path, name by name (so
    /// `a/z.txt` comes before `a.txt`, on every system). A file named twice is two documents.
    /// Symbolic links are followed, but a folder that several paths lead to is read once, by the
    /// path without links if there is one; so a link to a folder above it is harmless.
    ///
    /// # Errors
    /// Every [`TextError`] but those of windows: no sources; a source that is missing, an empty
    /// file, a folder without text, or neither file nor folder; anything that cannot be read; a
    /// document that is not UTF-8.
    pub fn open(sources: &[PathBuf]) -> Result<Self, TextError> {
        if sources.is_empty() {
            return Err(TextError::NoSources);
        }
        let mut documents = Vec::new();
        let mut skipped = 0;
        for source in sources {
            let kind = fs::metadata(source).map_err(|cause| TextError::from_io(source, cause))?;
            if kind.is_dir() {
                skipped += open_folder(source, &mut documents)?;
            } else if kind.is_file() {
                let document = Document::open(source.clone())?;
                let path = source.clone();
                documents.push(document.ok_or(TextError::EmptyFile { path })?);
            } else {
                return Err(TextError::NotAFile {
                    path: source.clone(),
                });
            }
        }
        Ok(Self {
            documents: documents.into(),
            skipped,
        })
    }

    /// The documents, in the order of the streams.
    pub fn documents(&self) -> &[Document] {
        &self.documents
    }

    /// How many files of the folders are not documents: of another extension, empty, neither file
    /// nor folder, or links to nothing.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// CRC-32 (IEEE) of what the documents contain and where each of them ends, whatever their paths.
    pub fn crc32(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        for document in &self.documents[..] {
            hasher.update(&(document.bytes() as u64).to_le_bytes());
            hasher.update(&document.crc32.to_le_bytes());
        }
        hasher.finalize()
    }

    /// What every document was when it was opened, in order: equal lists mean an equal corpus.
    pub fn fingerprints(&self) -> Vec<Fingerprint> {
        self.documents.iter().map(Document::fingerprint).collect()
    }

    /// The training parts of all documents.
    pub fn training(&self) -> TextStream {
        TextStream::new(self.documents.clone(), TextPart::Training)
    }

    /// The held-out parts of all documents.
    pub fn held_out(&self) -> TextStream {
        TextStream::new(self.documents.clone(), TextPart::HeldOut)
    }
}

/// One file of a [`Corpus`].
#[derive(Debug)]
pub struct Document {
    path: PathBuf,
    text: MappedText,
    crc32: u32,
    split: usize,
}

impl Document {
    /// The path: as it was given, or the folder's as it was given and the way from there.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the whole document, in bytes: never 0.
    pub fn bytes(&self) -> usize {
        self.as_bytes().len()
    }

    /// The whole document, both parts.
    pub fn as_bytes(&self) -> &[u8] {
        self.text.as_bytes()
    }

    /// CRC-32 (IEEE) of the whole document when it was opened.
    pub fn crc32(&self) -> u32 {
        self.crc32
    }

    /// The document's entry of [`Corpus::fingerprints`].
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint {
            path: self.path.to_string_lossy().into_owned().into(),
            bytes: self.bytes() as u64,
            crc32: self.crc32,
        }
    }

    /// `None` if the file is empty.
    fn open(path: PathBuf) -> Result<Option<Self>, TextError> {
        let text = MappedText::open(&path)?;
        let bytes = text.as_bytes();
        if bytes.is_empty() {
            return Ok(None);
        }
        let crc32 = crc32fast::hash(bytes);
        let split = split(bytes);
        Ok(Some(Self {
            path,
            text,
            crc32,
            split,
        }))
    }

    /// The bytes of a part.
    pub(crate) fn part(&self, part: TextPart) -> &[u8] {
        let (training, held_out) = self.text.as_bytes().split_at(self.split);
        match part {
            TextPart::Training => training,
            TextPart::HeldOut => held_out,
        }
    }
}

/// What a document was: saved with a run, it tells the resumed run whether its text is the same.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("ember.txt");
/// use emberlm_text::Corpus;
///
/// std::fs::write(&path, "a glowing coal")?;
/// let before = Corpus::open(&[path.clone()])?.fingerprints();
/// assert_eq!(before, Corpus::open(&[path.clone()])?.fingerprints());
///
/// std::fs::write(&path, "a glowing cool")?;
/// assert_ne!(before, Corpus::open(&[path.clone()])?.fingerprints());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// The path, with U+FFFD for what in it is not Unicode and so could not be saved as JSON.
    pub path: PathBuf,
    /// Size, in bytes.
    pub bytes: u64,
    /// CRC-32 (IEEE) of the content. It notices accidents, not forgeries.
    pub crc32: u32,
}

/// Which part of every document a [`TextStream`] reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextPart {
    /// What comes before the held-out part.
    Training,
    /// The last tenth.
    HeldOut,
}

impl fmt::Display for TextPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Training => "training",
            Self::HeldOut => "held-out",
        })
    }
}

/// One part of all documents, one after the other without a separator, as if it were one text.
///
/// It shares the documents' memory, and a clone shares it too: both are cheap. A corpus of `n`
/// documents takes `n` integers.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let folder = folder.path();
/// use emberlm_text::Corpus;
///
/// std::fs::write(folder.join("a.txt"), "coal")?;
/// std::fs::write(folder.join("b.txt"), "fire")?;
/// let training = Corpus::open(&[folder.to_owned()])?.training();
///
/// let mut bytes = [0; 4];
/// training.copy(2, &mut bytes);
/// assert_eq!(&bytes, b"alfi");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct TextStream {
    documents: Arc<[Document]>,
    part: TextPart,
    /// For each document, where its part ends in the stream. All documents are in the address
    /// space at once, so their sum fits a `usize`.
    ends: Arc<[usize]>,
}

impl TextStream {
    fn new(documents: Arc<[Document]>, part: TextPart) -> Self {
        let lengths = documents.iter().map(|document| document.part(part).len());
        let ends = lengths.scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        Self {
            ends: ends.collect(),
            documents,
            part,
        }
    }

    /// Size, in bytes.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether there are no bytes, as in the held-out part of documents under 10 bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Which part of the documents this is.
    pub fn part(&self) -> TextPart {
        self.part
    }

    /// Fills `buffer` with the bytes from `start` on, across the borders of documents.
    ///
    /// # Panics
    /// If the stream ends before the buffer is full.
    pub fn copy(&self, start: usize, buffer: &mut [u8]) {
        let length = self.len();
        assert!(
            start <= length && buffer.len() <= length - start,
            "{} bytes from {start} on are not in a stream of {length}",
            buffer.len()
        );
        let first = self.ends.partition_point(|&end| end <= start);
        let mut skip = match first {
            0 => start,
            _ => start - self.ends[first - 1],
        };
        let mut rest = buffer;
        for document in &self.documents[first..] {
            if rest.is_empty() {
                return;
            }
            let source = &document.part(self.part)[skip..];
            let (now, later) = rest.split_at_mut(source.len().min(rest.len()));
            now.copy_from_slice(&source[..now.len()]);
            (rest, skip) = (later, 0);
        }
    }

    /// The bytes of a range, copied: [`copy`](Self::copy) into a new buffer.
    ///
    /// # Panics
    /// If the stream ends before the range does, or the range before it starts.
    pub fn bytes(&self, range: Range<usize>) -> Vec<u8> {
        let mut bytes = vec![0; range.end - range.start];
        self.copy(range.start, &mut bytes);
        bytes
    }

    /// For each document, where its part ends in the stream.
    pub(crate) fn ends(&self) -> &[usize] {
        &self.ends
    }

    /// The documents, in order.
    pub(crate) fn documents(&self) -> &[Document] {
        &self.documents
    }
}

/// Where the held-out part of a document begins.
fn split(text: &[u8]) -> usize {
    let tenth = text.len() - text.len() / 10;
    // In UTF-8 every byte of a character but its first is 0b10xx_xxxx.
    let cut = text[tenth..]
        .iter()
        .take_while(|&&byte| byte & 0xC0 == 0x80);
    tenth + cut.count()
}

/// Appends the documents of a folder and returns how many of its files are none.
fn open_folder(folder: &Path, documents: &mut Vec<Document>) -> Result<usize, TextError> {
    let (mut files, mut skipped) = list(folder)?;
    files.sort_unstable();
    let before = documents.len();
    for file in files {
        match Document::open(file)? {
            Some(document) => documents.push(document),
            None => skipped += 1,
        }
    }
    if documents.len() == before {
        let path = folder.to_owned();
        return Err(TextError::FolderWithoutText { path, skipped });
    }
    Ok(skipped)
}

/// The text files in a folder and the folders in it, in any order, and the number of other files.
fn list(root: &Path) -> Result<(Vec<PathBuf>, usize), TextError> {
    let mut files = Vec::new();
    let mut skipped = 0;
    let mut seen = HashSet::new();
    // Links wait until no other folder does, and then go by name: so which of several paths to a
    // folder is taken does not depend on the order in which the system lists them.
    let mut folders = vec![root.to_owned()];
    let mut linked = BTreeSet::new();
    while let Some(folder) = folders.pop().or_else(|| linked.pop_first()) {
        let unreadable = |cause| TextError::from_io(&folder, cause);
        if !seen.insert(fs::canonicalize(&folder).map_err(unreadable)?) {
            continue;
        }
        for entry in fs::read_dir(&folder).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let path = entry.path();
            let unreadable = |cause| TextError::from_io(&path, cause);
            let own = entry.file_type().map_err(unreadable)?;
            let kind = match fs::metadata(&path) {
                Ok(target) => target.file_type(),
                // A link to nothing: editors leave such links beside the files they have open.
                Err(cause) if own.is_symlink() && cause.kind() == ErrorKind::NotFound => own,
                Err(cause) => return Err(unreadable(cause)),
            };
            if kind.is_dir() && own.is_symlink() {
                linked.insert(path);
            } else if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() && is_text(&path) {
                files.push(path);
            } else {
                skipped += 1;
            }
        }
    }
    Ok((files, skipped))
}

fn is_text(path: &Path) -> bool {
    path.extension()
        .is_some_and(|own| EXTENSIONS.iter().any(|text| own.eq_ignore_ascii_case(text)))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    /// A folder with the given files, whose names may contain folders.
    fn folder(files: &[(&str, &[u8])]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        folder
    }

    fn open(folder: &TempDir) -> Result<Corpus, TextError> {
        Corpus::open(&[folder.path().to_owned()])
    }

    fn names(corpus: &Corpus, folder: &TempDir) -> Vec<String> {
        let inside = |document: &Document| {
            let path = document.path().strip_prefix(folder.path()).unwrap();
            path.to_str().unwrap().replace('\\', "/")
        };
        corpus.documents().iter().map(inside).collect()
    }

    fn all(stream: &TextStream) -> Vec<u8> {
        stream.bytes(0..stream.len())
    }

    #[test]
    fn a_folder_gives_its_text_files_sorted_by_whole_path() {
        let folder = folder(&[
            ("b.txt", b"1"),
            ("a.md", b"2"),
            ("a/z.TXT", b"3"),
            ("a/b/c.Md", b"4"),
            ("a/notes.text", b"5"),
            ("a/txt", b"6"),
            ("a/.txt", b"7"),
            ("a/empty.txt", b""),
            ("c/model.bin", b"\xFF\xFE"),
        ]);
        let corpus = open(&folder).unwrap();
        assert_eq!(
            names(&corpus, &folder),
            ["a/b/c.Md", "a/z.TXT", "a.md", "b.txt"]
        );
        assert_eq!(corpus.skipped(), 5);
        assert_eq!(all(&corpus.training()), b"4321");
    }

    #[test]
    fn sources_keep_their_order_and_named_files_any_extension() {
        let folder = folder(&[
            ("z/a.txt", b"z "),
            ("z/x.rs", b"no"),
            ("y/a.txt", b"y "),
            ("y/x.rs", b"no"),
            ("y/y.rs", b"no"),
            ("b.rs", b"b "),
        ]);
        let paths = ["b.rs", "z", "y", "b.rs"].map(|name| folder.path().join(name));
        let corpus = Corpus::open(&paths).unwrap();
        assert_eq!(
            names(&corpus, &folder),
            ["b.rs", "z/a.txt", "y/a.txt", "b.rs"]
        );
        assert_eq!(corpus.skipped(), 3);
        assert_eq!(all(&corpus.training()), b"b z y b ");
    }

    #[test]
    fn the_last_tenth_is_held_out_from_the_next_character_on() {
        // Bytes in all, at the start of the held-out part: `e` is one byte, the flame four.
        for (text, training) in [
            ("e".repeat(9), 9),
            ("e".repeat(10), 9),
            ("e".repeat(1009), 909),
            ("\u{1F525}".repeat(10), 36), // 40 bytes: the tenth begins with a character
            ("\u{1F525}".repeat(12), 44), // 48 bytes: the tenth begins at 44
            ("\u{1F525}".repeat(15), 56), // 60 bytes: at 54, within a character
            ("e".to_owned() + &"\u{1F525}".repeat(5), 21), // 21 bytes: at 19, within the last one
        ] {
            let folder = folder(&[("a.txt", text.as_bytes())]);
            let corpus = open(&folder).unwrap();
            assert_eq!(corpus.training().len(), training, "{text}");
            assert_eq!(corpus.held_out().len(), text.len() - training, "{text}");
            assert_eq!(all(&corpus.held_out()), &text.as_bytes()[training..]);
        }
    }

    #[test]
    fn documents_are_known_by_path_length_and_checksum() {
        // The check value of CRC-32: that of the nine digits.
        let folder = folder(&[("a.txt", b"123456789")]);
        let corpus = open(&folder).unwrap();
        let expected = Fingerprint {
            path: folder.path().join("a.txt"),
            bytes: 9,
            crc32: 0xCBF4_3926,
        };
        let [document] = corpus.documents() else {
            panic!("{corpus:?}");
        };
        assert_eq!(document.path(), expected.path);
        assert_eq!(document.bytes(), 9);
        assert_eq!(document.crc32(), expected.crc32);
        let json = serde_json::to_string(&corpus.fingerprints()).unwrap();
        let saved: Vec<Fingerprint> = serde_json::from_str(&json).unwrap();
        assert_eq!(saved, [expected]);

        // As long as before, and another text.
        fs::write(folder.path().join("a.txt"), b"123456798").unwrap();
        assert_ne!(open(&folder).unwrap().fingerprints(), saved);
    }

    #[test]
    fn bad_sources_are_errors_with_their_path() {
        let folder = folder(&[
            ("good.txt", b"good"),
            ("empty", b""),
            ("none/a.rs", b"a"),
            ("none/b.txt", b""),
            ("bad/latin.md", b"caf\xE9"),
        ]);
        let open = |name: &str| {
            Corpus::open(&[folder.path().join("good.txt"), folder.path().join(name)]).unwrap_err()
        };
        assert!(matches!(Corpus::open(&[]), Err(TextError::NoSources)));
        match open("nowhere") {
            TextError::Missing { path } => assert_eq!(path, folder.path().join("nowhere")),
            other => panic!("{other:?}"),
        }
        match open("empty") {
            TextError::EmptyFile { path } => assert_eq!(path, folder.path().join("empty")),
            other => panic!("{other:?}"),
        }
        match open("none") {
            TextError::FolderWithoutText { path, skipped } => {
                assert_eq!((path, skipped), (folder.path().join("none"), 2));
            }
            other => panic!("{other:?}"),
        }
        match open("bad") {
            TextError::InvalidUtf8 { path, byte } => {
                assert_eq!((path, byte), (folder.path().join("bad/latin.md"), 3));
            }
            other => panic!("{other:?}"),
        }
    }

    #[cfg(unix)]
    mod links {
        use std::os::unix::fs::symlink;
        use std::os::unix::net::UnixListener;

        use super::*;

        #[test]
        fn loops_end_and_every_folder_is_read_once_by_its_own_path() {
            let folder = folder(&[
                ("a/in.txt", b"a"),
                ("z/in.txt", b"z"),
                ("z/deep/in.txt", b"d"),
            ]);
            let path = folder.path();
            symlink(path, path.join("a/root")).unwrap();
            symlink("../z", path.join("a/other")).unwrap();
            symlink("../a", path.join("z/other")).unwrap();
            symlink(".", path.join("z/deep/self")).unwrap();
            let corpus = open(&folder).unwrap();
            assert_eq!(
                names(&corpus, &folder),
                ["a/in.txt", "z/deep/in.txt", "z/in.txt"]
            );
            assert_eq!(corpus.skipped(), 0);
        }

        #[test]
        fn links_are_followed_by_the_first_name() {
            let elsewhere = folder(&[("far/b.txt", b"b"), ("c.txt", b"c")]);
            let folder = folder(&[("a.txt", b"a")]);
            for name in ["l3", "l1", "l2"] {
                symlink(elsewhere.path().join("far"), folder.path().join(name)).unwrap();
            }
            symlink(elsewhere.path().join("c.txt"), folder.path().join("c.txt")).unwrap();
            let corpus = open(&folder).unwrap();
            assert_eq!(names(&corpus, &folder), ["a.txt", "c.txt", "l1/b.txt"]);
        }

        #[test]
        fn links_to_nothing_and_sockets_are_skipped_in_folders() {
            let folder = folder(&[("a.txt", b"a")]);
            symlink("nowhere", folder.path().join(".#a.txt")).unwrap();
            let socket = folder.path().join("socket.txt");
            let _listener = UnixListener::bind(&socket).unwrap();
            let corpus = open(&folder).unwrap();
            assert_eq!(names(&corpus, &folder), ["a.txt"]);
            assert_eq!(corpus.skipped(), 2);

            match Corpus::open(std::slice::from_ref(&socket)) {
                Err(TextError::NotAFile { path }) => assert_eq!(path, socket),
                other => panic!("{other:?}"),
            }
        }

        #[test]
        fn a_link_that_only_leads_to_itself_is_an_error() {
            let folder = folder(&[("a.txt", b"a")]);
            let link = folder.path().join("self.txt");
            symlink("self.txt", &link).unwrap();
            match open(&folder) {
                Err(TextError::Unreadable { path, .. }) => assert_eq!(path, link),
                other => panic!("{other:?}"),
            }
        }

        // Only Linux has file names of any bytes; Apple's file systems refuse them.
        #[cfg(target_os = "linux")]
        #[test]
        fn fingerprints_of_names_that_are_not_unicode_can_be_saved() {
            use std::ffi::OsStr;
            use std::os::unix::ffi::OsStrExt;

            let folder = folder(&[]);
            let path = folder.path().join(OsStr::from_bytes(b"caf\xE9.txt"));
            fs::write(&path, "noir").unwrap();
            let corpus = open(&folder).unwrap();
            assert_eq!(corpus.documents()[0].path(), path);
            let saved = serde_json::to_string(&corpus.fingerprints()).unwrap();
            assert!(saved.contains("caf\u{FFFD}.txt"), "{saved}");
        }
    }

    #[test]
    #[should_panic(expected = "2 bytes from 9 on are not in a stream of 10")]
    fn reading_over_the_end_panics() {
        let folder = folder(&[("a.txt", b"0123456789a")]);
        open(&folder).unwrap().training().copy(9, &mut [0; 2]);
    }

    #[test]
    #[should_panic(expected = "are not in a stream of 10")]
    fn reading_from_the_largest_offset_panics() {
        let folder = folder(&[("a.txt", b"0123456789a")]);
        open(&folder)
            .unwrap()
            .training()
            .copy(usize::MAX, &mut [0; 2]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Against the obvious: split every text, join the parts.
        #[test]
        fn streams_are_the_joined_parts(
            texts in vec("\\PC{1,60}", 1..6),
            cuts in vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 8),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let (mut training, mut held_out) = (String::new(), String::new());
            for (at, text) in texts.iter().enumerate() {
                fs::write(folder.path().join(format!("{at}.txt")), text).unwrap();
                let mut split = text.len() - text.len() / 10;
                while !text.is_char_boundary(split) {
                    split += 1;
                }
                training += &text[..split];
                held_out += &text[split..];
            }
            let corpus = open(&folder).unwrap();
            for (stream, expected) in [(corpus.training(), training), (corpus.held_out(), held_out)] {
                let expected = expected.as_bytes();
                prop_assert_eq!(stream.len(), expected.len());
                prop_assert_eq!(stream.is_empty(), expected.is_empty());
                prop_assert_eq!(&all(&stream), expected);
                for (one, other) in &cuts {
                    let (one, other) = (one.index(stream.len() + 1), other.index(stream.len() + 1));
                    let range = one.min(other)..one.max(other);
                    prop_assert_eq!(&stream.bytes(range.clone()), &expected[range]);
                }
            }
        }
    }
}
