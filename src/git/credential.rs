//! Credentials of the node: one file each, found by name, read only by the child that uses them.
//!
//! | file | holds | may be sent to |
//! |---|---|---|
//! | `<host>/<name>.token` | an access token, sent as the password of `x-access-token` | that host |
//! | `<host>/<name>.toml` | `user` and `password`, or `token` | that host |
//! | `<name>.toml` or `<name>` | the same, and `hosts` | those hosts |
//! | `<host>/<name>.key`, `<name>.key` | a private key for ssh, which never leaves the node | |
//!
//! A task names both the credential and the address, so whoever may publish one could send any secret to a server of
//! their own. What says where a secret may go is therefore on the node, and a secret that is bound to nothing is refused.
//!
//! The agent only finds the file and looks at its rights. What is in it never travels in a message, an argument, an
//! environment or a log.

use std::{
    fs::{File, Metadata, OpenOptions},
    io::Read,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::policy::fits;
use crate::{
    failure::{ErrorClass, Failure},
    protocol::{CredentialName, GitUrl, Scheme},
};

/// The largest credential file, in bytes.
const LARGEST: u64 = 64 << 10;
/// The user that hosting services take with an access token as password.
const TOKEN_USER: &str = "x-access-token";

/// What a credential's file holds, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// A token alone.
    Token,
    /// User and password.
    Password,
    /// A private key.
    Key,
}

/// A credential that was found; not yet read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CredentialFile {
    /// Where it is, without symlinks.
    pub path: PathBuf,
    /// What it holds.
    pub form: Form,
    /// The host whose directory it is in.
    #[serde(default)]
    pub host: Option<String>,
}

/// A user and a password for one host. Prints nothing of them.
#[derive(Debug)]
pub struct Login {
    user: SecretString,
    password: SecretString,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PasswordFile {
    user: Option<SecretString>,
    password: Option<SecretString>,
    token: Option<SecretString>,
    #[serde(default)]
    hosts: Vec<String>,
}

impl CredentialFile {
    /// Finds the credential `name` in `directory`, in the form that `url` needs: that of its host before any other.
    ///
    /// # Errors
    /// `auth` with what to do: no directory set, no such file, a link that leads out of the directory, rights that
    /// let others read it; `forbidden` where nothing says to which hosts it may be sent.
    pub fn find(directory: Option<&Path>, name: &CredentialName, url: &GitUrl) -> Result<Self, Failure> {
        let Some(directory) = directory else {
            return Err(refused(name, "cannot be looked up: git.credentials_path is not set"));
        };
        let key = [("key", Form::Key)].as_slice();
        let login = [("token", Form::Token), ("toml", Form::Password), ("", Form::Password)].as_slice();
        let (forms, others) = if url.scheme() == Scheme::Ssh { (key, login) } else { (login, key) };
        let own = plain(url.host());
        let places = || [Some(own.clone()).filter(|own| !own.is_empty() && !own.starts_with('.')), None];
        let existing = |forms: &[(&str, Form)]| {
            places().into_iter().find_map(|host| {
                forms.iter().find_map(|&(extension, form)| {
                    let dot = if extension.is_empty() { "" } else { "." };
                    let path =
                        directory.join(host.as_deref().unwrap_or_default()).join(format!("{name}{dot}{extension}"));
                    path.symlink_metadata().is_ok().then(|| (path, form, host.clone()))
                })
            })
        };
        let Some((path, form, host)) = existing(forms) else {
            let why = match (existing(others), url.scheme()) {
                (Some(_), Scheme::Ssh) => "is not a key, but the address is one for ssh; add a .key file",
                (Some(_), _) => "is an ssh key, but the address is not one for ssh; add a .token or .toml file",
                (None, _) => "is not in git.credentials_path, neither for this host nor for several",
            };
            return Err(refused(name, why));
        };
        let unreadable = |error| refused(name, &format!("cannot be read: {error}"));
        let home = directory.canonicalize().map_err(unreadable)?;
        let path = path.canonicalize().map_err(unreadable)?;
        if !path.starts_with(&home) {
            return Err(refused(name, "is a link that leads out of git.credentials_path"));
        }
        check(&path.metadata().map_err(unreadable)?).map_err(|why| refused(name, why))?;
        if form == Form::Token && host.is_none() {
            return Err(unbound(&format!("the credential {name}")));
        }
        Ok(Self { path, form, host })
    }

