//! The settings of one conversation: a file in memory, which git's processes inherit and read.
//!
//! The credential is in it, and so neither in an argument nor in an environment nor on a disk.

use std::{fs::File, io::Write as _, net::IpAddr, path::Path};

use rustix::fs::{MemfdFlags, memfd_create};
use secrecy::{ExposeSecret, SecretString};

use super::super::{
    Request,
    address::{self, Route},
    process::Program as Ssh,
};
use crate::{
    failure::{ErrorClass, Failure},
    git::credential::Login,
    protocol::{GitUrl, Scheme},
};

/// The same for every upstream.
///
/// Objects are not judged by `fsck`: old histories hold what it refuses, the other engine takes them, and whatever is
/// checked out is judged then. The limit on slowness is far beyond any stall limit: it ends a process whose agent died.
const FIXED: &[(&str, &[(&str, &str)])] = &[
    ("core", &[("hooksPath", "/dev/null"), ("askPass", "/bin/false")]),
    ("credential", &[("helper", "")]),
    (
        "http",
        &[
            ("followRedirects", "false"),
            ("proxy", ""),
            ("sslVerify", "true"),
            ("emptyAuth", "false"),
            ("lowSpeedLimit", "1"),
            ("lowSpeedTime", "3600"),
        ],
    ),
    ("ssh", &[("variant", "ssh")]),
    ("protocol", &[("version", "2")]),
    ("transfer", &[("unpackLimit", "1"), ("bundleURI", "false"), ("fsckObjects", "false")]),
    (
        "fetch",
        &[
            ("unpackLimit", "1"),
            ("fsckObjects", "false"),
            ("writeCommitGraph", "false"),
            ("recurseSubmodules", "false"),
            ("showForcedUpdates", "false"),
        ],
    ),
    ("pack", &[("writeReverseIndex", "false")]),
    ("gc", &[("auto", "0")]),
    ("maintenance", &[("auto", "false")]),
];

/// Lines of a configuration file.
pub(super) struct Settings(SecretString);

impl Settings {
    /// Those for `url` and nothing else: the checked addresses, the login, trust.
    ///
    /// # Errors
    /// What the policy says of the addresses, and where the credential or a path cannot be used.
    pub(super) fn for_upstream(request: &Request, url: &GitUrl) -> Result<Self, Failure> {
        let mut text = String::new();
        for (section, values) in FIXED {
            put(&mut text, section, values)?;
        }
        match url.scheme() {
            Scheme::Https | Scheme::Http => {
                let route = Route::of(request, url, &address::system)?;
                let login = request.credential.as_ref().map(|file| file.login(url.host())).transpose()?;
                if login.is_some() {
                    route.takes_login(url)?;
                }
                http(&mut text, url, &route, login.as_ref(), request.ca_file.as_deref())?;
            }
            Scheme::Ssh => {
                let address = Route::of(request, url, &address::system)?.for_ssh(url)?;
                let key = request.credential.as_ref().map(|file| file.path.as_path());
                let ssh = Ssh::ssh(url, address, key, request.known_hosts.as_deref())?;
                put(&mut text, "core", &[("sshCommand", &ssh_command(&ssh, address)?)])?;
            }
            Scheme::File => {}
        }
        Ok(Self(text.into()))
    }

    /// A descriptor that children inherit.
    ///
    /// # Errors
    /// When there is no memory or no descriptor left.
    pub(super) fn into_file(self) -> Result<File, Failure> {
        // Not closed when a program starts: this process starts none but git.
        let mut file = File::from(memfd_create("settings", MemfdFlags::empty()).map_err(std::io::Error::from)?);
        file.write_all(self.0.expose_secret().as_bytes())?;
        Ok(file)
    }
}

