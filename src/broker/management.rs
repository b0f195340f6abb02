//! RabbitMQ's management API: what AMQP itself cannot tell or set.
//!
//! Calls block, so each runs on a thread that may. A redirect is never followed: it would carry the password along.

mod base64;
mod inventory;

use std::{path::Path, sync::Arc, time::Duration};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use ureq::{
    Agent,
    http::{Request, Response, StatusCode},
    tls::{Certificate, ClientCert, PemItem, RootCerts, TlsConfig, parse_pem},
};
use url::Url;

pub use base64::base64;
pub use inventory::{
    BindingView, ConsumerView, DeliveryLimit, ExchangeView, Inventory, Load, NodeView, PermissionView, PolicyView,
    QueueView, Told, TopicPermissionView,
};

use super::{
    BrokerError,
    address::{Address, bracketed},
    settings::BrokerSettings,
    version::Version,
};

/// How long one call may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// Before a question that broke the broker's side down is asked again.
const PAUSES: [Duration; 3] = [Duration::from_millis(100), Duration::from_millis(300), Duration::from_millis(900)];
/// The largest answer that is read: ten thousand queues are about 5 MB.
const LARGEST_ANSWER: u64 = 64 * 1024 * 1024;

/// A client of the management API of one virtual host.
#[derive(Clone)]
pub struct Management {
    agent: Agent,
    base: String,
    user: String,
    password: SecretString,
    vhost: String,
}