    /// Reads a user and a password to be sent to `host`.
    ///
    /// # Errors
    /// `auth` where it cannot be read or understood, `forbidden` where it is bound to other hosts or to none.
    pub fn login(&self, host: &str) -> Result<Login, Failure> {
        let elsewhere = || {
            let path = self.path.display();
            Err(Failure::forbidden(format!("the credential in {path} is bound to other hosts than {host}")))
        };
        if self.host.as_ref().is_some_and(|own| *own != plain(host)) {
            return elsewhere();
        }
        let text = self.read()?;
        match self.form {
            Form::Key => Err(Failure::new(ErrorClass::Auth, "a key cannot be sent as a password")),
            Form::Token if self.host.is_none() => Err(unbound(&format!("the credential in {}", self.path.display()))),
            Form::Token => self.token(text.expose_secret()),
            Form::Password => {
                let form = "must hold user = \"…\" and password = \"…\", or token = \"…\", and hosts = […] unless it is in \
                            the directory of its host";
                // The parser's own words would repeat the line, and with it the password.
                let file: PasswordFile = toml::from_str(text.expose_secret()).map_err(|_| self.wrong(form))?;
                if file.hosts.is_empty() && self.host.is_none() {
                    return Err(unbound(&format!("the credential in {}", self.path.display())));
                }
                if !file.hosts.is_empty() && !file.hosts.iter().any(|pattern| fits(host, pattern)) {
                    return elsewhere();
                }
                match (file.user, file.password, file.token) {
                    (Some(user), Some(password), None) => Ok(Login { user, password }),
                    (None, None, Some(token)) => self.token(token.expose_secret()),
                    _ => Err(self.wrong(form)),
                }
            }
        }
    }

    fn token(&self, text: &str) -> Result<Login, Failure> {
        let token = text.trim();
        if token.is_empty() || token.contains(char::is_whitespace) {
            return Err(self.wrong("must hold one token and nothing else"));
        }
        Ok(Login { user: TOKEN_USER.into(), password: token.into() })
    }

    fn read(&self) -> Result<SecretString, Failure> {
        // Looked at again, and this time at what is really read.
        let open = |path: &Path| -> std::io::Result<(File, Metadata)> {
            let no_follow = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
            let file = OpenOptions::new().read(true).custom_flags(no_follow.bits().cast_signed()).open(path)?;
            let metadata = file.metadata()?;
            Ok((file, metadata))
        };
        let (file, metadata) = open(&self.path).map_err(|error| self.wrong(&format!("cannot be read: {error}")))?;
        check(&metadata).map_err(|why| self.wrong(why))?;
        let mut text = String::new();
        file.take(LARGEST).read_to_string(&mut text).map_err(|_| self.wrong("cannot be read as text"))?;
        Ok(text.into())
    }

    fn wrong(&self, what: &str) -> Failure {
        Failure::new(ErrorClass::Auth, format!("the credential file {} {what}", self.path.display()))
    }
}

impl Login {
    /// The value of an `Authorization` header.
    #[must_use]
    pub fn basic(&self) -> SecretString {
        let plain = format!("{}:{}", self.user.expose_secret(), self.password.expose_secret());
        format!("Basic {}", base64(plain.as_bytes())).into()
    }
}

/// What is wrong with the rights of a credential's file.
fn check(metadata: &Metadata) -> Result<(), &'static str> {
    if !metadata.is_file() {
        Err("is not a regular file")
    } else if metadata.mode() & 0o077 != 0 {
        Err("can be read by others; set its mode to 0600")
    } else if metadata.len() > LARGEST {
        Err("is larger than a credential can be")
    } else {
        Ok(())
    }
}

/// A host as its directory is called.
fn plain(host: &str) -> String {
    host.trim_end_matches('.').to_ascii_lowercase()
}

/// What is wrong with a secret that any task could send anywhere.
fn unbound(what: &str) -> Failure {
    Failure::forbidden(format!(
        "{what} is bound to no host, so that a task could send it anywhere: move its file into a directory named after its \
         host, or use a .toml file with hosts = […]"
    ))
}

fn refused(name: &CredentialName, why: &str) -> Failure {
    Failure::new(ErrorClass::Auth, format!("the credential {name} {why}"))
}

