//! `denizen image`: root file systems for sessions. The daemon does the work; this shows how
//! far it is.

use std::path::PathBuf;

use bytes::Bytes;
use clap::Subcommand;
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};

use crate::client::{Client, Lines};
use crate::progress::Bar;
use crate::{Failure, Result, show};

#[derive(Subcommand)]
pub enum Verb {
    /// Bring an image from a registry
    Pull {
        /// As in `debian:12` or `registry.example.org/team/image@sha256:…`
        reference: String,
        /// As whom; the password is read from standard input
        #[arg(long)]
        user: Option<String>,
        /// A file with certificates (PEM) to trust besides the system's
        #[arg(long, value_name = "FILE")]
        certificate: Vec<PathBuf>,
    },
    /// Bring an image from an OCI layout (a folder or an archive) or from `docker save`
    Import {
        /// The folder or file
        path: PathBuf,
        /// The name it gets
        #[arg(long)]
        name: Option<String>,
        /// Which one, if there are several
        #[arg(long = "which", id = "which", value_name = "IMAGE")]
        image: Option<String>,
    },
    /// List images
    Ls,
    /// Remove images; layers that sessions need stay until those are gone
    Rm {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// Runs the verb.
pub async fn run(client: &Client, verb: Verb, json: bool) -> Result<()> {
    match verb {
        Verb::Ls => show::images(&show::value(client.images().await?)?, json),
        Verb::Rm { names } => {
            for name in names {
                client.remove_image(&name).await?;
            }
            Ok(())
        }
        Verb::Pull { reference, user, certificate } => {
            let password = user.is_some().then(read_password).transpose()?;
            let certificates = certificate.iter().map(|path| absolute(path));
            let certificates = certificates.collect::<Result<Vec<_>>>()?;
            let bring = json!({ "pull": {
                "reference": reference, "user": user, "password": password,
                "certificates": certificates,
            }});
            bring_image(client, &bring, json).await
        }
        Verb::Import { path, name, image } => {
            let path = absolute(&path)?;
            let bring = json!({ "import": { "path": path, "name": name, "image": image } });
            bring_image(client, &bring, json).await
        }
    }
}

/// The daemon stands elsewhere.
fn absolute(path: &std::path::Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

fn read_password() -> Result<String> {
    let mut line = String::new();
    let read = std::io::stdin().read_line(&mut line);
    read.map_err(|error| Failure::new(format!("cannot read the password: {error}")))?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

async fn bring_image(client: &Client, bring: &Value, json: bool) -> Result<()> {
    let body = Full::new(Bytes::from(bring.to_string())).map_err(|never| match never {}).boxed();
    let response = client
        .request("POST", "/v1/images", Some(("content-type", "application/json")), body)
        .await?;
    let mut lines = Lines::new(response);
    let mut bar = Bar::default();
    while let Some(line) = lines.next().await? {
        let step: Value =
            serde_json::from_str(&line).map_err(|error| Failure::new(error.to_string()))?;
        if let Some(error) = step.get("error") {
            bar.clear();
            return Err(Failure::new(error["detail"].as_str().unwrap_or_default()));
        }
        if let Some(image) = step.get("image") {
            bar.clear();
            return show::images(&json!([image]), json);
        }
        bar.show(|| said(&step));
    }
    Err(Failure::new("the daemon has gone before the image was there"))
}

/// How far a step is, in words.
fn said(step: &Value) -> String {
    let mebibytes = |name: &str| step[name].as_u64().unwrap_or(0) / (1 << 20);
    format!(
        "layer {} of {}: {} {} of {} MiB",
        step["layer"].as_u64().unwrap_or(0) + 1,
        step["layers"],
        step["stage"].as_str().unwrap_or_default(),
        mebibytes("bytes"),
        mebibytes("total"),
    )
}
