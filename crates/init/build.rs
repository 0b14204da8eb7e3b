//! Compiles `src/main.rs` and its modules into the executable that the library embeds.
//!
//! Plain rustc is enough, because the program has no dependencies. Cargo cannot embed a
//! binary target of one package into its own library, hence this script.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    // It starts faster without a loader, and runs where there is no libc to load. Where the
    // static libc is not installed, all but a static owner can do without.
    let features = env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    let must_be_static = features.split(',').any(|feature| feature == "crt-static");
    let built = match compile(true) {
        Err(_) if !must_be_static => compile(false),
        built => built,
    };
    if let Err(message) = built {
        println!("cargo::error=denizen-init was not built: {message}");
    }
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| format!("{name} is not set; build this crate with cargo"))
}

fn compile(is_static: bool) -> Result<(), String> {
    let rustc = variable("RUSTC")?;
    let target = variable("TARGET")?;
    let out = PathBuf::from(variable("OUT_DIR")?).join("denizen-init");
    let mut command = Command::new(&rustc);
    command
        .args(["--crate-name", "denizen_init_program", "--crate-type", "bin"])
        .args(["--edition", "2024", "--target", &target])
        .args(["-C", "opt-level=s", "-C", "panic=abort", "-C", "strip=symbols"])
        .args(["-C", "codegen-units=1", "--cap-lints", "warn"])
        .args(["-C", if is_static { "target-feature=+crt-static" } else { "prefer-dynamic=no" }])
        .arg("-o")
        .arg(&out)
        .arg("src/main.rs");
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        command.arg("-C").arg(format!("linker={linker}"));
    }
    let output = command.output().map_err(|error| format!("cannot run {rustc}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).replace('\n', " | "))
}
