//! How long the file system below a journal takes to make a write durable: printed with every figure, which depend on it.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    time::Instant,
};

use crate::spread::Spread;

/// Writes that are timed.
const WRITES: usize = 200;
/// What a commit of the journal appends at least: a page.
const BLOCK: [u8; 4096] = [7; 4096];

/// The times of appending a page and syncing it, in milliseconds.
pub(crate) fn fsync(directory: &Path) -> Spread {
    fs::create_dir_all(directory).expect("the scratch directory can be written");
    let path = directory.join("fsync");
    let mut file = File::create(&path).expect("the scratch directory can be written");
    let mut times = Vec::with_capacity(WRITES);
    for _ in 0..WRITES {
        let begun = Instant::now();
        file.write_all(&BLOCK).and_then(|()| file.sync_data()).expect("the disk can be written");
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    let _ = fs::remove_file(path);
    Spread::of(times)
}
