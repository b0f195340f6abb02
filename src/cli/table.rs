//! Aligned columns for people.

use crate::protocol::printable;

/// Rows under a heading; the last column is as wide as it needs to be.
pub(super) struct Table<const N: usize> {
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(super) fn new(heading: [&str; N]) -> Self {
        Self { rows: vec![heading.map(str::to_owned)] }
    }

    /// Adds a row; controls that came from elsewhere are taken out.
    pub(super) fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells.map(|cell| printable(&cell)));
    }

    /// The heading and the rows, aligned.
    pub(super) fn lines(&self) -> Vec<String> {
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<_> = (0..N).map(width).collect();
        let line = |row: &[String; N]| {
            let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        self.rows.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_their_heading_and_hostile_text_stays_in_its_line() {
        let mut table = Table::new(["TASK", "ERROR"]);
        table.row(["t-1".to_owned(), "bad\nnews\u{1b}[31m".to_owned()]);
        table.row(["longer-id".to_owned(), "x".to_owned()]);
        assert_eq!(table.lines(), ["TASK       ERROR", "t-1        bad news [31m", "longer-id  x"]);
    }
}
