//! `haul schema`: the contract as files.

use std::path::PathBuf;

use clap::{Args, builder::PossibleValuesParser};
use serde_json::{Map, Value};

use super::{asyncapi, error::CliError, output};
use crate::{broker::Names, protocol::schema, shutdown::exit};

const EXAMPLES: &str = "\
Examples:
  haul schema task > task.schema.json
  haul schema --asyncapi > asyncapi.json
  haul schema --write schemas";

/// Arguments of `haul schema`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct SchemaArgs {
    /// Print the schema of this message; all of them, in one object, if none is named.
    #[arg(group = "what", value_parser = PossibleValuesParser::new(schema::NAMES))]
    name: Option<String>,
    /// Print the names of the messages.
    #[arg(long, group = "what")]
    list: bool,
    /// Print the AsyncAPI document: exchanges, queues, bindings, headers, messages, operations.
    #[arg(long, group = "what")]
    asyncapi: bool,
    /// Write all of it as files into this directory.
    #[arg(long, group = "what", value_name = "DIR")]
    write: Option<PathBuf>,
}

/// Every file of the contract, by name.
#[must_use]
pub fn files() -> Vec<(String, Value)> {
    let mut files: Vec<_> = schema::all().into_iter().map(|(name, schema)| (file_name(name), schema)).collect();
    files.push(("asyncapi.json".to_owned(), asyncapi::document(&Names::default())));
    files
}

fn file_name(name: &str) -> String {
    format!("{name}.schema.json")
}

/// A document as it is printed and as it stands in its file, without the last line end.
#[must_use]
pub fn pretty(value: &Value) -> String {
    format!("{value:#}")
}

pub(super) fn run(args: &SchemaArgs) -> Result<u8, CliError> {
    let all = schema::all();
    if args.list {
        for (name, _) in all {
            output::line(name)?;
        }
    } else if args.asyncapi {
        output::line(&pretty(&asyncapi::document(&Names::default())))?;
    } else if let Some(directory) = &args.write {
        let refused = |source| CliError::Output { what: format!("into {}", directory.display()), source };
        std::fs::create_dir_all(directory).map_err(refused)?;
        for (name, value) in files() {
            std::fs::write(directory.join(name), pretty(&value) + "\n").map_err(refused)?;
        }
    } else if let Some((_, value)) = all.iter().find(|(name, _)| args.name.as_deref() == Some(*name)) {
        output::line(&pretty(value))?;
    } else {
        let object: Map<_, _> = all.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        output::line(&pretty(&Value::Object(object)))?;
    }
    Ok(exit::OK)
}