fn http(
    text: &mut String,
    url: &GitUrl,
    route: &Route<'_>,
    login: Option<&Login>,
    ca_file: Option<&Path>,
) -> Result<(), Failure> {
    match route {
        // What was checked is what is connected to; a literal address stands for itself.
        Route::Direct(addresses) if url.host().parse::<IpAddr>().is_err() => {
            let addresses: Vec<String> = addresses.iter().map(|address| bracketed(address.ip())).collect();
            let pinned = format!("{}:{}:{}", url.host(), url.port(), addresses.join(","));
            put(text, "http", &[("curloptResolve", &pinned)])?;
        }
        Route::Direct(_) => {}
        Route::Proxy(proxy) => put(text, "http", &[("proxy", proxy)])?,
    }
    if let Some(file) = ca_file {
        let unusable = || Failure::internal(format!("git.ca_file {} cannot be given to git", file.display()));
        put(text, "http", &[("sslCAInfo", file.to_str().ok_or_else(unusable)?)])?;
    }
    if let Some(login) = login {
        let host = url.host().parse().map_or_else(|_| url.host().to_owned(), bracketed);
        let scheme = if url.scheme() == Scheme::Http { "http" } else { "https" };
        let section = format!("http \"{scheme}://{host}:{}/\"", url.port());
        let header = format!("Authorization: {}", login.basic().expose_secret());
        put(text, &section, &[("extraHeader", &header)])?;
    }
    Ok(())
}

/// Our own client's arguments as a line of the shell, which git completes with host and command.
fn ssh_command(ssh: &Ssh, address: IpAddr) -> Result<String, Failure> {
    let mut line = "ssh".to_owned();
    let hostname = format!("HostName={address}");
    let options = ssh.options().iter().map(|option| option.to_str());
    for word in options.chain([Some("-o"), Some(hostname.as_str())]) {
        let word = word.ok_or_else(|| Failure::internal("an argument for ssh is not text"))?;
        line.extend([" '", &word.replace('\'', r"'\''"), "'"]);
    }
    Ok(line)
}

fn bracketed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

/// Adds a section; a value is quoted whatever it holds.
fn put(text: &mut String, section: &str, values: &[(&str, &str)]) -> Result<(), Failure> {
    text.extend(["[", section, "]\n"]);
    for (name, value) in values {
        if value.contains(['\n', '\r', '\0']) {
            let message = format!("the value of {section}.{name} holds characters that cannot be given to git");
            return Err(Failure::new(ErrorClass::Auth, message));
        }
        let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
        text.extend(["\t", name, " = \"", &quoted, "\"\n"]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::{policy::Policy, settings::GitSettings};

    fn request(settings: &GitSettings) -> Request {
        Request {
            url: String::new(),
            mirror: "/nowhere".into(),
            want: crate::git::mirror::Want::All,
            apart: None,
            tell: false,
            credential: None,
            policy: Policy::from(settings),
            ca_file: settings.ca_file.clone(),
            proxy: None,
            known_hosts: settings.known_hosts.clone(),
            max_bytes: 1,
            time_left: std::time::Duration::ZERO,
            reserve: 0,
            engine: crate::git::settings::Engine::Git,
        }
    }

    fn text(settings: &GitSettings, url: &str) -> Result<String, Failure> {
        let url = GitUrl::parse(url).unwrap();
        Settings::for_upstream(&request(settings), &url).map(|settings| settings.0.expose_secret().to_owned())
    }

    #[test]
    fn only_checked_addresses_are_connected_to() {
        let here = GitSettings { allow_loopback: true, allow_http: true, ..GitSettings::default() };
        let pinned = text(&here, "http://localhost:8080/x").unwrap();
        assert!(pinned.contains("curloptResolve = \"localhost:8080:"), "{pinned}");
        assert!(!text(&here, "http://127.0.0.1/x").unwrap().contains("curloptResolve"));
        let failure = text(&GitSettings::default(), "https://localhost/x").unwrap_err();
        assert_eq!(failure.class, ErrorClass::Forbidden);
    }

    #[test]
    fn ssh_is_given_the_checked_address_and_our_own_options() {
        let known = GitSettings { known_hosts: Some("/k".into()), ..GitSettings::default() };
        let text = text(&known, "ssh://git@10.1.2.3:2222/x").unwrap();
        let line = text.lines().find(|line| line.contains("sshCommand")).unwrap();
        for part in ["'-F' '/dev/null'", "'HostName=10.1.2.3'", "'StrictHostKeyChecking=yes'", "'-p' '2222'"] {
            assert!(line.contains(part), "{line}");
        }
        assert!(!line.contains("upload-pack") && !line.contains("'--'"), "{line}");
    }

    #[test]
    fn no_value_ends_its_line() {
        let mut text = String::new();
        put(&mut text, "a", &[("b", "c\"d\\e;#f")]).unwrap();
        assert_eq!(text, "[a]\n\tb = \"c\\\"d\\\\e;#f\"\n");
        assert!(put(&mut text, "a", &[("b", "c\n[core]")]).is_err());
    }
}
