//! Token files: the tokens of each document as a whole, caches, damage.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use emberlm_text::{
    CacheState, Corpus, Damage, TextError, TextPart, TokenFile, TokenStream, TokenUnit, Tokenizer,
};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/byte_level")
        .join(name)
}

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::load(fixture(name)).unwrap()
}

/// A corpus of the given texts, and a folder for its tokens.
struct Place {
    folder: TempDir,
    corpus: Corpus,
}

impl Place {
    fn new(texts: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for (at, text) in texts.iter().enumerate() {
            let path = folder.path().join(format!("{at}.txt"));
            fs::write(&path, text).unwrap();
            paths.push(path);
        }
        let corpus = Corpus::open(&paths).unwrap();
        Self { folder, corpus }
    }

    fn cached(&self, tokenizer: &Tokenizer) -> (Arc<TokenFile>, CacheState) {
        let cache = self.folder.path().join("cache/tokens");
        TokenFile::cached(&self.corpus, tokenizer, &cache, |_| ()).unwrap()
    }
}

fn all(stream: &TokenStream) -> Vec<u32> {
    stream.tokens(0..stream.len())
}

/// The tokens of each document's part as a whole, and the document of each.
fn expected(texts: &[&str], tokenizer: &Tokenizer, part: TextPart) -> (Vec<u32>, Vec<u32>) {
    let (mut tokens, mut documents) = (Vec::new(), Vec::new());
    for (document, text) in texts.iter().enumerate() {
        let mut split = text.len() - text.len() / 10;
        while !text.is_char_boundary(split) {
            split += 1;
        }
        let text = match part {
            TextPart::Training => &text[..split],
            TextPart::HeldOut => &text[split..],
        };
        tokens.extend(tokenizer.encode(text));
        documents.resize(tokens.len(), document as u32);
    }
    (tokens, documents)
}

/// Texts of which some are read in several parts, and some have nothing held out.
fn texts() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/austen.txt");
    let austen = fs::read_to_string(path).unwrap();
    let code =
        "def f(a):\n\n\treturn  {a: 1}  # éß日本語。\n\u{3000}\u{85} <s>x</s> <mask>  \n\n\n ";
    vec![
        austen[..austen.floor_char_boundary(600_000)].to_owned(),
        "ember".to_owned(),
        code.repeat(3000),
        "日本語のテキスト。\n".repeat(9000),
        "a".repeat(200_000),
        " \n".repeat(100_000),
    ]
}

#[test]
fn tokens_are_those_of_each_document_as_a_whole() {
    let texts = texts();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let place = Place::new(&texts);
    for name in ["gpt2.json", "llama3.json"] {
        let tokenizer = tokenizer(name);
        let (file, state) = place.cached(&tokenizer);
        assert_eq!(state, CacheState::Built);
        for stream in [file.training(), file.held_out()] {
            let (tokens, documents) = expected(&texts, &tokenizer, stream.part());
            assert!(
                all(&stream) == tokens,
                "{name}: the {} tokens differ",
                stream.part()
            );
            assert!(stream.documents(0..stream.len()) == documents);
            assert_eq!(stream.vocab_size(), 400);
            assert_eq!(stream.unit(), TokenUnit::Token);
            let text = match stream.part() {
                TextPart::Training => place.corpus.training(),
                TextPart::HeldOut => place.corpus.held_out(),
            };
            assert_eq!(stream.text_bytes(), text.len() as u64);
            assert_eq!(
                stream.bytes_per_token(),
                text.len() as f64 / tokens.len() as f64
            );
            assert_eq!(tokenizer.decode_bytes(&tokens), text.bytes(0..text.len()));
        }
    }
}

#[test]
fn tokens_of_bytes_are_the_bytes() {
    let place = Place::new(&["ember, ash and coal", "é".repeat(70_000).as_str()]);
    let (file, _) = place.cached(&Tokenizer::bytes());
    let of_text = TokenStream::from(place.corpus.training());
    assert!(all(&file.training()) == all(&of_text));
    let range = 10..of_text.len();
    assert!(file.training().documents(range.clone()) == of_text.documents(range));
    assert_eq!(file.training().bytes_per_token(), 1.0);
}

#[test]
fn large_vocabularies_take_four_bytes() {
    let mut json: serde_json::Value =
        serde_json::from_slice(&fs::read(fixture("gpt2.json")).unwrap()).unwrap();
    json["model"]["vocab"]["<far>"] = 70_000.into();
    let far = serde_json::json!({
        "id": 70_000, "content": "<far>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true
    });
    json["added_tokens"].as_array_mut().unwrap().push(far);
    let texts = ["an ember <far> in<far> the ash of the fire"];
    let place = Place::new(&texts);
    let path = place.folder.path().join("far.json");
    fs::write(&path, json.to_string()).unwrap();
    let tokenizer = Tokenizer::load(path).unwrap();
    assert_eq!(tokenizer.vocab_size(), 70_001);
    let (file, _) = place.cached(&tokenizer);
    let (tokens, _) = expected(&texts, &tokenizer, TextPart::Training);
    assert_eq!(tokens.iter().filter(|&&token| token == 70_000).count(), 2);
    assert_eq!(all(&file.training()), tokens);
    assert_eq!(place.cached(&tokenizer).1, CacheState::Found);
}

