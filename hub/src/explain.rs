//! Failures of the hub in words that say what to do.

use hf_hub::api::sync::ApiError;
use serenity_protocol::{Error, Result};

use crate::cache::{HubId, token};

/// The HTTP status behind an error, if it is one.
pub(crate) fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(e) => match **e {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        ApiError::TooManyRetries(e) => status(e),
        _ => None,
    }
}

/// Whether another attempt may succeed: the server's passing troubles and everything below HTTP, but not a full disk.
pub(crate) fn may_pass(error: &ApiError) -> bool {
    match (status(error), error) {
        (Some(code), _) => code == 408 || code == 429 || code >= 500,
        (None, ApiError::IoError(e)) => {
            use std::io::ErrorKind as K;
            !matches!(e.kind(), K::StorageFull | K::QuotaExceeded | K::PermissionDenied | K::ReadOnlyFilesystem | K::NotFound)
        }
        (None, ApiError::RequestError(_)) => true,
        (None, _) => false,
    }
}

/// What `error` on `what` means for the user.
pub(crate) fn explain(id: &HubId, endpoint: &str, what: &str, error: ApiError) -> Error {
    let page = format!("{endpoint}/{id}");
    let has_token = token().is_some();
    let made = match (status(&error), has_token) {
        (Some(401), false) => Error::absent(format!("the hub does not show '{id}' without a token: it is gated, private, or does not exist"))
            .advice(format!("check the name; accept the licence on {page}, make a token in your account's settings, and set HF_TOKEN (or run `hf auth login`)")),
        (Some(401), true) => Error::absent(format!("the hub does not accept the token for '{id}'"))
            .advice("the token may have expired or been mistyped: make a new one in your account's settings and set HF_TOKEN (or run `hf auth login`)"),
        (Some(403), _) => Error::absent(format!("the model '{id}' is gated, and this account has no access yet"))
            .advice(format!("open {page} with the account of the token and accept its licence (a fine-grained token also needs the permission to read gated repositories); access can take a while to be granted")),
        (Some(404), _) => Error::absent(format!("the hub has no {what}")).advice(format!("check the name on {endpoint}")),
        (Some(429), _) => Error::try_again("the hub asks for fewer requests").advice("wait some minutes, or set HF_TOKEN: anonymous access has lower limits"),
        (Some(code), _) if code >= 500 => Error::try_again(format!("the hub has trouble (HTTP {code})")).advice("run the same command again later: what is downloaded is kept"),
        (Some(code), _) => Error::absent(format!("the hub refuses {what} (HTTP {code})")).advice("check the name and HF_ENDPOINT"),
        (None, _) => match &error {
            ApiError::LockAcquisition(_) => Error::absent("another process is downloading this model").advice("wait for it"),
            ApiError::IoError(e) if !may_pass(&error) => {
                return Error::io(format!("cannot store {what}"), "", std::io::Error::new(e.kind(), e.to_string()));
            }
            ApiError::MissingHeader(_) | ApiError::InvalidHeader(_) | ApiError::ParseIntError(_) => {
                Error::absent(format!("the answer for {what} is not that of a model hub")).advice("check HF_ENDPOINT")
            }
            _ => Error::try_again(format!("the connection to the hub failed while fetching {what}"))
                .advice("check the network and HF_ENDPOINT and run the same command again: what is downloaded is kept; HF_HUB_OFFLINE=1 uses the local cache only"),
        },
    };
    made.at(page).cause(error)
}

/// Shorthand for results.
pub(crate) fn explained<T>(result: std::result::Result<T, ApiError>, id: &HubId, endpoint: &str, what: &str) -> Result<T> {
    result.map_err(|e| explain(id, endpoint, what, e))
}
