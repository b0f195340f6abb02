//! Sending a mirror's objects, as the files that they are, to a child that may not see the mirror.
//!
//! Each file is a line, `<length> <name>`, and its bytes. Of a pack the index comes last, since that is what makes it one.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, BufRead, PipeWriter, Write},
    path::{Path, PathBuf},
};

use crate::failure::{ErrorClass, Failure};

/// The longest such line.
const LONGEST: u64 = 256;

/// Sends every object file of `mirror`; whoever calls it sees to it that the files stay.
///
/// # Errors
/// When something cannot be read, or nobody listens.
pub(crate) fn send(mirror: &Path, mut into: PipeWriter) -> Result<(), Failure> {
    let objects = mirror.join("objects");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&objects)? {
        let name = entry?.file_name();
        if let Some(name) = name.to_str().filter(|name| *name == "pack" || is_fan(name)) {
            for inner in std::fs::read_dir(objects.join(name))? {
                let inner = inner?.file_name();
                files.extend(inner.to_str().map(|inner| format!("{name}/{inner}")).filter(|name| is_object_file(name)));
            }
        }
    }
    files.sort_by_key(|name| (stem(name), rank(name)));
    for name in files {
        let mut file = File::open(objects.join(&name))?;
        let length = file.metadata()?.len();
        writeln!(into, "{length} {name}")?;
        if io::copy(&mut file, &mut into)? != length {
            return Err(Failure::new(ErrorClass::Internal, "a mirror changed while it was read"));
        }
    }
    Ok(())
}

/// Reads the line before a file: its length and its name; `None` at the end.
///
/// # Errors
/// When it is no such line.
pub(in crate::git) fn read_head(from: &mut impl BufRead) -> io::Result<Option<(u64, String)>> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "what comes from the mirror is not a list of files");
    let mut line = String::new();
    io::Read::take(&mut *from, LONGEST).read_line(&mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    let (length, name) = line.strip_suffix('\n').and_then(|line| line.split_once(' ')).ok_or_else(wrong)?;
    let length = length.parse().map_err(|_| wrong())?;
    if !is_object_file(name) {
        return Err(wrong());
    }
    Ok(Some((length, name.to_owned())))
}

fn is_fan(name: &str) -> bool {
    name.len() == 2 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a name beneath `objects` is that of a pack, of what belongs to one, or of a single object.
fn is_object_file(name: &str) -> bool {
    let hex = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    match name.split_once('/') {
        Some(("pack", file)) => {
            let pack = file.strip_prefix("pack-").and_then(|file| file.split_once('.'));
            pack.is_some_and(|(id, kind)| hex(id) && ["pack", "rev", "idx"].contains(&kind))
        }
        Some((fan, rest)) => is_fan(fan) && rest.len() == 38 && hex(rest),
        None => false,
    }
}

fn stem(name: &str) -> PathBuf {
    Path::new(name).with_extension("")
}

fn rank(name: &str) -> u8 {
    match Path::new(name).extension().and_then(OsStr::to_str) {
        Some("idx") => 2,
        Some("rev") => 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_as_they_were_sent_and_an_index_after_its_pack() {
        let mirror = tempfile::tempdir().unwrap();
        let single = format!("0a/{}", "b".repeat(38));
        for name in
            ["pack/pack-aa.idx", "pack/pack-aa.pack", "pack/pack-bb.pack", "pack/pack-aa.rev", "info/packs", &single]
        {
            let path = mirror.path().join("objects").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, name).unwrap();
        }
        let (reader, writer) = io::pipe().unwrap();
        send(mirror.path(), writer).unwrap();
        let mut from = io::BufReader::new(reader);
        let mut names = Vec::new();
        while let Some((length, name)) = read_head(&mut from).unwrap() {
            let mut text = vec![0; usize::try_from(length).unwrap()];
            io::Read::read_exact(&mut from, &mut text).unwrap();
            assert_eq!(text, name.as_bytes());
            names.push(name);
        }
        assert_eq!(names, [&single, "pack/pack-aa.pack", "pack/pack-aa.rev", "pack/pack-aa.idx", "pack/pack-bb.pack"]);
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_refused() {
        for name in ["../x", "pack/../../config", "pack/pack-aa.keep", "hooks/post-checkout", "zz/aa", "pack/pack-.idx"]
        {
            assert!(read_head(&mut format!("3 {name}\nabc").as_bytes()).is_err(), "{name}");
        }
        assert!(read_head(&mut &b""[..]).unwrap().is_none());
    }
}
