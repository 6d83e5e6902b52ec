//! Novels as classes: texts of which a model shall say which is which.

use emberlm::text::{Corpus, Document};
use thiserror::Error;

/// A novel as tokens, which are bytes. Its last tenth is held out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Novel {
    /// What it is called.
    pub name: String,
    /// What is trained on.
    pub training: Vec<u8>,
    /// What is held out.
    pub held_out: Vec<u8>,
}

/// There are not enough novels.
#[derive(Debug, Error)]
#[error(
    "the text is a single novel: give --text once for each, or one file with the titles of the six of Jane Austen"
)]
pub struct SingleNovel;

/// The lines at which the novels of `data/austen.txt` begin.
const TITLES: [&str; 6] = [
    "EMMA",
    "MANSFIELD PARK",
    "NORTHANGER ABBEY",
    "Persuasion",
    "PRIDE AND PREJUDICE",
    "SENSE AND SENSIBILITY",
];

/// The novels of a corpus: its documents; or, where it has one, what begins at a line with one of Jane Austen's titles.
///
/// # Errors
///
/// [`SingleNovel`].
pub fn novels(corpus: &Corpus) -> Result<Vec<Novel>, SingleNovel> {
    let novels: Vec<Novel> = match corpus.documents() {
        [document] => by_titles(document.as_bytes()),
        documents => documents.iter().map(whole).collect(),
    };
    match novels.len() {
        0 | 1 => Err(SingleNovel),
        _ => Ok(novels),
    }
}

fn whole(document: &Document) -> Novel {
    let name = document.path().file_stem().unwrap_or_default();
    Novel::new(&name.to_string_lossy(), document.as_bytes())
}

/// What stands before the first title belongs to no novel.
fn by_titles(text: &[u8]) -> Vec<Novel> {
    let mut starts = Vec::new();
    let mut at = 0;
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let title = TITLES
            .iter()
            .find(|title| title.as_bytes() == line.trim_ascii_end());
        starts.extend(title.map(|title| (at, *title)));
        at += line.len();
    }
    let ends = starts.iter().skip(1).map(|(start, _)| *start);
    let ends: Vec<usize> = ends.chain([text.len()]).collect();
    let novels = starts.iter().zip(ends);
    novels
        .map(|((start, title), end)| Novel::new(title, &text[*start..end]))
        .collect()
}

impl Novel {
    fn new(name: &str, text: &[u8]) -> Self {
        let (training, held_out) = text.split_at(text.len() - text.len() / 10);
        Self {
            name: name.to_owned(),
            training: training.to_vec(),
            held_out: held_out.to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_novels_that_come_with_the_repository_are_six() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/austen.txt");
        let corpus = Corpus::open(&[path]).unwrap();
        let novels = novels(&corpus).unwrap();
        let names: Vec<&str> = novels.iter().map(|novel| &novel.name[..]).collect();
        assert_eq!(names, TITLES);
        // Nothing stands before the first title, and nothing is lost.
        let length = |novel: &Novel| novel.training.len() + novel.held_out.len();
        let total: usize = novels.iter().map(length).sum();
        assert_eq!(total, corpus.documents()[0].bytes());
        for (novel, hero) in novels.iter().zip([
            "Knightley",
            "Crawford",
            "Tilney",
            "Wentworth",
            "Darcy",
            "Dashwood",
        ]) {
            let count = |name: &str| {
                let text = String::from_utf8_lossy(&novel.training);
                text.matches(name).count()
            };
            assert!(count(hero) > 100, "{hero} in {}", novel.name);
            assert_eq!(novel.held_out.len(), length(novel) / 10);
        }
    }

    #[test]
    fn documents_are_novels() {
        let folder = tempfile::tempdir().unwrap();
        let paths = ["one.txt", "two.txt"].map(|name| folder.path().join(name));
        std::fs::write(&paths[0], "EMMA\n3456789\nEMMA\n89012").unwrap();
        std::fs::write(&paths[1], "0123456789").unwrap();
        let novels = novels(&Corpus::open(&paths).unwrap()).unwrap();
        // Titles mean nothing here, and the last tenth is rounded down.
        let expected = [
            ("one", "EMMA\n3456789\nEMMA\n890", "12"),
            ("two", "012345678", "9"),
        ];
        let expected = expected.map(|(name, training, held_out)| Novel {
            name: name.to_owned(),
            training: training.into(),
            held_out: held_out.into(),
        });
        assert_eq!(novels, expected);
    }

    #[test]
    fn a_single_novel_is_none_to_tell_from_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("one.txt");
        std::fs::write(&path, "an EMMA\nEMMA \nby nobody").unwrap();
        let error = novels(&Corpus::open(&[path]).unwrap()).unwrap_err();
        assert!(error.to_string().contains("a single novel"), "{error}");
    }
}
