//! What is done in a sandbox before its client has it: the user that clients of E2B count on is
//! made, and what a template runs from its start on is started.

use std::sync::Arc;
use std::time::Duration;

use denizen::Isolation;
use denizen_agent::envd::{self, Instance};
use denizen_api::Code;
use denizen_envd::process as wire;

use super::record::Start;
use super::{Entry, Sandboxes};
use crate::api::{Answer, Refused};
use crate::lease::Lease;

/// The user that commands run as, if no other is named.
pub(crate) const USER: &str = "user";
/// Where its files are.
pub(crate) const HOME: &str = "/home/user";
/// The tag of what runs from the start on.
const TAG: &str = "start";
/// What serves code to be run.
const INTERPRETER: &str = include_str!("interpreter.py");
/// What tells that the interpreter is there. It asks for it as its clients do.
const INTERPRETS: &str =
    "python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 49999), 1)'";
/// How long the first may take to be ready, and how often it is asked.
const PATIENCE: Duration = Duration::from_mins(5);
const ASK: Duration = Duration::from_millis(100);

/// Makes the user `$1`, if there is none, with the first number that is free from 1000 on, and what
/// new homes have in it. With nothing but a shell and what every root has; a root without that keeps
/// the users that it has. Whom `$2` names may use `sudo`, as a member of its group, without a
/// password; where a sandbox has its own, that is found first.
const MAKE_USER: &str = r#"
set -eu
read -r first outside count </proc/self/uid_map
if [ -x /run/denizen/sudo ] && [ ! -e /usr/local/bin/sudo ]; then
    # Where there is no such file, as in a machine, the next in PATH is found.
    ln -sf /run/denizen/sudo /usr/local/bin/sudo || :
fi
for managed in /usr/lib/python3*/EXTERNALLY-MANAGED; do
    # With that, Debian's pip installs nothing beside its packages; in E2B's templates it does.
    [ ! -e "$managed" ] || rm -f "$managed" || :
done
[ "$count" -gt 1 ] || exit 3
(
    [ "$1" = "$2" ] && [ -r /etc/group ] || exit 0
    old= new= found= id=27
    while IFS= read -r line || [ -n "$line" ]; do
        old="$old$line
"
        case $line in
        sudo:*:*:"$1" | sudo:*:*:*",$1" | sudo:*:*:"$1",* | sudo:*:*:*",$1,"*) found=1 ;;
        sudo:*:) line=$line$1 found=1 ;;
        sudo:*) line=$line,$1 found=1 ;;
        *:*:27:*) id=227 ;;
        esac
        new="$new$line
"
    done </etc/group
    [ -n "$found" ] || new="${new}sudo:x:$id:$1
"
    [ "$new" = "$old" ] || printf %s "$new" >/etc/group
    if [ -d /etc/sudoers.d ] && [ ! -e "/etc/sudoers.d/90-$1" ]; then
        echo "$1 ALL=(ALL:ALL) NOPASSWD: ALL" >"/etc/sudoers.d/90-$1"
        chmod 440 "/etc/sudoers.d/90-$1"
    fi
) || :
uid=1000 gid=1000 found=
while IFS=: read -r name _ id rest; do
    [ "$name" = "$1" ] && found=$id
    [ "$id" -ge "$uid" ] && [ "$id" -lt 60000 ] && uid=$((id + 1))
done </etc/passwd
[ -n "$found" ] && exit 0
while IFS=: read -r name _ id rest; do
    [ "$id" -ge "$gid" ] && [ "$id" -lt 60000 ] && gid=$((id + 1))
done </etc/group
shell=/bin/sh
[ -x /bin/bash ] && shell=/bin/bash
echo "$1:x:$uid:$gid::/home/$1:$shell" >>/etc/passwd
echo "$1:x:$gid:" >>/etc/group
if [ -d /home ] && [ ! -e "/home/$1" ] && [ -d /etc/skel ]; then
    cp -R /etc/skel "/home/$1"
else
    mkdir -p "/home/$1"
fi
chown -R "$uid:$gid" "/home/$1"
"#;

/// What the script says where a session has one user only, whatever it is called.
const ALONE: denizen::Exit = denizen::Exit::Code(3);

/// Makes a new session one that clients of E2B know their way in. False if it cannot have their
/// user.
pub(super) async fn prepare(lease: &Lease, isolation: Isolation) -> Answer<bool> {
    if isolation == Isolation::Host {
        // Its users are the host's.
        return Ok(false);
    }
    make_user(lease, USER).await
}

/// Makes a user, if there is none of that name. False if a session has one user only.
pub(super) async fn make_user(lease: &Lease, name: &str) -> Answer<bool> {
    let made = lease.guard.program("/bin/sh").args(["-c", MAKE_USER, "sh", name, USER]);
    let made = made.timeout(PATIENCE).output().await?;
    if made.exit.success() || made.exit == ALONE {
        return Ok(made.exit != ALONE);
    }
    let why = String::from_utf8_lossy(&made.stderr).trim().to_owned();
    let detail = format!("the user {name:?} cannot be made in this template: {why}");
    Err(Refused::new(Code::Failed, detail))
}

