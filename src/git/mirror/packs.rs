//! The packs of a mirror: which there are, which there should be, and whether they look whole from outside.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// The header of a pack, its trailing hash included.
const PACK_LEAST: u64 = 12 + 20;
/// An index without any object: magic, version, fan-out, and two hashes at the end.
const INDEX_LEAST: u64 = 8 + 1024 + 40;

/// Where the packs of `mirror` are.
pub(super) fn directory(mirror: &Path) -> PathBuf {
    mirror.join("objects/pack")
}

/// Git's own list of packs; what is in it must be there.
fn manifest(mirror: &Path) -> PathBuf {
    mirror.join("objects/info/packs")
}

/// The names of the packs that have an index, without their ends.
pub(in crate::git) fn names(mirror: &Path) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(directory(mirror))? {
        let name = entry?.file_name();
        if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".idx"))
            && name.starts_with("pack-")
        {
            names.insert(name.to_owned());
        }
    }
    Ok(names)
}

/// How many bytes the packs and their indices have.
pub(super) fn weight(mirror: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory(mirror))? {
        bytes += entry?.metadata()?.len();
    }
    Ok(bytes)
}

/// Writes down which packs there are, so that one that vanishes is missed. Nobody else may be writing.
pub(in crate::git) fn record(mirror: &Path) -> io::Result<()> {
    record_these(mirror, &names(mirror)?)
}

/// Writes down that these packs must be there.
pub(super) fn record_these(mirror: &Path, names: &BTreeSet<String>) -> io::Result<()> {
    let mut text: String = names.iter().flat_map(|name| ["P ", name, ".pack\n"]).collect();
    text.push('\n');
    let path = manifest(mirror);
    if fs::read(&path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(());
    }
    fs::create_dir_all(mirror.join("objects/info"))?;
    let new = path.with_extension("lock");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(new, path)
}

/// What is wrong with the packs of `mirror`, as far as their ends and sizes tell. What is inside is found out by
/// whoever reads it.
pub(in crate::git) fn damage(mirror: &Path) -> io::Result<Option<String>> {
    let names = match names(mirror) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Some("it has no place for packs".to_owned()));
        }
        other => other?,
    };
    let listed = match fs::read_to_string(manifest(mirror)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            return Ok(Some("its list of packs is garbage".to_owned()));
        }
        other => other?,
    };
    for line in listed.lines().filter(|line| !line.is_empty()) {
        match line.strip_prefix("P ").and_then(|name| name.strip_suffix(".pack")) {
            Some(name) if names.contains(name) => {}
            Some(name) => return Ok(Some(format!("{name} is missing"))),
            None => return Ok(Some("its list of packs is garbage".to_owned())),
        }
    }
    for name in &names {
        let path = directory(mirror).join(name);
        if let Some(what) = mismatch(&path.with_extension("idx"), &path.with_extension("pack"))? {
            return Ok(Some(format!("{name}: {what}")));
        }
    }
    Ok(None)
}

/// Why an index and a pack do not belong together.
fn mismatch(index: &Path, pack: &Path) -> io::Result<Option<&'static str>> {
    let (mut index, mut pack) = match (File::open(index), File::open(pack)) {
        (Ok(index), Ok(pack)) => (index, pack),
        (_, Err(error)) | (Err(error), _) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Some("its pack is missing"));
        }
        (_, Err(error)) | (Err(error), _) => return Err(error),
    };
    let (index_length, pack_length) = (index.metadata()?.len(), pack.metadata()?.len());
    if index_length < INDEX_LEAST || pack_length < PACK_LEAST {
        return Ok(Some("it is cut short"));
    }
    let mut head = [0; 8 + 1024];
    index.read_exact(&mut head)?;
    let number = |bytes: &[u8]| bytes.iter().fold(0_u64, |sum, &byte| (sum << 8) | u64::from(byte));
    if head[..8] != *b"\xfftOc\0\0\0\x02" {
        return Ok(Some("its index is not one"));
    }
    let objects = number(&head[8 + 1020..]);
    // Offsets beyond 2 GiB have eight bytes more each.
    let expected = INDEX_LEAST + objects * (20 + 4 + 4);
    if index_length < expected || !(index_length - expected).is_multiple_of(8) {
        return Ok(Some("its index has another size than its objects need"));
    }
    let mut start = [0; 12];
    pack.read_exact(&mut start)?;
    if start[..8] != *b"PACK\0\0\0\x02" || number(&start[8..]) != objects {
        return Ok(Some("its pack and its index do not belong together"));
    }
    let (mut of_pack, mut of_index) = ([0; 20], [0; 20]);
    pack.seek(SeekFrom::End(-20))?;
    pack.read_exact(&mut of_pack)?;
    index.seek(SeekFrom::End(-40))?;
    index.read_exact(&mut of_index)?;
    Ok((of_pack != of_index).then_some("its pack does not end as its index says"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mirror with one made-up pack of no objects that looks whole.
    fn mirror() -> tempfile::TempDir {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory(place.path())).unwrap();
        let pack = directory(place.path()).join("pack-1.pack");
        fs::write(&pack, [&b"PACK\0\0\0\x02\0\0\0\0"[..], &[7; 20]].concat()).unwrap();
        let index = [&b"\xfftOc\0\0\0\x02"[..], &[0; 1024], &[7; 20], &[9; 20]].concat();
        fs::write(pack.with_extension("idx"), index).unwrap();
        record(place.path()).unwrap();
        place
    }

    type Harm<'a> = &'a dyn Fn(&Path);

    #[test]
    fn what_is_cut_swapped_or_gone_is_seen_from_outside() {
        let place = mirror();
        assert_eq!(damage(place.path()).unwrap(), None);
        let pack = directory(place.path()).join("pack-1.pack");
        let cases: [(&str, Harm<'_>); 6] = [
            ("cut short", &|place| fs::write(directory(place).join("pack-1.idx"), "x").unwrap()),
            ("do not belong", &|place| {
                fs::write(directory(place).join("pack-1.pack"), [&b"PACK\0\0\0\x02\0\0\0\x01"[..], &[7; 20]].concat())
                    .unwrap();
            }),
            ("does not end", &|place| {
                fs::write(directory(place).join("pack-1.pack"), [&b"PACK\0\0\0\x02\0\0\0\0"[..], &[8; 20]].concat())
                    .unwrap();
            }),
            ("pack is missing", &|place| fs::remove_file(directory(place).join("pack-1.pack")).unwrap()),
            ("pack-1 is missing", &|place| fs::remove_file(directory(place).join("pack-1.idx")).unwrap()),
            ("garbage", &|place| fs::write(manifest(place), "x\n").unwrap()),
        ];
        for (what, harm) in cases {
            let place = mirror();
            harm(place.path());
            assert!(damage(place.path()).unwrap().unwrap().contains(what), "{what}");
        }
        assert!(pack.exists());
    }
}
