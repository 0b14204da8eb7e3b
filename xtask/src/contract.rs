//! The HTTP API against its own description: schemathesis makes requests of what
//! `/v1/openapi.json` says, such as it allows and such as it does not, sends them to a real daemon,
//! and compares the answers with what is described.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::{is_there, root, run, run_alone};

/// Another version finds other things: it is raised on purpose.
const VERSION: &str = "4.32.5";

/// Seconds that are spent on making requests, and after which it is ended whatever it does.
const TIME: [&str; 2] = ["60", "90"];

/// What is compared.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,\
                      response_headers_conformance,response_schema_conformance";

/// What is not asked, and why.
const LEFT_OUT: [(&str, &str); 4] = [
    // It ends the daemon.
    ("path", "/v1/shutdown"),
    // Its answer has no end.
    ("path", "/v1/events"),
    // It would ask the registries that it makes up, which are somebody else's.
    ("operation-id", "bring"),
    // What is answered there is a session's own.
    ("path", "/v1/sessions/{session}/ports/{port}/{rest}"),
];

/// A session and a file in it, so that requests are about something; and no key that there is,
/// for the one that it asks with would be revoked. All else is made up.
const SETTINGS: &str = r#"
[parameters]
"path.session" = "demo"
"path.path" = "volume/file"
"path.id" = "000000000000"
"#;

/// Content that it has no way to write or read by itself: bytes, as they are.
const BYTES: &str = r#"
import schemathesis

TYPES = ("application/zstd", "application/x-tar", "application/octet-stream")

@schemathesis.serializer(*TYPES)
def write(context, value):
    return value if isinstance(value, bytes) else str(getattr(value, "data", value)).encode()

@schemathesis.deserializer(*TYPES)
def read(context, response):
    return ""
"#;

/// Installs schemathesis if need be, and has it ask a daemon of its own.
pub fn check() -> Result<(), String> {
    let program = install()?;
    let folder = root().join("target/contract");
    let _ = std::fs::remove_dir_all(&folder);
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    std::fs::create_dir_all(&folder).map_err(failed)?;
    let settings = folder.join("schemathesis.toml");
    std::fs::write(&settings, SETTINGS).map_err(failed)?;
    let hooks = folder.join("bytes.py");
    std::fs::write(&hooks, BYTES).map_err(failed)?;
    let daemon = Daemon::start(&folder)?;
    let key = daemon.denizen(&["key", "create", "contract", "--scope", "admin"])?;
    daemon.denizen(&["exec", "demo", "--", "sh", "-c", "echo content > file"])?;
    let url = format!("http://{}/v1/openapi.json", daemon.address);
    let authorization = format!("Authorization: Bearer {}", key.trim());
    let [time, most] = TIME;
    let mut asks = Command::new("timeout");
    asks.arg(most).arg(program).env("SCHEMATHESIS_HOOKS", &hooks);
    asks.args(["--config-file", &settings.to_string_lossy(), "run", &url]);
    asks.args(["--header", &authorization, "--checks", CHECKS, "--mode", "all"]);
    asks.args(["--phases", "coverage,fuzzing", "--max-time", time, "--request-timeout", "20"]);
    asks.args(["--generation-deterministic", "--no-color", "--continue-on-failure"]);
    for (by, what) in LEFT_OUT {
        asks.args([format!("--exclude-{by}"), what.to_owned()]);
    }
    eprintln!("+ schemathesis run {url}");
    let status = asks.current_dir(&folder).status();
    let status = status.map_err(|error| format!("schemathesis: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("the API is not as described: {status}")) }
}

/// Schemathesis in an environment of its own.
fn install() -> Result<PathBuf, String> {
    let folder = root().join("target/schemathesis");
    let program = folder.join("bin/schemathesis");
    let marker = folder.join(format!("{VERSION}.installed"));
    if marker.exists() && run_alone(&program.to_string_lossy(), &["--version"]) {
        return Ok(program);
    }
    // Debian has this part of Python in a package of its own.
    if !run_alone("python3", &["-c", "import ensurepip, venv"]) && is_there("apt-get") {
        run("apt-get", &["update", "-qq"])?;
        run("apt-get", &["install", "-y", "-qq", "--no-install-recommends", "python3-venv"])?;
    }
    run("python3", &["-m", "venv", "--clear", &folder.to_string_lossy()])?;
    let pip = folder.join("bin/pip");
    let wanted = format!("schemathesis=={VERSION}");
    run(&pip.to_string_lossy(), &["install", "--quiet", "--disable-pip-version-check", &wanted])?;
    std::fs::write(&marker, "").map_err(|error| format!("{}: {error}", marker.display()))?;
    Ok(program)
}

/// A daemon with a state folder of its own.
struct Daemon {
    child: Child,
    address: String,
    state: PathBuf,
}

impl Daemon {
    fn start(folder: &Path) -> Result<Self, String> {
        let state = folder.join("state");
        let mut serve = denizen(&state);
        // Room for all sessions that are made: that there is none is no fault.
        serve.args(["--listen", "127.0.0.1:0", "--max-vms", "1000", "serve"]);
        let child = serve.stderr(Stdio::piped()).spawn();
        let mut child = child.map_err(|error| format!("the daemon: {error}"))?;
        let said = child.stderr.take().map(BufReader::new).ok_or("the daemon has no output")?;
        let mut lines = said.lines().map_while(Result::ok);
        let address = lines.find_map(|line| {
            eprintln!("{line}");
            let at = line.strip_prefix("denizen listens on ");
            Some(at.filter(|at| at.starts_with("127."))?.to_owned())
        });
        let mut daemon = Self { child, address: String::new(), state };
        daemon.address = address.ok_or("the daemon ended")?;
        // It is not to wait for somebody who reads what it says.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(daemon)
    }

    /// What a verb prints.
    fn denizen(&self, args: &[&str]) -> Result<String, String> {
        let output = denizen(&self.state).args(args).output().map_err(|error| error.to_string())?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(format!("denizen {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr)))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // One that has ended already says so, and is waited for all the same.
        let _ = self.denizen(&["shutdown"]);
        let _ = self.child.wait();
    }
}

/// The program, with none of the settings of whoever runs this.
fn denizen(state: &Path) -> Command {
    let mut command = Command::new(root().join("target/debug/denizen"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("DENIZEN_") {
            command.env_remove(name);
        }
    }
    command.env("DENIZEN_STATE", state).stdin(Stdio::null());
    command
}
