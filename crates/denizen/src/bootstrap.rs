//! What is run once in a new volume before anybody gets to use it.
//!
//! It is the operator's command, not an agent's, so under `host` isolation it has this process's
//! environment and what the pool's configuration adds; what runs apart from the host has nothing
//! of the host's. It must never be run twice for one volume: the caller sees
//! to that.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::{OsStr, OsString};

use denizen_agent::{Agent, Exit, Spec, Stdio};

use crate::config::VmPoolRuntimeConfig;
use crate::error::{Error, Result};
use crate::isolation::{Instance, Isolation};
use crate::pool::Place;

/// How much of a failed command's output an error keeps, in bytes.
const TAIL: usize = 4096;

/// Runs the bootstrap command and builds the Nix profile, if the pool has them, in an instance
/// of the new session, and ends the instance.
///
/// Not cancel-safe: dropped, it ends what it runs and leaves the volume as it is then.
pub(crate) async fn run(
    config: &VmPoolRuntimeConfig,
    isolation: Isolation,
    instance: Instance,
    place: &Place,
) -> Result<()> {
    let Instance { agent, .. } = &instance;
    let mut env: BTreeMap<OsString, OsString> = match isolation {
        Isolation::Host => std::env::vars_os().collect(),
        Isolation::Sandbox | Isolation::MicroVm => {
            place.environment().into_iter().map(into_os).collect()
        }
    };
    env.extend(instance.env.clone().into_iter().map(into_os));
    env.extend(config.env.clone().into_iter().map(into_os));
    if let Some(command) = &config.bootstrap_command {
        one(&env, agent, place, command).await?;
    }
    if let Some(profile) = &config.nix_profile {
        let command = ["nix", "develop", profile, "--command", "true"].map(str::to_owned);
        one(&env, agent, place, &command).await?;
    }
    // Whatever it left running would belong to nobody's use of the session.
    Ok(agent.shutdown(std::time::Duration::ZERO).await?)
}

/// Whether there is anything to be run.
pub(crate) fn is_wanted(config: &VmPoolRuntimeConfig) -> bool {
    config.bootstrap_command.is_some() || config.nix_profile.is_some()
}

fn into_os((name, value): (String, String)) -> (OsString, OsString) {
    (name.into(), value.into())
}

async fn one(
    env: &BTreeMap<OsString, OsString>,
    agent: &Agent,
    place: &Place,
    command: &[String],
) -> Result<()> {
    let Some((program, args)) = command.split_first() else { return Ok(()) };
    let failed = |problem: String, output: &VecDeque<u8>| Error::Bootstrap {
        session: place.site.id,
        command: command.join(" "),
        problem,
        output: String::from_utf8_lossy(&output.iter().copied().collect::<Vec<u8>>()).into_owned(),
    };
    let spec = Spec {
        program: OsStr::new(program).to_owned(),
        args: args.iter().map(OsString::from).collect(),
        env: env.clone(),
        user: None,
        cwd: place.workdir.clone(),
        stdio: Stdio::Pipes { stdin: false },
    };
    let mut tail = VecDeque::new();
    let mut child = match agent.spawn(spec).await {
        Ok(child) => child,
        Err(error) => return Err(failed(error.to_string(), &tail)),
    };
    if let Some(mut output) = child.take_output() {
        while let Some(chunk) = output.next().await? {
            tail.extend(chunk.bytes.iter().copied());
            tail.drain(..tail.len().saturating_sub(TAIL));
        }
    }
    let exit = child.wait().await?;
    match exit {
        Exit::Code(0) => Ok(()),
        Exit::Code(code) => Err(failed(format!("exited with status {code}"), &tail)),
        Exit::Signal(signal) => Err(failed(format!("was ended by signal {signal}"), &tail)),
    }
}
