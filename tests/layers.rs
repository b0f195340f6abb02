//! The layers, held by reading the sources: who may name whom, which library is written where, what stays pure, and
//! how long a file gets.

#![expect(clippy::unwrap_used, reason = "a test's helpers are tests too")]

use std::path::{Path, PathBuf};

/// Modules by layer, the lowest first; a module names those of its own layer or of a lower one.
const LAYERS: &[&[&str]] = &[
    &["protocol", "failure", "retry"],
    &["journal", "schedule", "lock", "broker", "git", "store"],
    &["execute"],
    &["worker", "master", "dead", "doctor"],
    &["api", "dashboard"],
    &["config", "telemetry", "shutdown", "cli"],
];
/// Modules of one outside library each: they never name one another.
const ADAPTERS: &[&str] = &["broker", "git", "store"];
/// Modules that are put together, never built upon.
const ROLES: &[&str] = &["worker", "master", "dead", "doctor"];
/// Libraries, and the only places that may name them.
const LIBRARIES: &[(&str, &[&str])] = &[
    ("lapin", &["broker"]),
    ("deadpool_lapin", &["broker"]),
    ("gix", &["git"]),
    ("git2", &["git"]),
    ("sqlx", &["store"]),
    ("backoff", &["retry"]),
    ("axum", &["api", "dashboard"]),
    ("tonic", &["api", "dashboard"]),
    ("clap", &["cli"]),
    ("indicatif", &["cli"]),
];
/// What the words of the contract and the decisions on them must not know.
const PURE: &[&str] = &["protocol", "failure", "retry", "journal", "schedule"];
/// Decisions of a role that are pure as well: what a master believes, and what it says of a task that is stuck.
const PURE_FILES: &[&str] = &[
    "master/task.rs",
    "master/project.rs",
    "master/projection.rs",
    "master/news.rs",
    "master/diagnosis.rs",
    "master/diagnosis/words.rs",
];
const IMPURE: &[&str] = &["tokio", "tokio_util", "tracing", "rand", "lapin", "gix", "git2", "sqlx", "ureq"];
/// Words that ask for the time, for chance or for the environment.
const AMBIENT: &[&str] =
    &["Timestamp::now", "Instant::now", "SystemTime::now", "now_v7", "new_v4", "Zoned::now", "env::var", "thread_rng"];
/// An identity is made of time and chance by its nature; nothing decides by it.
const AMBIENT_ALLOWED: &[(&str, &str)] = &[("protocol/ids.rs", "now_v7")];
/// Lines before the tests of a file, unless its head says why it is longer.
const LONGEST: usize = 400;
const EXCUSE: &str = "Longer than 400 lines because";

/// One file of the library.
struct Source {
    /// Below `src/`.
    path: String,
    /// The module at the root that it belongs to.
    module: String,
    /// All of it.
    text: String,
    /// What is before its tests, without comments and texts.
    code: String,
}

fn sources() -> Vec<Source> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    assert!(files.len() > 30, "the sources are not where they were");
    let read = |path: &PathBuf| {
        let below = path.strip_prefix(&root).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        let module =
            below.components().next().unwrap().as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned();
        let code = before_tests(&text).map(without_text).collect::<Vec<_>>().join("\n");
        Source { path: below.to_string_lossy().into_owned(), module, text, code }
    };
    files.iter().map(read).collect()
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

fn before_tests(text: &str) -> impl Iterator<Item = &str> {
    text.lines().take_while(|line| !line.starts_with("#[cfg(test)]"))
}

/// A line without its comment and without what is between its quotes.
fn without_text(line: &str) -> String {
    let outside = line.split('"').step_by(2).collect::<Vec<_>>().join("\"\"");
    outside.split("//").next().unwrap_or_default().to_owned()
}

/// The root modules that a file names: `crate::x` alone, and every head of `crate::{x, y::{…}}`.
fn named(code: &str) -> Vec<String> {
    let word =
        |text: &str| text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let Some(list) = rest.strip_prefix('{') else {
            names.push(word(rest));
            continue;
        };
        let mut depth = 0_usize;
        let mut item = String::new();
        for c in list.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => names.push(word(&std::mem::take(&mut item))),
                _ if depth == 0 => item.push(c),
                _ => {}
            }
        }
        names.push(word(&item));
    }
    names.retain(|name| LAYERS.iter().any(|layer| layer.contains(&name.as_str())));
    names
}

