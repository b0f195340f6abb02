//! The writer at work while pulls go on: in a thread of ours, or, where projects have an owner, in a process of theirs.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    scene::{self, USER, give},
    writer::{Report, Writer},
};

/// Tells a process of the owner where to work.
const ORDER: &str = "HAUL_TEST_WRITER";

pub(crate) struct Beside {
    order: Order,
    at_work: AtWork,
}

enum AtWork {
    Ours(Arc<AtomicBool>, JoinHandle<Writer>),
    Theirs(Child),
}

#[derive(Serialize, Deserialize)]
struct Order {
    project: PathBuf,
    /// Where links lead to: what is the owner's, and what they may only read.
    outside: PathBuf,
    sealed: PathBuf,
    /// A directory of the owner's.
    place: PathBuf,
    seed: u64,
}

impl Order {
    fn writer(&self) -> Writer {
        Writer::new(&self.project, &self.outside, &self.place.join("aside"), self.seed).also(&self.sealed)
    }

    fn report(&self) -> PathBuf {
        self.place.join("report")
    }

    /// Where the number of steps stands while it works.
    fn steps(&self) -> PathBuf {
        self.place.join("steps")
    }
}

impl Beside {
    /// Lets a writer loose on `project`; `place` is made for it, and `test` is the one that calls [`perform`].
    pub(crate) fn start(project: &Path, outside: &Path, sealed: &Path, place: &Path, seed: u64, test: &str) -> Self {
        let (project, outside, sealed) = (project.to_owned(), outside.to_owned(), sealed.to_owned());
        let order = Order { project, outside, sealed, place: place.to_owned(), seed };
        fs::create_dir(place).unwrap();
        give(place);
        if scene::owner().is_some() {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args([test, "--exact", "--nocapture"]).env_clear().uid(USER).gid(USER);
            command.env(ORDER, serde_json::to_string(&order).unwrap()).stdin(Stdio::piped()).stdout(Stdio::null());
            return Self { at_work: AtWork::Theirs(command.spawn().unwrap()), order };
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (told, mut writer, steps) = (stop.clone(), order.writer(), order.steps());
        let writing = std::thread::spawn(move || {
            work(&mut writer, &steps, &told);
            writer
        });
        Self { order, at_work: AtWork::Ours(stop, writing) }
    }

    /// How many steps it has done so far.
    pub(crate) fn steps(&self) -> u64 {
        fs::read_to_string(self.order.steps()).ok().and_then(|steps| steps.parse().ok()).unwrap_or(0)
    }

    /// Lets it come to an end.
    pub(crate) fn rest(self) -> Writer {
        let order = self.order;
        match self.at_work {
            AtWork::Ours(stop, writing) => {
                stop.store(true, Ordering::SeqCst);
                writing.join().unwrap()
            }
            AtWork::Theirs(mut child) => {
                drop(child.stdin.take());
                let begun = Instant::now();
                let ended = loop {
                    if let Some(ended) = child.try_wait().unwrap() {
                        break ended;
                    }
                    assert!(begun.elapsed() < Duration::from_secs(30), "the writer does not come to an end");
                    std::thread::sleep(Duration::from_millis(10));
                };
                assert!(ended.success(), "the writer ended with {ended}");
                let report: Report = serde_json::from_slice(&fs::read(order.report()).unwrap()).unwrap();
                Writer::rested(&order.project, report)
            }
        }
    }
}

fn work(writer: &mut Writer, steps: &Path, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        writer.step();
        fs::write(steps, writer.steps.to_string()).unwrap();
    }
    writer.rest();
}

/// The process of the owner: works until nobody holds its standard input any more; whether this is one.
pub(crate) fn perform() -> bool {
    let Some(order) = std::env::var_os(ORDER) else { return false };
    let order: Order = serde_json::from_slice(order.as_encoded_bytes()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let told = stop.clone();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        told.store(true, Ordering::SeqCst);
    });
    let mut writer = order.writer().calmer();
    work(&mut writer, &order.steps(), &stop);
    fs::write(order.report(), serde_json::to_vec(&writer.report()).unwrap()).unwrap();
    true
}
