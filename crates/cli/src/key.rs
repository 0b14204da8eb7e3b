//! `denizen key`: through the daemon if one answers. Where none does, by the file itself: a daemon
//! that is to be reached from elsewhere does not start before there is a key.

use clap::{Subcommand, ValueEnum};
use denizen_client::api::{Keys, MadeKey, NewKey, Scope};
use denizen_server::KeyInfo;
use jiff::{Span, SpanRelativeTo, Unit};

use crate::client;
use crate::config::Settings;
use crate::{Failure, Result, show};

#[derive(Subcommand)]
pub enum Verb {
    /// Make a key, and print it: it is not told again
    #[command(after_help = "Examples:
  denizen key create ci --sessions ci- --expires 30d
  denizen key create grafana --scope read")]
    Create {
        /// What it is for
        name: String,
        /// What it allows
        #[arg(long, value_enum, default_value_t = Allows::Operate)]
        scope: Allows,
        /// Only for sessions whose names begin with this
        #[arg(long, value_name = "PREFIX")]
        sessions: Option<String>,
        /// How long it is good: `30d`, `12 hours` [default: until it is revoked]
        #[arg(long, value_name = "TIME", value_parser = seconds)]
        expires: Option<u64>,
    },
    /// List keys
    Ls,
    /// Revoke keys: what is being done with them ends
    Revoke {
        /// What `key ls` shows as their ids
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

/// The scopes, as they are written on a command line.
#[derive(ValueEnum, Clone, Copy)]
pub enum Allows {
    /// To see sessions and what happens, but not their files
    Read,
    /// To use sessions too
    Operate,
    /// All
    Admin,
}

impl From<Allows> for Scope {
    fn from(allows: Allows) -> Self {
        match allows {
            Allows::Read => Self::Read,
            Allows::Operate => Self::Operate,
            Allows::Admin => Self::Admin,
        }
    }
}

fn seconds(text: &str) -> std::result::Result<u64, String> {
    let span: Span =
        text.parse().map_err(|_| "no length of time (`30d`, `12 hours`)".to_owned())?;
    let total = span.total((Unit::Second, SpanRelativeTo::days_are_24_hours()));
    let total = total.map_err(|error| error.to_string())?;
    if !(1.0..1e10).contains(&total) {
        return Err("too short or too long a time".to_owned());
    }
    // Whole and in range, as was just seen to.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    Ok(total as u64)
}

/// Does what is asked of the keys.
pub async fn run(settings: &Settings, verb: Verb, json: bool) -> Result<()> {
    let client = client::answering(settings).await?;
    let here = || {
        let keys = denizen_server::Keys::open(&settings.state);
        keys.map_err(|error| Failure::new(error.to_string()))
    };
    let failed = |error: denizen_server::KeysError| Failure::new(error.to_string());
    match verb {
        Verb::Create { name, scope, sessions, expires } => {
            let scope = Scope::from(scope);
            let new = NewKey { name, scope, sessions, expires_in_seconds: expires };
            let made = if let Some(client) = client {
                client.create_key(&new).await?
            } else {
                let (info, key) = here()?.create(new).map_err(failed)?;
                MadeKey { info: info.told(), key }
            };
            show::made_key(&show::value(&made)?, json)
        }
        Verb::Ls => {
            let all = match client {
                Some(client) => client.keys().await?,
                None => Keys { keys: here()?.list().into_iter().map(KeyInfo::told).collect() },
            };
            show::keys(&show::value(&all)?, json)
        }
        Verb::Revoke { ids } => {
            for id in ids {
                match &client {
                    Some(client) => client.revoke_key(&id).await?,
                    None if here()?.revoke(&id).map_err(failed)? => {}
                    None => return Err(Failure::new(format!("there is no key {id}"))),
                }
            }
            Ok(())
        }
    }
}
