//! Repositories made from a seed: text that compresses and deltas as source text does, packed as an upstream packs.
//!
//! Every content comes from one generator of numbers, so that a shape names the same repository everywhere (packs may
//! differ in bytes between versions of git). Lines are made of a vocabulary used unevenly; a commit replaces a run of
//! lines in a few files, popular files more often; every thousandth commit carries an annotated tag.

use std::{
    fs,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::git;

/// Delta depth and window of the packs, as `git repack` has them by default.
const DEPTH: &str = "50";
const WINDOW: &str = "10";

/// What a repository looks like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    files: usize,
    commits: usize,
    /// Bytes of a file at first, about.
    file_bytes: usize,
    /// Files changed by a commit, at most.
    edits: usize,
    /// Lines put in place of others by one change, at most.
    hunk: usize,
}

/// The shapes that the benchmarks know.
pub(crate) const SHAPES: [Shape; 4] = [
    Shape { name: "small", files: 100, commits: 1, file_bytes: 4_000, edits: 0, hunk: 0 },
    Shape { name: "medium", files: 5_000, commits: 10_000, file_bytes: 6_000, edits: 3, hunk: 20 },
    Shape { name: "large", files: 50_000, commits: 100_000, file_bytes: 3_000, edits: 3, hunk: 20 },
    // In place of a repository of the git project's kind: its files, their size, its commits, and its pack's size.
    Shape { name: "history", files: 5_000, commits: 80_000, file_bytes: 12_000, edits: 2, hunk: 140 },
];

/// The repository of a shape below `cache`, made if it is not there.
pub(crate) fn repository(name: &str, cache: &Path) -> PathBuf {
    let shape = SHAPES.iter().find(|shape| shape.name == name);
    let shape =
        shape.unwrap_or_else(|| panic!("no repository is called {name}; there are small, medium, large, history"));
    let path = cache.join(format!("{name}.git"));
    if path.join("whole").exists() {
        return path;
    }
    eprintln!("making the repository \"{name}\" (once): {} files, {} commits", shape.files, shape.commits);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(cache).expect("the cache can be made");
    git(cache, &["init", "--quiet", "--bare", "--initial-branch=main", path.to_str().expect("a path is text")]);
    import(shape, &path);
    let (depth, window) = (format!("--depth={DEPTH}"), format!("--window={WINDOW}"));
    git(&path, &["repack", "-q", "-a", "-d", "-F", "-b", &depth, &window, "--threads=2"]);
    git(&path, &["pack-refs", "--all"]);
    fs::write(path.join("whole"), "").expect("the cache can be written");
    path
}

/// A line on what a repository holds, for reports.
pub(crate) fn facts(path: &Path) -> String {
    let counted = git(path, &["count-objects", "-v"]);
    let value = |name: &str| {
        let line = counted.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.and_then(|value| value.parse::<u64>().ok()).unwrap_or(0)
    };
    let commits = git(path, &["rev-list", "--count", "HEAD"]);
    let files = git(path, &["ls-tree", "-r", "--name-only", "HEAD"]).lines().count();
    format!("{files} files, {commits} commits, {} objects, packs of {} MB", value("in-pack"), value("size-pack") / 1000)
}