/// Whether `code` names the library itself: `lapin::…`, not `self::lapin::…` nor a module of its own of that name.
fn names_library(code: &str, library: &str) -> bool {
    let ours = |statement: &str| {
        let local = ["use self::", "use super::", "use crate::"].iter().any(|head| statement.trim().starts_with(head));
        let mut words = statement.split(|c: char| !(c.is_alphanumeric() || c == '_'));
        local && words.any(|word| word == library)
    };
    if code.contains(&format!("mod {library};")) || code.split(';').any(ours) {
        return false;
    }
    code.match_indices(&format!("{library}::")).any(|(at, _)| {
        let before = &code[..at];
        !before.ends_with("::") && !before.ends_with(|c: char| c.is_alphanumeric() || c == '_')
    })
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

#[test]
fn every_module_has_its_layer() {
    for source in sources().iter().filter(|source| !["main", "lib"].contains(&source.module.as_str())) {
        assert!(layer(&source.module).is_some(), "{} belongs to no layer: add it to LAYERS", source.path);
        assert!(!source.path.ends_with("mod.rs"), "{}: put it beside its directory", source.path);
    }
}

#[test]
fn no_module_names_one_of_a_higher_layer() {
    for source in sources() {
        let Some(own) = layer(&source.module) else { continue };
        for name in named(&source.code) {
            assert!(layer(&name).unwrap() <= own, "{} names {name}, which is of a higher layer", source.path);
        }
    }
}

#[test]
fn adapters_do_not_know_each_other_and_roles_do_not_either() {
    for source in sources() {
        for group in [ADAPTERS, ROLES] {
            if group.contains(&source.module.as_str()) {
                let other = named(&source.code)
                    .into_iter()
                    .find(|name| group.contains(&name.as_str()) && *name != source.module);
                assert_eq!(other, None, "{}", source.path);
            }
        }
    }
}

#[test]
fn only_the_command_line_reads_the_configuration() {
    for source in sources().iter().filter(|source| !["cli", "config"].contains(&source.module.as_str())) {
        assert!(!named(&source.code).contains(&"config".to_owned()), "{}", source.path);
    }
}

#[test]
fn each_library_is_written_in_its_place() {
    for source in sources() {
        for (library, places) in LIBRARIES {
            let allowed = places.contains(&source.module.as_str());
            assert!(allowed || !names_library(&source.code, library), "{} names {library}", source.path);
        }
    }
}

#[test]
fn words_and_decisions_know_no_runtime_no_clock_and_no_chance() {
    let sources = sources();
    for path in PURE_FILES {
        assert!(sources.iter().any(|source| source.path == *path), "{path} is not where it was");
    }
    let pure = |source: &&Source| PURE.contains(&source.module.as_str()) || PURE_FILES.contains(&source.path.as_str());
    for source in sources.iter().filter(pure) {
        for library in IMPURE {
            assert!(!names_library(&source.code, library), "{} names {library}", source.path);
        }
        for ambient in AMBIENT {
            let allowed = AMBIENT_ALLOWED.contains(&(source.path.as_str(), *ambient));
            assert!(allowed || !source.code.contains(ambient), "{} asks for {ambient}", source.path);
        }
    }
}

#[test]
fn a_file_is_short_or_says_why_it_is_not() {
    for source in sources() {
        let lines = before_tests(&source.text).count();
        let excused = source.text.lines().take_while(|line| line.starts_with("//!")).any(|line| line.contains(EXCUSE));
        assert!(lines <= LONGEST || excused, "{} has {lines} lines before its tests", source.path);
    }
}

#[test]
fn the_reader_of_sources_finds_what_it_looks_for() {
    let code = "use crate::{\n    broker::{Broker, git},\n    protocol::Task,\n};\nlet x = crate::config::load();";
    assert_eq!(named(code), ["broker", "protocol", "config"]);
    assert!(names_library("use lapin::Channel;", "lapin"));
    assert!(names_library("x(lapin::Error)", "lapin"));
    for harmless in
        ["use deadpool_lapin::Pool;", "self::lapin::x", "mod lapin;\nlapin::x()", "use super::{a, lapin};\nlapin::x()"]
    {
        assert!(!names_library(harmless, "lapin"), "{harmless}");
    }
    assert_eq!(without_text("let a = \"tokio::x\"; // tokio::y"), "let a = \"\"; ");
}

#[test]
fn every_test_that_a_document_names_is_there() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let read = |files: Vec<PathBuf>| files.into_iter().map(|file| std::fs::read_to_string(file).unwrap());
    let code: String =
        read([files_of(&root.join("src"), "rs"), files_of(&root.join("tests"), "rs")].concat()).collect();
    let documents = read([files_of(&root.join("docs"), "md"), vec![root.join("README.md")]].concat());
    let mut named = 0;
    for document in documents {
        // Names of tests are sentences; nothing else in the documents has so many words.
        let is_test = |word: &&str| {
            word.matches('_').count() >= 4
                && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        for test in document.split('`').filter(is_test) {
            // Or by a macro that makes one of each line.
            let is_there = code.contains(&format!("fn {test}(")) || code.contains(&format!("\n    {test}: "));
            assert!(is_there, "no test is called {test}");
            named += 1;
        }
    }
    assert!(named > 10, "the documents name {named} tests: the way they are looked for is wrong");
}

/// Every file below `directory` with this ending.
fn files_of(directory: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let below = |path: PathBuf| {
        if path.is_dir() {
            files_of(&path, ending)
        } else {
            (path.extension() == Some(ending.as_ref())).then_some(path).into_iter().collect()
        }
    };
    entries.flat_map(below).collect()
}
