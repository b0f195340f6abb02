//! A file system made for one case and thrown away after it: where files were deleted seconds ago, ext4 makes new ones
//! ten times as slowly, and both sides of a comparison would feel it unevenly.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

/// What to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// ext4 in a sparse file, loop-mounted; needs root.
    Ext4,
    /// Memory; needs root.
    Tmpfs,
    /// A new directory on whatever is there.
    Directory,
}

/// It is unmounted and removed when dropped.
pub(crate) struct Place {
    directory: PathBuf,
    mounted: bool,
    /// What it is, for the report.
    pub(crate) what: String,
}

/// Larger than any case needs; the file is sparse.
const IMAGE: u64 = 60 << 30;

impl Place {
    pub(crate) fn fresh(kind: Kind, scratch: &Path, name: &str) -> Self {
        let directory = scratch.join(format!("place-{name}"));
        fs::create_dir_all(&directory).expect("the scratch directory can be written");
        let root = rustix::process::getuid().is_root();
        let at = directory.to_str().expect("a path is text").to_owned();
        let mounted = root
            && match kind {
                Kind::Directory => false,
                Kind::Tmpfs => run("mount", &["-t", "tmpfs", "-o", "size=20G", "tmpfs", &at]),
                Kind::Ext4 => {
                    let image = directory.with_extension("img");
                    File::create(&image).and_then(|file| file.set_len(IMAGE)).expect("an image can be made");
                    let made = run("mkfs.ext4", &["-q", "-F", image.to_str().expect("a path is text")])
                        // Without this the kernel writes inode tables in the background while we measure.
                        && run("mount", &["-o", "loop,noinit_itable", image.to_str().expect("a path is text"), &at]);
                    // The mount keeps it.
                    let _ = fs::remove_file(&image);
                    made
                }
            };
        let what = match (kind, mounted) {
            (Kind::Ext4, true) => "ext4, made for each case, loop-mounted".to_owned(),
            (Kind::Tmpfs, true) => "tmpfs, made for each case".to_owned(),
            _ => {
                if kind != Kind::Directory {
                    eprintln!("warning: no file system could be made (that needs root): a directory is used instead");
                }
                "a new directory".to_owned()
            }
        };
        Self { directory, mounted, what }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.directory
    }

    /// Waits until all that was written is on the disk, so that nobody pays for what came before.
    pub(crate) fn settle(&self) {
        let directory = File::open(&self.directory).expect("it is there");
        rustix::fs::syncfs(&directory).expect("the disk takes what was written");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let at = self.directory.to_str().expect("a path is text").to_owned();
        if self.mounted && !run("umount", &[&at]) {
            run("umount", &["--lazy", &at]);
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn run(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).status().is_ok_and(|status| status.success())
}