impl Management {
    /// A client for the first address of `settings`; without `management_url`, for the API's usual port there.
    ///
    /// # Errors
    /// When an address or a certificate cannot be used. Nothing is called yet.
    pub fn new(settings: &BrokerSettings) -> Result<Self, BrokerError> {
        let first = settings.urls.first().ok_or_else(|| BrokerError::Settings("broker.urls is empty".to_owned()))?;
        let address = Address::parse(first)?;
        let (scheme, port) = if address.tls { ("https", 15671) } else { ("http", 15672) };
        let usual = SecretString::from(format!("{scheme}://{}:{port}", bracketed(&address.host)));
        let text = settings.management_url.as_ref().unwrap_or(&usual);
        let unfit = || BrokerError::Settings("broker.management_url is no http:// or https:// address".to_owned());
        let mut url = Url::parse(text.expose_secret()).map_err(|_| unfit())?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(unfit());
        }
        let decoded = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
        let (user, password) = match url.username() {
            "" => (address.user, address.password),
            user => (decoded(user), SecretString::from(decoded(url.password().unwrap_or_default()))),
        };
        // Fails only for addresses without a host, which the check above has excluded.
        let _ = (url.set_username(""), url.set_password(None));
        let config = Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .tls_config(tls(settings, url.scheme() == "https")?)
            .build();
        Ok(Self {
            agent: config.new_agent(),
            base: url.as_str().trim_end_matches('/').to_owned(),
            user,
            password,
            vhost: address.vhost,
        })
    }

    /// The API's address, without a password; also the console's.
    #[must_use]
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The virtual host.
    #[must_use]
    pub fn vhost(&self) -> &str {
        &self.vhost
    }

    /// The broker's version.
    ///
    /// # Errors
    /// When the API cannot be reached or refuses.
    pub async fn version(&self) -> Result<Option<Version>, BrokerError> {
        let overview = self.get("overview?columns=rabbitmq_version".to_owned()).await?;
        Ok(overview.get("rabbitmq_version").and_then(Value::as_str).and_then(|text| text.parse().ok()))
    }

    /// Everything in the virtual host whose name begins with `prefix` and a dot, or is one of `also`.
    ///
    /// # Errors
    /// When the API cannot be reached, or refuses the basic questions; what only a higher tag may see is
    /// [`Told::No`] instead.
    pub async fn inventory(&self, prefix: &str, also: &[String]) -> Result<Inventory, BrokerError> {
        let vhost = encoded(&self.vhost);
        let dotted = format!("{prefix}.");
        let ours = |name: &str| name.starts_with(&dotted) || also.iter().any(|other| other == name);
        let columns = "name,type,durable,arguments,policy,operator_policy,effective_policy_definition,state";
        let version = self.version().await?;
        let mut queues: Vec<QueueView> = inventory::list(self.get(format!("queues/{vhost}?columns={columns}")).await?);
        queues.retain(|queue| ours(&queue.name));
        let columns = "name,type,durable,internal,arguments";
        let mut exchanges: Vec<ExchangeView> =
            inventory::list(self.get(format!("exchanges/{vhost}?columns={columns}")).await?);
        exchanges.retain(|exchange| ours(&exchange.name));
        let mut bindings: Vec<BindingView> = inventory::list(self.get(format!("bindings/{vhost}")).await?);
        bindings.retain(|binding| ours(&binding.destination) && !binding.source.is_empty());
        let consumers = match self.get(format!("consumers/{vhost}")).await? {
            Value::Array(items) => items.iter().map(ConsumerView::read).filter(|one| ours(&one.queue)).collect(),
            _ => Vec::new(),
        };
        let policies = told(self.get(format!("policies/{vhost}")).await, inventory::list);
        let columns = "name,running,mem_alarm,disk_free_alarm,partitions";
        let nodes = told(self.get(format!("nodes?columns={columns}")).await, inventory::list);
        let permissions = told(self.get(format!("vhosts/{vhost}/permissions")).await, inventory::list);
        let topic_permissions = told(self.get(format!("vhosts/{vhost}/topic-permissions")).await, inventory::list);
        Ok(Inventory {
            version,
            exchanges,
            queues,
            bindings,
            consumers,
            policies,
            nodes,
            permissions,
            topic_permissions,
        })
    }

    /// One queue, or nothing where there is none.
    ///
    /// # Errors
    /// When the API cannot be reached or refuses.
    pub async fn queue(&self, name: &str) -> Result<Option<QueueView>, BrokerError> {
        let path = format!("queues/{}/{}", encoded(&self.vhost), encoded(name));
        Ok(self.call("GET", path, None).await?.and_then(|value| serde_json::from_value(value).ok()))
    }

    /// How many messages a queue has, in hands too; nothing where there is no such queue, or no statistics of it yet. They
    /// follow a change some seconds later.
    ///
    /// # Errors
    /// When the API cannot be reached or refuses.
    pub async fn load(&self, name: &str) -> Result<Option<Load>, BrokerError> {
        let path = format!("queues/{}/{}", encoded(&self.vhost), encoded(name));
        Ok(self.call("GET", path, None).await?.and_then(|value| serde_json::from_value(value).ok()))
    }

    /// Who consumes a queue; nothing where there is none, or where the statistics do not know it yet.
    ///
    /// # Errors
    /// When the API cannot be reached or refuses.
    pub async fn consumers(&self, queue: &str) -> Result<Option<Vec<ConsumerView>>, BrokerError> {
        let path = format!("queues/{}/{}?columns=consumer_details", encoded(&self.vhost), encoded(queue));
        let told = self.call("GET", path, None).await?;
        let details = told.as_ref().and_then(|told| told.get("consumer_details")).and_then(Value::as_array);
        Ok(details.map(|details| details.iter().map(ConsumerView::read).collect()))
    }

    /// Sets a policy, replacing one of its name.
    ///
    /// # Errors
    /// When the API cannot be reached or refuses.
    pub async fn set_policy(&self, policy: &PolicyView) -> Result<(), BrokerError> {
        let path = format!("policies/{}/{}", encoded(&self.vhost), encoded(&policy.name));
        let body = json!({
            "pattern": policy.pattern,
            "definition": policy.definition,
            "priority": policy.priority,
            "apply-to": policy.apply_to,
        });
        self.call("PUT", path, Some(body)).await.map(drop)
    }

    async fn get(&self, path: String) -> Result<Value, BrokerError> {
        let what = path.clone();
        self.call("GET", path, None).await?.ok_or_else(|| BrokerError::Refused {
            what: format!("{}/api/{what}", self.base),
            reason: "there is no such thing".to_owned(),
        })
    }

    /// Calls the API on a thread that may block; nothing for a 404.
    async fn call(
        &self,
        method: &'static str,
        path: String,
        body: Option<Value>,
    ) -> Result<Option<Value>, BrokerError> {
        let client = self.clone();
        let task = tokio::task::spawn_blocking(move || client.call_blocking(method, &path, body));
        task.await.unwrap_or_else(|error| Err(self.unreachable(error.to_string())))
    }

    fn call_blocking(&self, method: &str, path: &str, body: Option<Value>) -> Result<Option<Value>, BrokerError> {
        let address = format!("{}/api/{path}", self.base);
        let mut pauses = PAUSES.into_iter();
        let (status, bytes) = loop {
            let (status, bytes) = self.ask(method, &address, body.as_ref())?;
            // It counts queues while others delete them, and breaks down over one that is gone.
            match pauses.next().filter(|_| method == "GET" && status.is_server_error()) {
                Some(pause) => std::thread::sleep(pause),
                None => break (status, bytes),
            }
        };
        match status {
            StatusCode::NOT_FOUND => Ok(None),
            status if status.is_success() => Ok(Some(serde_json::from_slice(&bytes).unwrap_or(Value::Null))),
            status => Err(BrokerError::Refused { what: address, reason: reason(status, &bytes, &self.user) }),
        }
    }

    /// One question, and what is answered.
    fn ask(&self, method: &str, address: &str, body: Option<&Value>) -> Result<(StatusCode, Vec<u8>), BrokerError> {
        let request = Request::builder()
            .method(method)
            .uri(address)
            .header("authorization", basic(&self.user, &self.password))
            .header("content-type", "application/json")
            .body(body.map(Value::to_string).unwrap_or_default())
            .map_err(|error| BrokerError::Settings(format!("broker.management_url cannot be used: {error}")))?;
        let mut response: Response<ureq::Body> =
            self.agent.run(request).map_err(|error| self.unreachable(error.to_string()))?;
        let bytes = response
            .body_mut()
            .with_config()
            .limit(LARGEST_ANSWER)
            .read_to_vec()
            .map_err(|error| self.unreachable(error.to_string()))?;
        Ok((response.status(), bytes))
    }

    fn unreachable(&self, reason: String) -> BrokerError {
        BrokerError::Unreachable { address: self.base.clone(), reason }
    }
}