fn import(shape: &Shape, path: &Path) {
    let mut child = Command::new("git")
        .args(["-C", path.to_str().expect("a path is text")])
        // Quick here; the repack compresses everything anew.
        .args(["-c", "core.compression=1", "fast-import", "--quiet", "--force"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("git can be run");
    let mut out = BufWriter::with_capacity(1 << 20, child.stdin.take().expect("the pipe is there"));
    write(shape, &mut out).expect("git fast-import reads");
    drop(out);
    assert!(child.wait().expect("git can be waited for").success(), "git fast-import failed");
}

fn write(shape: &Shape, out: &mut impl Write) -> std::io::Result<()> {
    let mut text = Text::new(0x5eed_0000 + shape.files as u64 + shape.commits as u64);
    let paths: Vec<String> = (0..shape.files).map(|n| place(n, shape.files, &mut text)).collect();
    let mut files: Vec<Vec<u8>> = paths.iter().map(|_| text.lines_of(shape.file_bytes)).collect();
    for commit in 0..shape.commits {
        let message = text.lines_of(200);
        let time = 1_200_000_000 + commit as u64 * 3600;
        let who = format!("Author {} <author{0}@example.org> {time} +0000", text.below(300));
        write!(out, "commit refs/heads/main\nmark :{}\nauthor {who}\ncommitter {who}\n", commit + 1)?;
        data(out, &message)?;
        if commit == 0 {
            for (path, file) in paths.iter().zip(&files) {
                writeln!(out, "M 100644 inline {path}")?;
                data(out, file)?;
            }
        } else {
            for _ in 0..=text.below(shape.edits as u64) {
                let chosen = text.uneven(shape.files);
                let room = (shape.file_bytes * 3 / 2).saturating_sub(files[chosen].len());
                change(&mut files[chosen], shape.hunk, room, &mut text);
                writeln!(out, "M 100644 inline {}", paths[chosen])?;
                data(out, &files[chosen])?;
            }
        }
        if commit % 1000 == 999 {
            write!(out, "tag v0.{}\nfrom :{}\ntagger {who}\n", commit / 1000 + 1, commit + 1)?;
            data(out, b"a release\n")?;
        }
    }
    writeln!(out, "done")
}

fn data(out: &mut impl Write, bytes: &[u8]) -> std::io::Result<()> {
    writeln!(out, "data {}", bytes.len())?;
    out.write_all(bytes)?;
    out.write_all(b"\n")
}

/// Where file `n` lies: about twenty to a directory, two directories deep in large trees.
fn place(n: usize, files: usize, text: &mut Text) -> String {
    let name = format!("{}_{n}.c", text.word());
    match files {
        0..=200 => format!("src{}/{name}", n % 5),
        201..=10_000 => format!("part{}/sub{}/{name}", n % 20, n / 20 % 12),
        _ => format!("area{}/part{}/sub{}/{name}", n % 12, n / 12 % 15, n / 180 % 14),
    }
}

/// Puts new lines in place of a run of old ones; where there is no more `room`, no more of them than went.
fn change(file: &mut Vec<u8>, hunk: usize, room: usize, text: &mut Text) {
    let starts: Vec<usize> = std::iter::once(0)
        .chain(file.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1))
        .collect();
    let first = text.below(starts.len() as u64) as usize;
    let old = text.below(hunk as u64) as usize;
    let last = (first + old).min(starts.len() - 1);
    let mut new = Vec::new();
    let gone = starts[last] - starts[first];
    for _ in 0..=text.below(hunk as u64) {
        if new.len() < gone.max(room) {
            text.line(&mut new);
        }
    }
    file.splice(starts[first]..starts[last], new);
}

/// A source of numbers and of lines made from them.
struct Text {
    state: u64,
    words: Vec<String>,
}

impl Text {
    fn new(seed: u64) -> Self {
        let mut text = Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, words: Vec::new() };
        let syllables =
            ["re", "ad", "buf", "fer", "con", "fig", "ob", "ject", "in", "dex", "pa", "th", "lo", "ck", "er", "st"];
        text.words = (0..12_000)
            .map(|_| (0..2 + text.below(3)).map(|_| syllables[text.below(16) as usize]).collect::<String>())
            .collect();
        text
    }

    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    fn below(&mut self, most: u64) -> u64 {
        if most == 0 { 0 } else { self.next() % most }
    }

    /// A number below `most`, low ones far more often.
    fn uneven(&mut self, most: usize) -> usize {
        let unit = (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        ((unit * unit * unit) * most as f64) as usize
    }

    fn word(&mut self) -> &str {
        let chosen = self.uneven(self.words.len());
        &self.words[chosen]
    }

    fn line(&mut self, out: &mut Vec<u8>) {
        const BETWEEN: [&str; 8] = [" = ", "(", ", ", " + ", "->", " ", ".", " == "];
        out.resize(out.len() + self.below(4) as usize, b'\t');
        for n in 0..2 + self.below(6) {
            if n > 0 {
                out.extend_from_slice(BETWEEN[self.below(8) as usize].as_bytes());
            }
            let chosen = self.uneven(self.words.len());
            out.extend_from_slice(self.words[chosen].as_bytes());
        }
        out.extend_from_slice(b";\n");
    }

    fn lines_of(&mut self, bytes: usize) -> Vec<u8> {
        let wanted = bytes / 2 + self.below(bytes as u64 + 1) as usize;
        let mut lines = Vec::new();
        while lines.len() < wanted {
            self.line(&mut lines);
        }
        lines
    }
}
