//! Reading the file and the environment, and saying which of them is wrong about what.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    path::{Path, PathBuf},
};

use config::{File, FileFormat, Source, Value, ValueKind};

use super::{
    Config,
    keys::{Shape, keys, nearest},
};

/// The file that is read where none is named and it exists.
pub const DEFAULT_FILE: &str = "/etc/haul/haul.toml";
/// What the names of our variables begin with; anything else under it is an error.
pub const PREFIX: &str = "AGENT_";
/// Another name of `AGENT_BROKER__URLS`.
const AMQP_URL: &str = "AGENT_AMQP_URL";
/// Where an empty text says something: everywhere else it means that the key is not set.
const EMPTY_SAYS_SOMETHING: &str = "results.queue";

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML. The lines themselves are not repeated: they may hold a secret.
    #[error("{} is not valid TOML: {reason}", path.display())]
    NotToml {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// There is no such key.
    #[error("{origin}: unknown key {key}{}", hint.as_ref().map(|near| format!("; did you mean {near}?")).unwrap_or_default())]
    Unknown {
        /// File or variable.
        origin: String,
        /// As written.
        key: String,
        /// The nearest known one.
        hint: Option<String>,
    },
    /// A value cannot be used.
    #[error("{origin}: {reason}")]
    Invalid {
        /// File or variable.
        origin: String,
        /// A sentence that names the key.
        reason: String,
    },
    /// No name was given, and the host's own will not do.
    #[error(
        "the host name {host:?} is not a node name (1–63 characters of [A-Za-z0-9_-]): set node_name or AGENT_NODE_NAME"
    )]
    NoNodeName {
        /// The host name.
        host: String,
    },
}

/// Values by dotted key, and where each came from.
#[derive(Default)]
struct Settings {
    values: BTreeMap<String, Value>,
    origins: BTreeMap<String, String>,
}

/// Reads `file` (else the default one, if it exists), then those of `variables` that are ours.
pub(super) fn load(
    file: Option<&Path>,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Config, ConfigError> {
    let known = keys::<Config>();
    let mut settings = Settings::default();
    let path = file.unwrap_or(Path::new(DEFAULT_FILE));
    match std::fs::read_to_string(path) {
        Ok(text) => settings.add_file(path, &text, &known)?,
        Err(error) if file.is_none() && error.kind() == std::io::ErrorKind::NotFound => {}
        Err(source) => return Err(ConfigError::Unreadable { path: path.to_owned(), source }),
    }
    settings.add_variables(variables, &known)?;
    settings.finish()
}

impl Settings {
    fn add_file(&mut self, path: &Path, text: &str, known: &BTreeMap<String, Shape>) -> Result<(), ConfigError> {
        let table = File::from_str(text, FileFormat::Toml)
            .collect()
            .map_err(|error| ConfigError::NotToml { path: path.to_owned(), reason: without_excerpt(&error) })?;
        let mut flat = BTreeMap::new();
        flatten("", table, known, &mut flat);
        for (key, value) in flat {
            let origin = path.display().to_string();
            let Some(&shape) = known.get(&key) else {
                return Err(ConfigError::Unknown { origin, hint: nearest(&key, known.keys()).cloned(), key });
            };
            self.set(key, origin, value, shape);
        }
        Ok(())
    }

    fn add_variables(
        &mut self,
        variables: impl IntoIterator<Item = (OsString, OsString)>,
        known: &BTreeMap<String, Shape>,
    ) -> Result<(), ConfigError> {
        let mut seen: BTreeMap<String, String> = BTreeMap::new();
        for (name, value) in variables {
            let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX)).map(str::to_owned) else { continue };
            let key = if name == AMQP_URL { "broker.urls".to_owned() } else { key_of(&name) };
            let Some(&shape) = known.get(&key) else {
                let hint = nearest(&key, known.keys()).map(|key| variable_of(key));
                return Err(ConfigError::Unknown { origin: "environment".to_owned(), key: name, hint });
            };
            let Ok(value) = value.into_string() else {
                return Err(ConfigError::Invalid { origin: name, reason: format!("{key} is not UTF-8") });
            };
            if value.is_empty() && key != EMPTY_SAYS_SOMETHING {
                continue;
            }
            if let Some(other) = seen.insert(key.clone(), name.clone()) {
                let reason = format!("{key} is set by {other} too: keep one of them");
                return Err(ConfigError::Invalid { origin: name, reason });
            }
            self.set(key, name, Value::new(None, ValueKind::String(value)), shape);
        }
        Ok(())
    }

    fn set(&mut self, key: String, origin: String, mut value: Value, shape: Shape) {
        if let ValueKind::String(text) = &value.kind {
            if shape.optional && text.is_empty() && key != EMPTY_SAYS_SOMETHING {
                return;
            }
            if shape.list {
                let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
                value.kind = ValueKind::Array(items.map(|item| Value::new(None, item)).collect());
            }
        }
        self.origins.insert(key.clone(), origin);
        self.values.insert(key, value);
    }

    fn finish(self) -> Result<Config, ConfigError> {
        let mut builder = config::Config::builder();
        for (key, value) in self.values {
            builder = builder.set_override(&key, value).map_err(|error| invalid(&self.origins, &error.to_string()))?;
        }
        let config: Config = builder
            .build()
            .and_then(config::Config::try_deserialize)
            .map_err(|error| invalid(&self.origins, &sentence(&error)))?;
        config.check().map_err(|reason| invalid(&self.origins, &reason))?;
        Ok(config)
    }
}

