use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// Replaces the file at `path`, or makes it: after an error, a kill or a loss of power it is the old or the new one,
/// never a part.
///
/// The content goes to `path` with `.tmp` appended, which is synced and renamed. What is no ordinary file, such as
/// `/dev/stdout` or a named pipe, is not replaced but written to.
///
/// # Errors
///
/// What the system says of writing, syncing or renaming; the file beside `path` is removed then.
pub fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    if fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        return fs::write(path, content);
    }
    let mut temporary = OsString::from(path);
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_folder_of(path)
    };
    write().inspect_err(|_| {
        // The error that counts is the first one.
        let _ = fs::remove_file(&temporary);
    })
}

/// Makes a new name in the folder of `path` survive a loss of power.
///
/// Does nothing where folders are not opened as files: only Unix does, and only there it is needed.
///
/// # Errors
///
/// What the system says of opening or syncing the folder.
pub fn sync_folder_of(path: &Path) -> io::Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_and_makes_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        for content in ["first", "the second"] {
            replace_file(&path, content.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn writes_to_a_device_instead_of_replacing_it() {
        use std::os::unix::fs::FileTypeExt;

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("null");
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        replace_file(&path, b"report").unwrap();
        assert!(fs::metadata(&path).unwrap().file_type().is_char_device());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn keeps_the_old_file_and_leaves_nothing_behind_when_it_cannot_replace() {
        let folder = tempfile::tempdir().unwrap();
        // A folder that is not empty cannot be replaced by a file.
        let path = folder.path().join("taken");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("old"), "old").unwrap();
        replace_file(&path, b"new").unwrap_err();
        assert_eq!(fs::read_to_string(path.join("old")).unwrap(), "old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