/// A request for a command that a shell runs, as the SDKs make it.
pub(super) fn shell(line: &str) -> wire::StartRequest {
    let args = ["-l", "-c", line].map(str::to_owned).to_vec();
    let process = wire::ProcessConfig { cmd: "/bin/bash".to_owned(), args, ..Default::default() };
    wire::StartRequest { process: process.into(), stdin: Some(false), ..Default::default() }
}

/// What became of what a sandbox runs from its start on, since it last began anew.
pub(super) enum Begun {
    Not,
    /// It goes on from before: from an earlier daemon, or from what the sandbox is a copy of.
    Before,
    Now(Arc<envd::Job>),
}

impl Begun {
    /// Whether there is nothing to start. What a template starts may well have come to its end; what
    /// serves code has to be there.
    fn is_as_wanted(&self, start: &Start) -> bool {
        match self {
            Self::Not => false,
            Self::Before => true,
            Self::Now(job) => *start != Start::Interpreter || job.info().ended.is_none(),
        }
    }
}

impl Sandboxes {
    /// Starts what a sandbox runs from its start on, unless that runs, and waits until it is ready.
    pub(super) async fn start(&self, entry: &Arc<Entry>) -> Answer<()> {
        let kept = entry.kept();
        let Some(start) = kept.setup.start else { return Ok(()) };
        // Whoever comes meanwhile waits until it is ready, too.
        let mut begun = entry.begun.lock().await;
        if begun.is_as_wanted(&start) {
            return Ok(());
        }
        let lease = self.leases.take(kept.id, None).await?;
        let mut instance = lease.clone().instance(&axum::http::HeaderMap::new())?;
        let (mut request, ready) = match start {
            Start::Command { line, ready } => (shell(&line), ready),
            Start::Interpreter => {
                // As with E2B: code may install what it needs, and begin in any folder.
                instance.default_user = instance.default_user.map(|_| "root".to_owned());
                let args = ["-c", INTERPRETER].map(str::to_owned).to_vec();
                let process =
                    wire::ProcessConfig { cmd: "python3".to_owned(), args, ..Default::default() };
                let request = wire::StartRequest {
                    process: process.into(),
                    stdin: Some(false),
                    ..Default::default()
                };
                (request, Some(INTERPRETS.to_owned()))
            }
        };
        request.tag = Some(TAG.to_owned());
        let ready = async {
            let job = envd::start_detached(&instance, request, None).await?;
            if let Some(ready) = ready {
                wait(&instance, &ready, &job).await?;
            }
            Answer::Ok(job)
        };
        *begun = tokio::select! {
            job = ready => Begun::Now(job?),
            () = lease.ended() => return Err(Refused::stopped()),
        };
        Ok(())
    }
}

/// Waits until a line succeeds, or what it waits for has ended.
pub(super) async fn wait(instance: &Instance, ready: &str, job: &envd::Job) -> Answer<()> {
    let asked = async {
        loop {
            let is_ready = run(instance, shell(ready), Some(PATIENCE), |_, _| {}).await?.success();
            // One that goes on by itself in the background has ended well.
            if let Some((exit, _)) = job.info().ended
                && !exit.success()
            {
                let detail = format!("the start command has ended: {}", told(exit));
                return Err(Refused::new(Code::Failed, detail));
            }
            if is_ready {
                return Ok(());
            }
            tokio::time::sleep(ASK).await;
        }
    };
    let late = || Refused::new(Code::Failed, format!("not ready after {PATIENCE:?}: {ready}"));
    tokio::time::timeout(PATIENCE, asked).await.map_err(|_| late())?
}

fn told(exit: denizen_agent::Exit) -> String {
    match exit {
        denizen_agent::Exit::Code(code) => format!("exit status {code}"),
        denizen_agent::Exit::Signal(signal) => format!("signal {signal}"),
    }
}

/// Runs a command to its end, which is told; `each` is told what it prints.
pub(super) async fn run(
    instance: &Instance,
    request: wire::StartRequest,
    timeout: Option<Duration>,
    mut each: impl FnMut(&[u8], bool) + Send,
) -> Answer<denizen_agent::Exit> {
    use denizen_envd::process::__buffa::oneof::process_event::{Event, data_event::Output};
    use futures::StreamExt;
    let events = envd::start_foreground(instance, request, timeout).await.map_err(|error| {
        // As E2B's builder words it.
        let code = error.code.as_str();
        let Refused(mut problem, after) = error.into();
        problem.detail = format!("{code}: {}", problem.detail);
        Refused(problem, after)
    })?;
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event?.event {
            Some(Event::Data(data)) => match data.output {
                Some(Output::Stdout(bytes)) => each(&bytes, false),
                Some(Output::Stderr(bytes)) => each(&bytes, true),
                _ => {}
            },
            Some(Event::End(end)) => return Ok(denizen_agent::Exit::Code(end.exit_code)),
            _ => {}
        }
    }
    Err(Refused::new(Code::Failed, "a command's end was not told".to_owned()))
}
