//! E2B's SDKs, as their registries have them, against a real daemon: `tests/e2b` has the cases, and
//! makes the table of methods in `docs/e2b.md` of what they show.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{is_there, root, run, run_alone};

/// Installs the SDKs if need be, and runs all suites; `--write` has the table written anew.
pub fn check(how: Option<&str>) -> Result<(), String> {
    let write = match how {
        None => &[][..],
        Some("--write") => &["--write"],
        Some(other) => return Err(format!("{other}: only --write is known here")),
    };
    // What charts and tables are made with in the sandboxes, whose root is this machine's.
    crate::install(&[("git", "git"), ("curl", "curl"), ("ip", "iproute2")])?;
    if !run_alone("/usr/bin/python3", &["-c", "import ipykernel, matplotlib, pandas"]) {
        crate::install_packages(&["python3-ipykernel", "python3-matplotlib", "python3-pandas"])?;
    }
    crate::fetch_kernel()?;
    let folder = root().join("target/e2b");
    let python = install_python(&folder)?;
    let modules = install_modules(&folder)?;
    eprintln!("+ tests/e2b/run.py {}", write.join(" "));
    let status = Command::new(python)
        .arg("-B")
        .arg(root().join("tests/e2b/run.py"))
        .args(write)
        .env("DENIZEN_PROGRAM", root().join("target/debug/denizen"))
        .env("DENIZEN_GUEST", root().join("target/guest"))
        .env("E2B_FOLDER", folder.join("run"))
        .env("E2B_MODULES", modules)
        .status();
    let status = status.map_err(|error| format!("tests/e2b/run.py: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("the SDKs of E2B: {status}")) }
}

/// Whether what was installed is what is wanted now.
fn is_as_wanted(folder: &Path, wanted: &str) -> bool {
    std::fs::read_to_string(folder.join("installed")).is_ok_and(|installed| installed == wanted)
}

fn wanted(file: &Path) -> Result<String, String> {
    std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))
}

fn now_there(folder: &Path, wanted: &str) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    std::fs::write(folder.join("installed"), wanted).map_err(failed)
}

/// The Python SDK in an environment of its own; gives its Python.
pub fn install_python(folder: &Path) -> Result<PathBuf, String> {
    let list = root().join("tests/e2b/python/requirements.txt");
    let (folder, wanted) = (folder.join("python"), wanted(&list)?);
    let python = folder.join("bin/python");
    if is_as_wanted(&folder, &wanted) && run_alone(&python.to_string_lossy(), &["-c", "import e2b"])
    {
        return Ok(python);
    }
    // Debian has this part of Python in a package of its own.
    if !run_alone("python3", &["-c", "import ensurepip, venv"]) && is_there("apt-get") {
        crate::install_packages(&["python3-venv"])?;
    }
    run("python3", &["-m", "venv", "--clear", &folder.to_string_lossy()])?;
    let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"];
    let (python_text, list) = (python.to_string_lossy(), list.to_string_lossy());
    run(&python_text, &[&install[..], &[&*list]].concat())?;
    now_there(&folder, &wanted)?;
    Ok(python)
}

/// The JavaScript SDK; gives the folder that it is in.
fn install_modules(folder: &Path) -> Result<PathBuf, String> {
    let from = root().join("tests/e2b/js");
    let (folder, wanted) = (folder.join("js"), wanted(&from.join("package-lock.json"))?);
    if !is_as_wanted(&folder, &wanted) {
        let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
        std::fs::create_dir_all(&folder).map_err(failed)?;
        for file in ["package.json", "package-lock.json"] {
            std::fs::copy(from.join(file), folder.join(file)).map_err(failed)?;
        }
        let prefix = folder.to_string_lossy();
        run("npm", &["--prefix", &prefix, "ci", "--no-audit", "--no-fund", "--ignore-scripts"])?;
        now_there(&folder, &wanted)?;
    }
    Ok(folder.join("node_modules"))
}