/// Turns a refusal into a [`Told::No`].
fn told<T>(answer: Result<Value, BrokerError>, read: impl FnOnce(Value) -> T) -> Told<T> {
    match answer {
        Ok(value) => Told::Yes(read(value)),
        Err(error) => Told::No(error.to_string()),
    }
}

fn reason(status: StatusCode, body: &[u8], user: &str) -> String {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            format!("user {user:?} is unknown, has another password, or lacks the tag for it ({status})")
        }
        _ => {
            let value: Option<Value> = serde_json::from_slice(body).ok();
            let said = value.as_ref().and_then(|value| value.get("reason")).and_then(Value::as_str).unwrap_or_default();
            format!("{status} {}", said.split_whitespace().collect::<Vec<_>>().join(" ")).trim_end().to_owned()
        }
    }
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// HTTP basic authorisation.
fn basic(user: &str, password: &SecretString) -> String {
    format!("Basic {}", base64(format!("{user}:{}", password.expose_secret()).as_bytes()))
}

/// The trust and the client certificate of `settings`; read only where the address needs them.
fn tls(settings: &BrokerSettings, needed: bool) -> Result<TlsConfig, BrokerError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = TlsConfig::builder().unversioned_rustls_crypto_provider(provider);
    if !needed {
        return Ok(builder.build());
    }
    let roots = match &settings.ca_file {
        Some(path) => certificates(path)?,
        None => rustls_native_certs::load_native_certs()
            .certs
            .iter()
            .map(|certificate| Certificate::from_der(certificate).to_owned())
            .collect(),
    };
    let client = match (&settings.cert_file, &settings.key_file) {
        (Some(chain), Some(key)) => {
            let key = pem(key)?.into_iter().find_map(|item| match item {
                PemItem::PrivateKey(key) => Some(key),
                _ => None,
            });
            let key = key.ok_or_else(|| BrokerError::Settings("broker.key_file holds no private key".to_owned()))?;
            Some(ClientCert::new_with_certs(&certificates(chain)?, key))
        }
        _ => None,
    };
    Ok(builder.root_certs(RootCerts::Specific(Arc::new(roots))).client_cert(client).build())
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>, BrokerError> {
    let items = pem(path)?.into_iter().filter_map(|item| match item {
        PemItem::Certificate(certificate) => Some(certificate),
        _ => None,
    });
    Ok(items.collect())
}

