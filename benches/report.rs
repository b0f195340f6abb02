//! What was measured: raw rounds, medians and ratios, as text, as a table and as a plot.

use std::{fmt::Write as _, fs, path::Path};

/// One side of a comparison.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) rounds: Vec<f64>,
}

/// Sides that were measured in turn; the last but the first are what the first is compared with.
#[derive(Clone, Debug, Default)]
pub(crate) struct Comparison {
    /// Things a second, and more is better; else milliseconds, and less is.
    pub(crate) rate: bool,
    /// Also the name of the plot: `cold-history`.
    pub(crate) name: String,
    pub(crate) title: String,
    pub(crate) series: Vec<Series>,
}

/// With which command and on what was measured, without naming the machine; `beside` is what else the figures depend on.
pub(crate) fn measured(script: &str, beside: &str) -> String {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = memory.split_whitespace().nth(1).and_then(|kilobytes| kilobytes.parse::<u64>().ok()).unwrap_or(0);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kernel = kernel.split('-').next().unwrap_or_default().trim();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    // What the script adds by itself is no part of the command.
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    let mut command = format!("scripts/{script}");
    while let Some(word) = words.next() {
        if word == "--scratch" {
            words.next();
        } else {
            command.extend([" ", &word]);
        }
    }
    format!(
        "Measured with `{command}` on {}: {cores} cores, {} GB of memory, Linux {kernel}, {beside}. Load average at the end: {}.",
        jiff::Timestamp::now().strftime("%Y-%m-%d"),
        memory / 1_000_000,
        load.split_whitespace().take(3).collect::<Vec<_>>().join(" "),
    )
}

/// Everything of one run.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) comparisons: Vec<Comparison>,
    /// Lines that are no times: counts, bytes, memory.
    pub(crate) facts: Vec<String>,
}

impl Series {
    pub(crate) fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), rounds: Vec::new() }
    }

    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.rounds.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            length if length % 2 == 1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        }
    }
}

impl Report {
    /// Takes a comparison in and prints it.
    pub(crate) fn add(&mut self, comparison: Comparison) {
        println!("\n== {}", comparison.title);
        let first = comparison.series[0].median();
        for (n, series) in comparison.series.iter().enumerate() {
            let rounds = series.rounds.iter().map(|round| format!("{round:.1}")).collect::<Vec<_>>().join(" ");
            let ratio =
                if n == 0 { String::new() } else { format!("   {}", comparison.against(series.median(), first)) };
            let median = comparison.text(series.median());
            println!("{:<36} median {median:>12}{ratio}\n    rounds: {rounds}", series.name);
        }
        self.comparisons.push(comparison);
    }

    pub(crate) fn say(&mut self, fact: String) {
        println!("{fact}");
        self.facts.push(fact);
    }

    /// Writes the table, as `file`, and the plots into `directory`.
    pub(crate) fn write(&self, directory: &Path, file: &str, head: &str) -> std::io::Result<()> {
        fs::create_dir_all(directory)?;
        let mut text = format!("{head}\n");
        for comparison in &self.comparisons {
            let name = &comparison.name;
            let _ = write!(text, "## {}\n\n![{}]({name}.svg)\n\n", comparison.title, comparison.title);
            let unit = if comparison.rate { "a second" } else { "in ms" };
            let _ = writeln!(text, "| | median | the first against it | rounds, {unit} |\n|---|---:|---:|---|");
            let first = comparison.series[0].median();
            for (n, series) in comparison.series.iter().enumerate() {
                let rounds = series.rounds.iter().map(|round| format!("{round:.0}")).collect::<Vec<_>>().join(", ");
                let median = series.median();
                let ratio = if n == 0 { String::new() } else { comparison.against(median, first) };
                let _ = writeln!(text, "| {} | {} | {ratio} | {rounds} |", series.name, comparison.text(median));
            }
            text.push('\n');
            fs::write(directory.join(format!("{name}.svg")), plot(comparison))?;
        }
        if !self.facts.is_empty() {
            text.push_str("## Counts and memory\n\n");
            for fact in &self.facts {
                let _ = writeln!(text, "- {fact}");
            }
        }
        fs::write(directory.join(file), text)
    }
}