/// The refusal with the source that gave the key it speaks of: the first known key in the sentence.
fn invalid(origins: &BTreeMap<String, String>, reason: &str) -> ConfigError {
    let mut words = reason.split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_')));
    let origin = words.find_map(|word| origins.get(word.trim_end_matches('.')));
    ConfigError::Invalid {
        origin: origin.cloned().unwrap_or_else(|| "configuration".to_owned()),
        reason: reason.to_owned(),
    }
}

/// The key first, then what is odd about its value.
fn sentence(error: &config::ConfigError) -> String {
    match error {
        config::ConfigError::Type { unexpected, expected, key, .. } => {
            let key = key.as_deref().unwrap_or("a value");
            format!("{key} is a {unexpected}, expected {expected}")
        }
        config::ConfigError::At { error, key, .. } => {
            format!("{} cannot be used: {error}", key.as_deref().unwrap_or("a value"))
        }
        other => other.to_string(),
    }
}

/// Position and reason of a syntax error, without the lines in between, which repeat the file.
fn without_excerpt(error: &config::ConfigError) -> String {
    let text = error.to_string();
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.contains('|'));
    let first = lines.next().unwrap_or("it cannot be parsed").trim_start_matches("TOML parse error ").to_owned();
    match lines.next_back() {
        Some(last) => format!("{first}: {last}"),
        None => first,
    }
}

/// Dotted keys of a table; a table under a key that holds a value, or is unknown, stays whole.
fn flatten(
    prefix: &str,
    table: config::Map<String, Value>,
    known: &BTreeMap<String, Shape>,
    flat: &mut BTreeMap<String, Value>,
) {
    for (name, value) in table {
        let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
        let is_section = known.keys().any(|known| known.starts_with(&format!("{key}.")));
        match value.kind {
            ValueKind::Table(inner) if is_section => flatten(&key, inner, known, flat),
            _ => {
                flat.insert(key, value);
            }
        }
    }
}

/// `AGENT_GIT__TIMEOUT` → `git.timeout`.
fn key_of(variable: &str) -> String {
    variable.trim_start_matches(PREFIX).replace("__", ".").to_ascii_lowercase()
}