/// Base64 with padding, as Basic authentication wants it.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0_u32, |bits, &byte| bits << 8 | u32::from(byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let sextet = (bits >> (18 - 6 * place) & 0x3f) as usize;
            out.push(if place <= chunk.len() { char::from(ALPHABET[sextet]) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
    };

    use super::*;

    const HTTPS: &str = "https://git.example/x";
    const SSH: &str = "ssh://git.example/x";

    struct Directory(tempfile::TempDir);

    impl Directory {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn write(&self, file: &str, text: &str, mode: u32) -> PathBuf {
            let path = self.0.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        }

        fn find(&self, name: &str, url: &str) -> Result<CredentialFile, Failure> {
            CredentialFile::find(Some(self.0.path()), &CredentialName::new(name).unwrap(), &GitUrl::parse(url).unwrap())
        }
    }

    #[test]
    fn a_token_is_sent_as_the_password_of_the_usual_user() {
        let directory = Directory::new();
        directory.write("git.example/team.token", "canary\n", 0o600);
        let login = directory.find("team", HTTPS).unwrap().login("git.example").unwrap();
        assert_eq!(login.basic().expose_secret(), "Basic eC1hY2Nlc3MtdG9rZW46Y2FuYXJ5");
        assert!(!format!("{login:?}").contains("canary"));
    }

    #[test]
    fn a_password_file_may_be_bound_to_hosts() {
        let directory = Directory::new();
        directory.write("team", "user = \"u\"\npassword = \"canary\"\nhosts = [\"*.git.example\"]\n", 0o600);
        let file = directory.find("team", HTTPS).unwrap();
        assert_eq!(file.login("a.git.example").unwrap().basic().expose_secret(), "Basic dTpjYW5hcnk=");
        assert_eq!(file.login("evil.example").unwrap_err().class, ErrorClass::Forbidden);
    }

    #[test]
    fn a_secret_of_one_host_is_found_for_no_other() {
        let directory = Directory::new();
        directory.write("git.example/team.token", "one", 0o600);
        directory.write("other.example/team.toml", "token = \"two\"", 0o600);
        let header = |url: &str, host| directory.find("team", url).unwrap().login(host).unwrap().basic();
        let encoded = |token: &str| format!("Basic {}", base64(format!("x-access-token:{token}").as_bytes()));
        assert_eq!(header("https://git.example/x", "git.example").expose_secret(), &encoded("one"));
        assert_eq!(header("https://GIT.example.:8443/x", "GIT.example.").expose_secret(), &encoded("one"));
        assert_eq!(header("https://other.example/x", "other.example").expose_secret(), &encoded("two"));
        for url in ["https://evil.example/x", "https://a.git.example/x", "https://git.example.evil/x"] {
            assert_eq!(directory.find("team", url).unwrap_err().class, ErrorClass::Auth, "{url}");
        }
        let found = directory.find("team", HTTPS).unwrap();
        assert_eq!(found.login("evil.example").unwrap_err().class, ErrorClass::Forbidden);
    }

    #[test]
    fn a_secret_that_is_bound_to_no_host_is_sent_to_none() {
        let directory = Directory::new();
        directory.write("a.token", "canary", 0o600);
        directory.write("b.toml", "user = \"u\"\npassword = \"canary\"", 0o600);
        directory.write("c.toml", "token = \"canary\"\nhosts = []", 0o600);
        let failures = ["a", "b", "c"]
            .map(|name| directory.find(name, HTTPS).and_then(|file| file.login("git.example")).map(drop).unwrap_err());
        for failure in failures {
            assert_eq!(failure.class, ErrorClass::Forbidden, "{failure}");
            assert!(failure.message.contains("bound to no host") && !failure.message.contains("canary"), "{failure}");
        }
        directory.write("d.toml", "token = \"x\"\nhosts = [\"*\"]", 0o600);
        assert!(directory.find("d", HTTPS).unwrap().login("any.example").is_ok());
        directory.write("e.key", "x", 0o600);
        assert!(directory.find("e", SSH).is_ok());
    }

    #[test]
    fn a_broken_password_file_is_not_repeated() {
        let directory = Directory::new();
        directory.write("team.toml", "user = \"u\"\npassword = canary\n", 0o600);
        let failure = directory.find("team", HTTPS).unwrap().login("h").unwrap_err();
        assert_eq!(failure.class, ErrorClass::Auth);
        assert!(!failure.message.contains("canary"), "{}", failure.message);
    }

    #[test]
    fn files_that_others_can_read_are_refused() {
        let directory = Directory::new();
        for (file, mode) in [("a.token", 0o640), ("b.toml", 0o604), ("c.key", 0o644)] {
            directory.write(file, "x", mode);
            let url = if file == "c.key" { SSH } else { HTTPS };
            let failure = directory.find(&file[..1], url).unwrap_err();
            assert!(failure.message.contains("0600"), "{}", failure.message);
        }
    }

    #[test]
    fn links_inside_the_directory_are_followed_and_others_refused() {
        let directory = Directory::new();
        let outside = Directory::new();
        let real = directory.write("data", "x", 0o600);
        symlink(&real, directory.0.path().join("in.toml")).unwrap();
        symlink(outside.write("out", "x", 0o600), directory.0.path().join("out.token")).unwrap();
        outside.write("far.token", "x", 0o600);
        symlink(outside.0.path(), directory.0.path().join("git.example")).unwrap();
        assert!(directory.find("in", HTTPS).is_ok());
        assert!(directory.find("out", HTTPS).unwrap_err().message.contains("leads out"));
        assert!(directory.find("far", HTTPS).unwrap_err().message.contains("leads out"));
    }

    #[test]
    fn directories_and_pipes_are_refused() {
        let directory = Directory::new();
        fs::create_dir(directory.0.path().join("a.token")).unwrap();
        assert_eq!(directory.find("a", HTTPS).unwrap_err().class, ErrorClass::Auth);
    }

    #[test]
    fn what_is_missing_is_said_with_what_to_do() {
        let directory = Directory::new();
        directory.write("key-only.key", "x", 0o600);
        directory.write("token-only.token", "x", 0o600);
        for (name, url, part) in
            [("none", HTTPS, "git.credentials_path"), ("key-only", HTTPS, ".token"), ("token-only", SSH, ".key")]
        {
            let failure = directory.find(name, url).unwrap_err();
            assert_eq!(failure.class, ErrorClass::Auth);
            assert!(failure.message.contains(part), "{}", failure.message);
        }
        let url = GitUrl::parse(HTTPS).unwrap();
        let failure = CredentialFile::find(None, &CredentialName::new("x").unwrap(), &url).unwrap_err();
        assert!(failure.message.contains("git.credentials_path"));
    }

    #[test]
    fn base64_pads_like_the_standard() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
