//! `haul topology doctor`: what is unsafe or missing, and what mends it.

use std::time::Duration;

use super::{Tools, TopologyArgs};
use crate::{
    cli::{error::CliError, output},
    doctor::{Finding, Severity, examine, measure},
    protocol::printable,
    shutdown::exit,
};

/// How long the broker's statistics may follow a change, and how often they are looked at meanwhile.
const STATISTICS_LAG: Duration = Duration::from_secs(12);
const STATISTICS_PERIOD: Duration = Duration::from_secs(2);

pub(super) const EXAMPLES: &str = "\
Examples:
  haul topology doctor
  haul topology doctor --json | jq -r '.[] | select(.severity == \"red\") | .mend'

Ends with 0 where nothing is red, else with 1.";

pub(super) async fn run(tools: &Tools<'_>, args: &TopologyArgs) -> Result<u8, CliError> {
    let findings = settled(tools).await?;
    let red = findings.iter().filter(|finding| finding.severity == Severity::Red).count();
    if args.json {
        output::json(&findings)?;
    } else if findings.is_empty() {
        output::line("✓ everything is as it should be")?;
    } else {
        for finding in &findings {
            let mark = finding.severity.mark();
            let Finding { subject, problem, mend, .. } = finding;
            output::line(&printable(&format!("{mark} {subject}: {problem} — mend: {mend}")))?;
        }
        if red == 0 {
            output::line("✓ nothing is red")?;
        }
    }
    Ok(if red == 0 { exit::OK } else { exit::FAILED })
}

/// The findings, once the broker's statistics had time to follow a recent change.
async fn settled(tools: &Tools<'_>) -> Result<Vec<Finding>, CliError> {
    let begin = tokio::time::Instant::now();
    loop {
        let mut facts = tools.look().await?;
        measure(&mut facts, &tools.wanted, tools.broker.as_ref()).await?;
        let findings = examine(&tools.wanted, &facts);
        let lagging = findings.iter().any(|finding| finding.lagging && finding.severity > Severity::Info);
        if !lagging || begin.elapsed() >= STATISTICS_LAG {
            return Ok(findings);
        }
        tokio::time::sleep(STATISTICS_PERIOD).await;
    }
}