impl Comparison {
    /// How `first`, which is haul, stands to `other`.
    fn against(&self, other: f64, first: f64) -> String {
        if self.rate {
            return format!("haul does {:.2} times as many", first / other);
        }
        format!("haul takes {:.2} of it, {:+.0} ms: {:.2} times as fast", first / other, first - other, other / first)
    }

    fn text(&self, value: f64) -> String {
        if self.rate { format!("{value:.0}/s") } else { format!("{value:.1} ms") }
    }
}

/// Bars for the medians, dots for the rounds.
fn plot(comparison: &Comparison) -> String {
    const LEFT: f64 = 250.0;
    const WIDTH: f64 = 460.0;
    const ROW: f64 = 40.0;
    const COLOURS: [&str; 4] = ["#2b6cb0", "#a0aec0", "#d69e2e", "#718096"];
    let rows = comparison.series.len() as f64;
    let top = comparison.series.iter().flat_map(|series| &series.rounds).fold(1.0_f64, |most, round| most.max(*round));
    let step = nice(top / 4.0);
    let most = (top / step).ceil() * step;
    let x = |value: f64| LEFT + value / most * WIDTH;
    let (height, bottom) = (rows * ROW + 100.0, rows * ROW + 50.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 800 {height}\" width=\"800\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"800\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"16\" font-weight=\"bold\" fill=\"#1a202c\">{}</text>\n",
        escaped(&comparison.title)
    );
    let (unit, scale) = if comparison.rate {
        ("/s", 1.0)
    } else if most >= 2000.0 {
        ("s", 1000.0)
    } else {
        ("ms", 1.0)
    };
    let mut tick = 0.0;
    while tick <= most * 1.001 {
        let at = x(tick);
        let label = format!("{:.*}", usize::from(scale > 1.0 && step < 1000.0), tick / scale);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"44\" x2=\"{at:.1}\" y2=\"{bottom:.1}\" stroke=\"#e2e8f0\"/>\n\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#4a5568\">{label} {unit}</text>",
            bottom + 18.0
        );
        tick += step;
    }
    for (n, series) in comparison.series.iter().enumerate() {
        let y = 50.0 + n as f64 * ROW;
        let (median, middle) = (series.median(), y + ROW / 2.0);
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#1a202c\">{}</text>\n\
             <rect x=\"{LEFT:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"/>",
            LEFT - 10.0,
            middle + 4.0,
            escaped(&series.name),
            y + 8.0,
            (x(median) - LEFT).max(1.0),
            ROW - 16.0,
            COLOURS[n % COLOURS.len()]
        );
        for round in &series.rounds {
            let _ = writeln!(
                svg,
                "<circle cx=\"{:.1}\" cy=\"{middle:.1}\" r=\"3.5\" fill=\"#ffffff\" stroke=\"#1a202c\"/>",
                x(*round)
            );
        }
        let furthest = series.rounds.iter().fold(median, |most, round| most.max(*round));
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"#1a202c\">{}</text>",
            x(furthest) + 10.0,
            middle + 4.0,
            if comparison.rate {
                format!("{median:.0}/s")
            } else if median >= 2000.0 {
                format!("{:.2} s", median / 1000.0)
            } else {
                format!("{median:.0} ms")
            }
        );
    }
    let better = if comparison.rate { "Longer" } else { "Shorter" };
    let _ = writeln!(
        svg,
        "<text x=\"16\" y=\"{:.1}\" font-size=\"11\" fill=\"#4a5568\">Bars: medians; dots: single rounds. {better} is better.</text>\n</svg>",
        height - 10.0
    );
    svg
}

/// The next round number above `value`.
fn nice(value: f64) -> f64 {
    let power = 10_f64.powf(value.max(0.1).log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= value).unwrap_or(10.0);
    factor * power
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