/// `git.timeout` → `AGENT_GIT__TIMEOUT`.
fn variable_of(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "__").to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use secrecy::ExposeSecret;

    use super::*;

    const REFERENCE: &str = include_str!("../../config/haul.toml");

    fn env(pairs: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
        pairs.iter().map(|(name, value)| (name.into(), value.into())).collect()
    }

    fn from_env(pairs: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        load(Some(file.path()), env(pairs))
    }

    fn from_file(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        load(Some(file.path()), Vec::new())
    }

    /// The reference with every option taken out of its comment: `#key`, where prose is `# text`.
    fn uncommented() -> String {
        let line = |line: &str| match line.strip_prefix('#') {
            Some(option) if !option.is_empty() && !option.starts_with(' ') => option.to_owned(),
            Some(_) => String::new(),
            None => line.to_owned(),
        };
        REFERENCE.lines().map(line).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_reference_file_states_exactly_the_defaults() {
        let stated = from_file(&uncommented()).unwrap();
        let mut default = Config::default();
        // Written out in the reference, chosen by the prefix in the program.
        default.results.queue = Some(default.results_queue());
        assert_eq!(format!("{stated:#?}"), format!("{default:#?}"));
        let urls = |config: &Config| config.broker.urls.iter().map(|url| url.expose_secret().to_owned()).collect();
        let (stated, default): (Vec<_>, Vec<_>) = (urls(&stated), urls(&default));
        assert_eq!(stated, default);
    }

    #[test]
    fn the_reference_file_names_every_option_once_and_sets_none() {
        let known = keys::<Config>();
        let table = File::from_str(&uncommented(), FileFormat::Toml).collect().unwrap();
        let mut flat = BTreeMap::new();
        flatten("", table, &known, &mut flat);
        assert_eq!(flat.keys().collect::<Vec<_>>(), known.keys().collect::<Vec<_>>());
        assert!(File::from_str(REFERENCE, FileFormat::Toml).collect().unwrap().is_empty());
    }

    #[test]
    fn the_environment_beats_the_file_and_the_file_the_defaults() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "slots = 3\n[git]\ntimeout = \"2m\"\nstall = \"5s\"\n").unwrap();
        let config = load(Some(file.path()), env(&[("AGENT_GIT__TIMEOUT", "3m")])).unwrap();
        assert_eq!(config.slots, 3);
        assert_eq!(config.git.timeout, Duration::from_mins(3));
        assert_eq!(config.git.stall, Duration::from_secs(5));
        assert_eq!(config.retry.max_attempts, 5);
    }

    #[test]
    fn the_names_that_operators_have_keep_working() {
        let config = from_env(&[
            ("AGENT_NODE_NAME", "007"),
            ("AGENT_MASTER_URL", "https://master.example"),
            ("AGENT_API_PORT", "9000"),
            ("AGENT_TOKEN", "0123"),
            ("AGENT_STORAGE_PATH", "/srv/data"),
            ("AGENT_PROJECTS_PATH", "/srv/projects"),
            ("AGENT_DATASETS_PATH", "/srv/datasets"),
            ("AGENT_JOBS_WORKSPACE", "/srv/jobs"),
            ("AGENT_AMQP_URL", "amqp://a, amqps://b/%2f"),
        ])
        .unwrap();
        assert_eq!(config.node().unwrap().as_str(), "007");
        assert_eq!(config.api_port, 9000);
        assert_eq!(config.token.unwrap().expose_secret(), "0123");
        assert_eq!(config.storage_path, Path::new("/srv/data"));
        assert_eq!(config.projects_path.unwrap(), Path::new("/srv/projects"));
        let urls: Vec<_> = config.broker.urls.iter().map(ExposeSecret::expose_secret).collect();
        assert_eq!(urls, ["amqp://a", "amqps://b/%2f"]);
    }

    #[test]
    fn nested_keys_take_switches_lists_durations_and_sizes() {
        let config = from_env(&[
            ("AGENT_GIT__ALLOW_HTTP", "true"),
            ("AGENT_GIT__HOSTS", "git.example, *.corp.example"),
            ("AGENT_GIT__MAX_BYTES", "2GiB"),
            ("AGENT_RETRY__MAX_ATTEMPTS", "7"),
            ("AGENT_LOG__FORMAT", "json"),
            ("PATH", "/bin"),
        ])
        .unwrap();
        assert!(config.git.allow_http);
        assert_eq!(config.git.hosts, ["git.example", "*.corp.example"]);
        assert_eq!(config.git.max_bytes, bytesize::ByteSize::gib(2));
        assert_eq!(config.retry.max_attempts, 7);
    }

    #[test]
    fn hosts_have_tables_of_their_own() {
        let config = from_file(
            "[git.host.\"*.Corp.example\"]\nproxy = \"http://u:canary@proxy:3128\"\nlimit = 2\n\
             [git.host.\"git.corp.example\"]\nca_file = \"/ca.pem\"",
        )
        .unwrap();
        let host = config.git.of_host("git.corp.example");
        assert_eq!(host.proxy.unwrap().address(), Some("http://u:canary@proxy:3128"));
        assert_eq!((host.limit, host.ca_file), (Some(2), Some("/ca.pem".into())));
        assert!(!format!("{config:?}").contains("canary"));
        for (text, part) in [
            ("[git.host.\"h\"]\nlimit = 0", "at least 1"),
            ("[git.host.\"h\"]\nlimt = 1", "limt"),
            ("[git.host.\"h\"]\nproxy = \"socks5://u:canary@h\"", "http://host:port"),
        ] {
            let sentence = from_file(text).unwrap_err().to_string();
            assert!(sentence.contains(part) && !sentence.contains("canary"), "{sentence}");
        }
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest_known_one() {
        let text = |result: Result<Config, ConfigError>| result.unwrap_err().to_string();
        assert!(
            text(from_file("[git]\ntimeot = \"1m\"")).ends_with("unknown key git.timeot; did you mean git.timeout?")
        );
        assert!(text(from_file("[gti]\ntimeout = \"1m\"")).contains("unknown key gti"));
        assert!(text(from_file("[git.timeout]\nx = 1")).contains("git.timeout"));
        let variable = text(from_env(&[("AGENT_GIT__TIMEOT", "1m")]));
        assert!(variable.contains("AGENT_GIT__TIMEOT") && variable.contains("AGENT_GIT__TIMEOUT?"), "{variable}");
        assert!(text(from_env(&[("AGENT_NODENAME", "x")])).contains("did you mean AGENT_NODE_NAME?"));
    }

    #[test]
    fn a_refusal_names_its_source_and_its_key() {
        let text = |result: Result<Config, ConfigError>| result.unwrap_err().to_string();
        let cases = [
            (text(from_env(&[("AGENT_GIT__TIMEOUT", "soon")])), ["AGENT_GIT__TIMEOUT: ", "git.timeout"]),
            (text(from_env(&[("AGENT_API_PORT", "70000")])), ["AGENT_API_PORT: ", "api_port"]),
            (text(from_env(&[("AGENT_NODE_NAME", "a.b")])), ["AGENT_NODE_NAME: ", "[A-Za-z0-9_-]"]),
            (text(from_env(&[("AGENT_RETRY__MAX_ATTEMPTS", "0")])), ["AGENT_RETRY__MAX_ATTEMPTS: ", "at least 1"]),
            (text(from_file("storage_path = \"data\"")), ["/", "storage_path must be an absolute path"]),
            (text(from_file("[git]\nallow_http = \"perhaps\"")), ["/", "git.allow_http"]),
            (text(from_env(&[("AGENT_LOG__FILTER", "a=b=c")])), ["AGENT_LOG__FILTER: ", "log.filter"]),
        ];
        for (sentence, parts) in cases {
            assert!(parts.iter().all(|part| sentence.contains(part)), "{sentence}");
        }
    }

    #[test]
    fn one_thing_cannot_be_set_by_two_variables() {
        let twice = from_env(&[("AGENT_AMQP_URL", "amqp://a"), ("AGENT_BROKER__URLS", "amqp://b")]);
        assert!(twice.unwrap_err().to_string().contains("keep one of them"));
    }

    #[test]
    fn empty_means_not_set_but_for_the_results_queue() {
        let config =
            from_env(&[("AGENT_TOKEN", ""), ("AGENT_STORAGE_PATH", ""), ("AGENT_RESULTS__QUEUE", "")]).unwrap();
        assert!(config.token.is_none());
        assert_eq!(config.storage_path, Path::new("/data"));
        assert_eq!(config.results_queue(), "");
        assert_eq!(Config::default().results_queue(), "haul.master.event");
    }

    #[test]
    fn secrets_never_print() {
        let canaries = [
            ("AGENT_TOKEN", "canary"),
            ("AGENT_AMQP_URL", "amqp://canary:canary@host"),
            ("AGENT_BROKER__MANAGEMENT_URL", "http://canary:canary@host"),
        ];
        assert!(!format!("{:?}", from_env(&canaries).unwrap()).contains("canary"));
        for refused in [
            from_env(&[("AGENT_AMQP_URL", "http://u:canary@host")]),
            from_env(&[("AGENT_MASTER_URL", "https://u:canary@host")]),
            from_file("token = \"canary"),
            from_file("[broker]\nurls = \"http://u:canary@host\""),
            from_file("[broker]\nurls = [[\"canary\"]]"),
            from_file("token = [\"canary\"]"),
            from_file("token = { canary = 1 }"),
        ] {
            let sentence = refused.unwrap_err().to_string();
            assert!(!sentence.contains("canary"), "{sentence}");
        }
    }

    #[test]
    fn a_file_that_was_named_must_be_there() {
        let error = load(Some(Path::new("/nonexistent/haul.toml")), Vec::new()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/haul.toml"));
    }
}
