//! `denizen doctor`: what this machine offers, what is wrong, and how to mend it. It changes
//! nothing but a probe file that it removes.

use std::path::Path;

use serde_json::json;

use crate::Result;
use crate::config::Settings;

struct Finding {
    name: &'static str,
    ok: bool,
    what: String,
}

/// Prints the findings; exit code 1 if one of them keeps denizen from working.
pub async fn run(settings: &Settings, as_json: bool) -> Result<i32> {
    let findings = vec![
        configuration(settings),
        shell(settings),
        file_system(&settings.pool.volume_root),
        socket(&settings.socket),
        daemon(settings).await,
        command().await,
    ];
    if as_json {
        let all: Vec<_> = findings
            .iter()
            .map(|finding| json!({"check": finding.name, "ok": finding.ok, "what": finding.what}))
            .collect();
        println!("{:#}", serde_json::Value::from(all));
    } else {
        for finding in &findings {
            let mark = if finding.ok { "ok  " } else { "FAIL" };
            println!("{mark}  {:<14}{}", finding.name, finding.what);
        }
    }
    Ok(i32::from(!findings.iter().all(|finding| finding.ok)))
}

fn finding(name: &'static str, result: std::result::Result<String, String>) -> Finding {
    match result {
        Ok(what) => Finding { name, ok: true, what },
        Err(what) => Finding { name, ok: false, what },
    }
}

fn configuration(settings: &Settings) -> Finding {
    let result = settings.pool.validate();
    let fine = || format!("sessions in {}", settings.pool.volume_root.display());
    finding("configuration", result.map(|()| fine()).map_err(|error| error.to_string()))
}

fn shell(settings: &Settings) -> Finding {
    let shell = &settings.pool.shell;
    finding(
        "shell",
        match rustix::fs::access(shell, rustix::fs::Access::EXEC_OK) {
            Ok(()) => Ok(shell.display().to_string()),
            Err(error) => Err(format!("{}: {error}; set `shell`", shell.display())),
        },
    )
}

fn file_system(root: &Path) -> Finding {
    finding(
        "disk",
        match rustix::fs::statvfs(root) {
            Ok(stat) => {
                let free = stat.f_bavail.saturating_mul(stat.f_frsize) / (1 << 20);
                if free < 64 {
                    Err(format!("only {free} MiB free below {}: make room", root.display()))
                } else {
                    Ok(format!("{free} MiB free below {}", root.display()))
                }
            }
            Err(error) => Err(format!("{}: {error}", root.display())),
        },
    )
}

fn socket(socket: &Path) -> Finding {
    // sun_path of unix(7) has 108 bytes, the last of them zero.
    let length = socket.as_os_str().len();
    finding(
        "socket",
        if length < 108 {
            Ok(socket.display().to_string())
        } else {
            Err(format!(
                "{} is {length} bytes long, the kernel takes 107: set --socket",
                socket.display()
            ))
        },
    )
}

async fn daemon(settings: &Settings) -> Finding {
    let answers = tokio::net::UnixStream::connect(&settings.socket).await.is_ok();
    let what = if answers { "answers" } else { "does not run; the first command starts it" };
    finding("daemon", Ok(what.to_owned()))
}

/// Runs a command the way sessions do, in a pool of its own that is removed again.
async fn command() -> Finding {
    let attempt = async {
        let folder = std::env::temp_dir().join(format!("denizen-doctor-{}", std::process::id()));
        let config = denizen::VmPoolConfig {
            enabled: true,
            volume_root: folder.clone(),
            shell: "/bin/sh".into(),
            shell_args: vec!["-c".to_owned()],
            ..denizen::VmPoolConfig::default()
        };
        let result = async {
            let pool = denizen::MicroVmManager::new((&config).into())?;
            let name: denizen::SessionName = "doctor".parse()?;
            let session = pool.find_or_name(&name).await?;
            let guard = pool.acquire(session).await?;
            let output = guard.command("echo works").output().await?;
            drop(guard);
            pool.shutdown().await?;
            Ok::<_, denizen::Error>(output.stdout)
        }
        .await;
        let _ = std::fs::remove_dir_all(&folder);
        result
    };
    finding(
        "command",
        match attempt.await {
            Ok(stdout) if stdout == b"works\n" => Ok("isolation host: works".to_owned()),
            Ok(stdout) => Err(format!("unexpected output {stdout:?}")),
            Err(error) => Err(error.to_string()),
        },
    )
}
