//! `haul doctor`: what this node can do for the work, and what mends it where it cannot.

use clap::Args;
use serde_json::json;

use super::{error::CliError, output};
use crate::{
    config::Config,
    doctor::{Finding, NodeFacts, Severity, examine_node},
    protocol::printable,
    shutdown::exit,
};

const EXAMPLES: &str = "\
Examples:
  haul doctor
  haul doctor --json | jq .node

To be run as the user whom the agent runs as. Ends with 0 where nothing is red, else with 1. The broker's part is
`haul topology doctor`.";

/// Arguments of `haul doctor`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct DoctorArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(config: &Config, args: &DoctorArgs) -> Result<u8, CliError> {
    let facts = NodeFacts::look(&config.projects());
    let findings = examine_node(&facts, &config.git);
    let red = findings.iter().any(|finding| finding.severity == Severity::Red);
    if args.json {
        output::json(&json!({ "node": facts, "findings": findings }))?;
        return Ok(if red { exit::FAILED } else { exit::OK });
    }
    let yes = |is: bool| if is { "yes" } else { "no" };
    let all = [
        (
            "Landlock",
            match facts.landlock {
                0 => "no".to_owned(),
                version => format!("version {version}"),
            },
        ),
        ("seccomp filters", yes(facts.seccomp).to_owned()),
        (
            "capabilities for git.run_as",
            match facts.missing_capabilities.join(", ") {
                none if none.is_empty() => "all".to_owned(),
                missing => format!("lacks {missing}"),
            },
        ),
        ("openat2", yes(facts.openat2).to_owned()),
        ("files share their content", facts.clones_files.map_or("could not be tried", yes).to_owned()),
    ];
    for (what, is) in all {
        output::line(&format!("{what}: {is}"))?;
    }
    for Finding { severity, subject, problem, mend, .. } in &findings {
        output::line(&printable(&format!("{} {subject}: {problem} — mend: {mend}", severity.mark())))?;
    }
    if !red {
        output::line("✓ nothing is red")?;
    }
    output::note("this was the node; `haul topology doctor` looks at the broker");
    Ok(if red { exit::FAILED } else { exit::OK })
}