fn pem(path: &Path) -> Result<Vec<PemItem<'static>>, BrokerError> {
    let unfit = |reason: String| BrokerError::Settings(format!("cannot use {}: {reason}", path.display()));
    let text = std::fs::read(path).map_err(|error| unfit(error.to_string()))?;
    parse_pem(&text).collect::<Result<_, _>>().map_err(|error| unfit(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str, management: Option<&str>) -> BrokerSettings {
        BrokerSettings {
            urls: vec![SecretString::from(url)],
            management_url: management.map(SecretString::from),
            ..BrokerSettings::default()
        }
    }

    #[tokio::test]
    async fn a_question_that_breaks_the_broker_s_side_down_is_asked_again_and_an_order_is_not() {
        use std::io::{BufRead as _, BufReader, Write as _};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().map_while(Result::ok).enumerate() {
                let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
                assert!(lines.any(|line| line.is_empty()));
                let (status, body) = if number == 2 { ("200 OK", "[7]") } else { ("500 Internal Server Error", "") };
                let answer =
                    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
                let _ = (&stream).write_all(answer.as_bytes());
            }
        });
        let management = Management::new(&settings("amqp://h", Some(&url))).unwrap();
        assert_eq!(management.get("queues".to_owned()).await.unwrap(), json!([7]));
        let refused = management.call("PUT", "queues/q".to_owned(), None).await.unwrap_err();
        assert!(refused.to_string().contains("500"), "{refused}");
    }

    #[test]
    fn the_usual_port_is_guessed_from_the_broker_s_address() {
        let plain = Management::new(&settings("amqp://u:p@mq:5672/v", None)).unwrap();
        assert_eq!((plain.base(), plain.vhost()), ("http://mq:15672", "v"));
        let secure = Management::new(&settings("amqps://u:p@[::1]/", None)).unwrap();
        assert_eq!((secure.base(), secure.vhost()), ("https://[::1]:15671", "/"));
    }

    #[test]
    fn an_address_of_its_own_wins_and_hides_its_password() {
        let own = Management::new(&settings("amqp://u:p@mq/", Some("https://ad%40min:s%2Fecret@console:443/rabbit/")));
        let own = own.unwrap();
        assert_eq!(own.base(), "https://console/rabbit");
        assert_eq!((own.user.as_str(), own.password.expose_secret()), ("ad@min", "s/ecret"));
        let bad = Management::new(&settings("amqp://mq/", Some("ftp://hunter2@h"))).map(drop).unwrap_err();
        assert!(!bad.to_string().contains("hunter2"));
    }

    #[test]
    fn basic_authorisation_is_base64() {
        for (user, password, text) in [
            ("guest", "guest", "Basic Z3Vlc3Q6Z3Vlc3Q="),
            ("a", "b", "Basic YTpi"),
            ("a", "bc", "Basic YTpiYw=="),
            ("Aladdin", "open sesame", "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
        ] {
            assert_eq!(basic(user, &SecretString::from(password)), text);
        }
    }
}
