//! `haul topology plan`: everything that should be on the broker, and whether it is.

use super::{Tools, TopologyArgs};
use crate::{
    cli::{error::CliError, output, table::Table},
    doctor::{State, plan},
    shutdown::exit,
};

pub(super) const EXAMPLES: &str = "\
Examples:
  haul topology plan
  haul topology plan --node worker-001 --json

Marks: = as it should be, + missing, ~ differs, ? there, but only the management API could tell the rest.";

pub(super) async fn run(tools: &Tools<'_>, args: &TopologyArgs) -> Result<u8, CliError> {
    let facts = tools.look().await?;
    let items = plan(&tools.wanted, &facts);
    if args.json {
        output::json(&items)?;
        return Ok(exit::OK);
    }
    let mut table = Table::new(["", "WHAT", "NAME", "DETAIL"]);
    for item in &items {
        let (mark, detail) = match &item.state {
            State::Equal => ("=", item.detail.clone()),
            State::Missing => ("+", item.detail.clone()),
            State::Differs { how } => ("~", how.clone()),
            State::Unknown => ("?", item.detail.clone()),
        };
        table.row([mark.to_owned(), item.what.to_owned(), item.name.clone(), detail]);
    }
    table.lines().iter().try_for_each(|line| output::line(line))?;
    let count = |wanted: fn(&State) -> bool| items.iter().filter(|item| wanted(&item.state)).count();
    output::note(&format!(
        "{} as they should be, {} missing, {} differ, {} unknown; `haul topology apply` makes what is missing, `haul topology \
         migrate` makes queues that differ anew",
        count(|state| *state == State::Equal),
        count(|state| *state == State::Missing),
        count(|state| matches!(state, State::Differs { .. })),
        count(|state| *state == State::Unknown),
    ));
    Ok(exit::OK)
}
