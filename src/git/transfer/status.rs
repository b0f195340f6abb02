//! What an HTTP status means for a task.

use std::time::Duration;

use jiff::{Timestamp, fmt::rfc2822};

use crate::failure::{ErrorClass, Failure};

/// The longest wish of an upstream that is honoured.
const LONGEST_WAIT: Duration = Duration::from_hours(24);

/// The failure that a response other than 200 stands for.
///
/// `location` is only told, never followed: a redirect may lead anywhere, and the credential is for this host.
pub(super) fn failure(
    host: &str,
    status: u16,
    authorised: bool,
    retry_after: Option<Duration>,
    redirected: bool,
) -> Option<Failure> {
    let class = match status {
        200 => return None,
        401 | 407 => ErrorClass::Auth,
        403 => ErrorClass::Forbidden,
        404 | 410 => ErrorClass::NotFound,
        429 => ErrorClass::Throttled,
        // Some services throttle this way; with a wish it is one.
        503 if retry_after.is_some() => ErrorClass::Throttled,
        500..=599 | 408 | 425 => ErrorClass::Network,
        _ => ErrorClass::Invalid,
    };
    let what = match class {
        ErrorClass::Auth if authorised => "it refused the credential".to_owned(),
        ErrorClass::Auth => "it asks for a credential, and the task names none".to_owned(),
        ErrorClass::Forbidden => "it forbids access to this repository".to_owned(),
        ErrorClass::NotFound => "no such repository, or none that this credential may see".to_owned(),
        ErrorClass::Throttled => "it asks us to slow down".to_owned(),
        ErrorClass::Network => "it is in trouble".to_owned(),
        _ if redirected => "it redirects, which is not followed; use the address it redirects to".to_owned(),
        _ => "that is no answer of a git server".to_owned(),
    };
    let mut failure = Failure::new(class, format!("{host} answered {status}: {what}"));
    if class == ErrorClass::Throttled || class == ErrorClass::Network {
        failure.retry_after = retry_after.map(|wait| wait.min(LONGEST_WAIT));
    }
    // A gateway that tells of the host behind it; a 500 may be the matter of one repository.
    failure.unreachable = class == ErrorClass::Network && matches!(status, 502..=504);
    Some(failure)
}

/// Reads a `Retry-After`: seconds, or a date.
pub(super) fn retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let at = rfc2822::parse(value).ok()?.timestamp();
    // A date that has passed asks for no wait at all.
    Some(Duration::try_from(at.duration_since(now)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_status_has_its_class() {
        for (status, class) in [
            (401, ErrorClass::Auth),
            (403, ErrorClass::Forbidden),
            (404, ErrorClass::NotFound),
            (410, ErrorClass::NotFound),
            (429, ErrorClass::Throttled),
            (500, ErrorClass::Network),
            (502, ErrorClass::Network),
            (503, ErrorClass::Network),
            (301, ErrorClass::Invalid),
            (302, ErrorClass::Invalid),
            (307, ErrorClass::Invalid),
            (204, ErrorClass::Invalid),
            (418, ErrorClass::Invalid),
        ] {
            assert_eq!(failure("h", status, false, None, false).unwrap().class, class, "{status}");
        }
        assert!(failure("h", 200, false, None, false).is_none());
        let unreachable = |status| failure("h", status, false, None, false).unwrap().unreachable;
        assert_eq!([500, 502, 503, 504, 429, 404].map(unreachable), [false, true, true, true, false, false]);
    }

    #[test]
    fn an_upstreams_wish_travels_with_the_failure() {
        let wait = Some(Duration::from_secs(7));
        assert_eq!(failure("h", 429, true, wait, false).unwrap().retry_after, wait);
        let unavailable = failure("h", 503, true, wait, false).unwrap();
        assert_eq!((unavailable.class, unavailable.retry_after), (ErrorClass::Throttled, wait));
        assert_eq!(failure("h", 429, true, Some(Duration::MAX), false).unwrap().retry_after, Some(LONGEST_WAIT));
    }

    #[test]
    fn a_wish_is_read_as_seconds_or_as_a_date() {
        let now: Timestamp = "1994-11-06T08:49:07Z".parse().unwrap();
        for (value, wait) in [
            ("120", Some(120)),
            (" 0 ", Some(0)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(30)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("-5", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(retry_after(value, now), wait.map(Duration::from_secs), "{value}");
        }
    }
}