#[test]
fn tokens_are_found_by_text_and_tokenizer() {
    let place = Place::new(&["an ember in the ash", "a fire"]);
    let [gpt2, llama3] = ["gpt2.json", "llama3.json"].map(tokenizer);
    assert_eq!(place.cached(&gpt2).1, CacheState::Built);
    assert_eq!(place.cached(&gpt2).1, CacheState::Found);
    assert_eq!(place.cached(&llama3).1, CacheState::Built);
    assert_eq!(place.cached(&gpt2).1, CacheState::Found);

    // The same documents under other names, in the same cache.
    let cache = place.folder.path().join("cache/tokens");
    let state = |texts: &[&str]| {
        let other = Place::new(texts);
        TokenFile::cached(&other.corpus, &gpt2, &cache, |_| ())
            .unwrap()
            .1
    };
    assert_eq!(state(&["an ember in the ash", "a fire"]), CacheState::Found);
    assert_eq!(state(&["a fire", "an ember in the ash"]), CacheState::Built);
    assert_eq!(state(&["an ember in the asha fire"]), CacheState::Built);
    let names: Vec<_> = fs::read_dir(&cache).unwrap().collect();
    assert_eq!(names.len(), 4 + 1, "four files and the lock: {names:?}");
}

#[test]
fn progress_ends_at_all_bytes() {
    let text = "an ember in the ash\n".repeat(20_000);
    let place = Place::new(&[&text, "a fire"]);
    let cache = place.folder.path().join("cache");
    let mut told = Vec::new();
    let tokenizer = tokenizer("gpt2.json");
    TokenFile::cached(&place.corpus, &tokenizer, &cache, |progress| {
        told.push((progress.done, progress.total));
    })
    .unwrap();
    let total = text.len() as u64 + 6;
    assert!(told.is_sorted() && told.len() >= 6, "{told:?}");
    assert_eq!(told.last(), Some(&(total, total)));
}

#[test]
fn every_flipped_byte_and_every_cut_is_noticed_and_repaired() {
    let place = Place::new(&[
        "an ember in the ash",
        "a fire",
        "a glowing coal, a flame, smoke",
    ]);
    let tokenizer = tokenizer("gpt2.json");
    let (file, _) = place.cached(&tokenizer);
    let path = file.path().to_owned();
    let (tokens, held_out) = (all(&file.training()), all(&file.held_out()));
    drop(file);
    let intact = fs::read(&path).unwrap();
    assert_eq!(
        intact.len(),
        80 + 2 * (tokens.len() + held_out.len()) + 2 * 3 * 8
    );
    for at in 0..intact.len() {
        let mut flipped = intact.clone();
        flipped[at] ^= 0x10;
        fs::write(&path, &flipped).unwrap();
        let damage = TokenFile::open(&path).unwrap_err();
        let expected = if at < 8 {
            Damage::Foreign
        } else {
            Damage::Checksum
        };
        assert_eq!(damage, expected, "byte {at}");

        fs::write(&path, &intact[..at]).unwrap();
        assert_eq!(TokenFile::open(&path).unwrap_err(), Damage::Truncated);
    }
    fs::write(&path, [&intact[..], &[0]].concat()).unwrap();
    assert_eq!(TokenFile::open(&path).unwrap_err(), Damage::Truncated);

    let other = Place::new(&["another ember in another ash"]);
    let foreign = fs::read(other.cached(&tokenizer).0.path()).unwrap();
    let mut flipped = intact.clone();
    flipped[100] ^= 1;
    for (content, damage) in [
        (&b"years of work"[..], Damage::Truncated),
        (&[b'#'; 200], Damage::Foreign),
        (&flipped, Damage::Checksum),
        (&foreign, Damage::Other),
    ] {
        fs::write(&path, content).unwrap();
        let (file, state) = place.cached(&tokenizer);
        assert_eq!(state, CacheState::Rebuilt(damage));
        assert_eq!(all(&file.training()), tokens);
        assert_eq!(all(&file.held_out()), held_out);
        assert_eq!(fs::read(&path).unwrap(), intact);
    }
}

#[test]
fn a_writer_that_was_killed_leaves_nothing_in_the_way() {
    let place = Place::new(&["an ember in the ash"]);
    let tokenizer = tokenizer("gpt2.json");
    let path = place.cached(&tokenizer).0.path().to_owned();
    let intact = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let mut temporary = path.clone().into_os_string();
    temporary.push(".tmp");
    fs::write(&temporary, &intact[..50]).unwrap();
    assert_eq!(place.cached(&tokenizer).1, CacheState::Built);
    assert_eq!(fs::read(&path).unwrap(), intact);
    assert!(!Path::new(&temporary).exists());
}

#[test]
fn processes_that_come_at_once_wait_for_each_other() {
    let text = "an ember in the ash\n".repeat(20_000);
    let place = Place::new(&[&text]);
    let tokenizer = tokenizer("gpt2.json");
    let states = std::thread::scope(|scope| {
        let threads = [0, 1, 2].map(|_| scope.spawn(|| place.cached(&tokenizer).1));
        threads.map(|thread| thread.join().unwrap())
    });
    let built = states.iter().filter(|&&state| state == CacheState::Built);
    assert_eq!(built.count(), 1, "{states:?}");
}

#[test]
fn folders_that_cannot_be_written_are_errors() {
    let place = Place::new(&["an ember in the ash"]);
    let cache = place.folder.path().join("0.txt");
    match TokenFile::cached(&place.corpus, &Tokenizer::bytes(), &cache, |_| ()) {
        Err(TextError::Unwritable { path, .. }) => assert_eq!(path, cache),
        other => panic!("{other:?}"),
    }
}

#[test]
#[should_panic(expected = "2 tokens from 8 on are not in a stream of 9")]
fn reading_over_the_end_panics() {
    let place = Place::new(&["123456789\n"]);
    let (file, _) = place.cached(&Tokenizer::bytes());
    file.training().tokens(8..10);
}

#[test]
#[should_panic(expected = "the range 8..10 is not in a stream of 9")]
fn documents_over_the_end_panic() {
    let place = Place::new(&["123456789\n"]);
    let (file, _) = place.cached(&Tokenizer::bytes());
    file.training().documents(8..10);
}
