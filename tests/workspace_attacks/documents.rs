//! The table of threats names tests, and a test that is named must be there.

use std::{fs, path::Path};

/// Reads `docs/SECURITY.md` and looks for each test that its table names.
pub(crate) fn check() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/SECURITY.md")).unwrap();
    let mut sources = String::new();
    let mut waiting = vec![root.join("tests"), root.join("src")];
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
    let rows: Vec<&str> = text
        .lines()
        .filter(|line| line.strip_prefix("| ").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())))
        .collect();
    let mut named = 0;
    for row in &rows {
        let tests: Vec<&str> =
            row.split('`').skip(1).step_by(2).filter(|word| word.matches('_').count() >= 3).collect();
        assert!(!tests.is_empty(), "a row without a test: {row}");
        for test in tests {
            assert!(sources.contains(&format!("fn {test}(")), "no test is called {test}");
            named += 1;
        }
        println!("{row}");
    }
    assert_eq!(rows.len(), 24, "a row of the table is missing");
    println!("{} rows, {named} tests", rows.len());
}
