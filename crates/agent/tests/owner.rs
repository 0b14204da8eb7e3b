//! An owner that is killed takes all its processes with it.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use common::{is_alive, until_gone};

#[tokio::test]
async fn kill_9_of_the_owner_kills_everything() {
    // Cargo puts examples beside the folder of the tests.
    let here = std::env::current_exe().unwrap();
    let owner = here.parent().unwrap().parent().unwrap().join("examples/owner");
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("script");
    let text = "env -i setsid sh -c '(exec sleep 1000) & (trap \"\" TERM HUP; while :; do sleep 1; done) &'\n\
                setsid sleep 1000 &\n\
                sleep 1000 | sleep 1000 &\n\
                echo running\n\
                exec sleep 1000\n";
    std::fs::write(&script, text).unwrap();
    let mut owner = Command::new(owner).arg(&script).stdout(Stdio::piped()).spawn().unwrap();
    let mut pids = BTreeSet::new();
    for line in BufReader::new(owner.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if line == "ready" {
            break;
        }
        // Parents too: one of them is init.
        pids.extend(line.split(' ').map(|pid| pid.parse::<u32>().unwrap()));
    }
    assert!(pids.len() >= 6, "{pids:?}");
    assert!(pids.iter().any(|pid| is_alive(*pid)));
    owner.kill().unwrap();
    owner.wait().unwrap();
    for pid in pids {
        until_gone(pid).await;
    }
}
