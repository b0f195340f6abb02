//! `haul topology users`: users for the broker that may do their work and no more.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{ErrorKind, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use clap::Args;
use rand::{
    Rng as _,
    distr::{Alphanumeric, SampleString as _},
};

use crate::{
    broker::address::Address,
    cli::{error::CliError, output},
    config::Config,
    doctor::{User, UserRole, definitions, password_hash},
    protocol::NodeName,
    shutdown::exit,
};

const EXAMPLES: &str = "\
Examples:
  haul topology users --node worker-001 --passwords passwords.txt >users.sh && sh -e users.sh
  haul topology users --master --operator
  haul topology users --node worker-001 --definitions --passwords passwords.txt >users.json
  rabbitmqctl import_definitions users.json
  haul topology users --node worker-001 --keep-passwords           # the user is there: only what it may do

Prints commands for rabbitmqctl, which run on the broker, and asks the broker nothing. Passwords are made here: they are
printed this once, or kept in a file that only you can read, which is used again the next time. A command shows its
password in the broker's process list for a moment; a definitions file has hashes only.";

/// Letters and digits in a password: 190 bits of chance.
const PASSWORD_LENGTH: usize = 32;

/// Arguments of `haul topology users`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct UsersArgs {
    /// A user for the agent of this node; may be repeated.
    #[arg(long, value_name = "NODE")]
    node: Vec<NodeName>,
    /// A user for masters: publishes tasks and control messages, reads events.
    #[arg(long)]
    master: bool,
    /// A user for operators: everything of Haul's on the broker.
    #[arg(long)]
    operator: bool,
    /// Nodes may make and bind their own queues; they can then also bind them to the keys of others.
    #[arg(long)]
    self_enrol: bool,
    /// Print commands; this is what is printed anyway.
    #[arg(long, conflicts_with = "definitions")]
    commands: bool,
    /// Print a file of definitions to be imported, with hashes instead of passwords.
    #[arg(long)]
    definitions: bool,
    /// Take passwords from this file, and add to it those that are made; one user and password a line.
    #[arg(long, value_name = "FILE")]
    passwords: Option<PathBuf>,
    /// Only what the users may do: they are there.
    #[arg(long, conflicts_with = "passwords")]
    keep_passwords: bool,
}

pub(super) fn run(config: &Config, args: &UsersArgs) -> Result<u8, CliError> {
    let nodes = args.node.iter().map(|node| UserRole::Node { node: node.clone(), enrols_itself: args.self_enrol });
    let roles = nodes
        .chain(args.master.then_some(UserRole::Master))
        .chain(args.operator.then_some(UserRole::Operator))
        .collect::<Vec<_>>();
    if roles.is_empty() {
        return Err(CliError::Usage("say whose users: --node NODE, --master, --operator".to_owned()));
    }
    let (names, results) = (config.names(), config.results_queue());
    let users: Vec<_> = roles.iter().map(|role| User::new(&names, &results, role)).collect();
    let address = config.broker.urls.first().map(Address::parse).transpose()?;
    let vhost = address.as_ref().map_or("/", |address| address.vhost.as_str());
    let passwords = if args.keep_passwords { BTreeMap::new() } else { passwords(&users, args.passwords.as_deref())? };
    if args.definitions {
        let hash = |user: &User| Some(password_hash(passwords.get(user.name())?, rand::rng().random()));
        let all = definitions(users.iter().map(|user| (user, hash(user))), vhost);
        let text = serde_json::to_string_pretty(&all).unwrap_or_default();
        output::line(&text)?;
        if args.passwords.is_none() {
            // Not among the data, which is for the broker.
            for (name, password) in &passwords {
                output::note(&format!("{name} {password}"));
            }
        }
        return Ok(exit::OK);
    }
    for user in &users {
        if let Some(password) = passwords.get(user.name()) {
            let (told, word) = match &args.passwords {
                None => (password.as_str(), password.clone()),
                Some(path) => ("PASSWORD", taken_from(path, user.name())),
            };
            if let Some(address) = &address {
                output::line(&format!("# broker.urls (AGENT_AMQP_URL): {}", url(address, user.name(), told)))?;
            }
            output::line(&user.add_command(&word))?;
        }
        user.permission_commands(vhost).iter().try_for_each(|command| output::line(command))?;
    }
    Ok(exit::OK)
}

/// A user's password out of the file, as a word of a command.
fn taken_from(path: &Path, user: &str) -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
    format!("\"$(awk -v user={} '$1 == user {{ print $2 }}' {})\"", quoted(user), quoted(&path.to_string_lossy()))
}

fn url(address: &Address, user: &str, password: &str) -> String {
    address.location().replacen("://", &format!("://{user}:{password}@"), 1)
}

/// The users' passwords: those of the file, and new ones, which are added to it.
fn passwords(users: &[User], file: Option<&Path>) -> Result<BTreeMap<String, String>, CliError> {
    let known = file.map(read).transpose()?.unwrap_or_default();
    let mut passwords = BTreeMap::new();
    let mut fresh = String::new();
    for user in users {
        let name = user.name().to_owned();
        let password = known.get(&name).cloned().unwrap_or_else(|| {
            let password = made();
            // Writing to a string does not fail.
            let _ = writeln!(fresh, "{name} {password}");
            password
        });
        passwords.insert(name, password);
    }
    if let Some(path) = file {
        append(path, &fresh)
            .map_err(|source| CliError::Output { what: format!("passwords to {}", path.display()), source })?;
    }
    Ok(passwords)
}

/// A password that needs no quotes in a shell nor in an address, and is no option of a command.
fn made() -> String {
    Alphanumeric.sample_string(&mut rand::rng(), PASSWORD_LENGTH)
}

fn read(path: &Path) -> Result<BTreeMap<String, String>, CliError> {
    let unfit = |reason: String| CliError::Usage(format!("cannot use {}: {reason}", path.display()));
    let found = match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
        found => found.map_err(|error| unfit(error.to_string()))?,
    };
    if found.permissions().mode() & 0o077 != 0 {
        return Err(unfit("others may read or write it; chmod 600 it".to_owned()));
    }
    let text = std::fs::read_to_string(path).map_err(|error| unfit(error.to_string()))?;
    let pair = |line: &str| line.split_once(' ').map(|(user, password)| (user.to_owned(), password.trim().to_owned()));
    Ok(text.lines().filter_map(pair).collect())
}

fn append(path: &Path, lines: &str) -> std::io::Result<()> {
    let mut file = std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    file.write_all(lines.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Names;

    #[test]
    fn passwords_are_kept_in_a_file_that_only_its_owner_reads_and_used_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("passwords");
        let names = Names::default();
        let user = |name: &str| {
            let node = NodeName::new(name).unwrap();
            User::new(&names, "", &UserRole::Node { node, enrols_itself: false })
        };
        let first = passwords(&[user("a")], Some(&path)).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let both = passwords(&[user("a"), user("b")], Some(&path)).unwrap();
        assert_eq!(both["haul-node-a"], first["haul-node-a"]);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2);
        let plain =
            |password: &String| password.len() == PASSWORD_LENGTH && password.chars().all(char::is_alphanumeric);
        assert!(both.values().all(plain) && both["haul-node-a"] != both["haul-node-b"], "{both:?}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(passwords(&[user("a")], Some(&path)).unwrap_err().to_string().contains("chmod 600"));
    }
}
