//! `cargo xtask dist`: what is given to those who install denizen, in `target/dist`: a Debian
//! package, and the same files as a tarball. Made twice of the same program they are the same.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::{root, run, run_alone};

/// Builds the program and packs it.
pub fn make() -> Result<(), String> {
    let target = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
    let installed = Command::new("rustup").args(["target", "list", "--installed"]).output();
    let is_there = installed.is_ok_and(|it| {
        String::from_utf8_lossy(&it.stdout).lines().any(|installed| installed == target)
    });
    let mut build = vec!["build", "--release", "--locked", "--package", "denizen-cli"];
    let mut program = root().join("target");
    if is_there {
        build.extend(["--target", &target]);
        program.push(&target);
    } else {
        eprintln!("{target} is not installed: the program needs a libc like the one here");
    }
    run("cargo", &build)?;
    pack(&program.join("release/denizen"), &root().join("target/dist"), epoch()?)
}

/// When what is packed was made: SOURCE_DATE_EPOCH, or the time of the commit.
fn epoch() -> Result<u64, String> {
    let text = if let Ok(text) = std::env::var("SOURCE_DATE_EPOCH") {
        text
    } else {
        let mut git = Command::new("git");
        git.args(["log", "-1", "--format=%ct"]).current_dir(root());
        let output = git.output().map_err(|error| format!("git: {error}"))?;
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    text.trim().parse().map_err(|_| format!("no time: {text:?} (SOURCE_DATE_EPOCH)"))
}

/// Packs a program and what goes with it into `folder`, which is made anew.
fn pack(program: &Path, folder: &Path, epoch: u64) -> Result<(), String> {
    let version = env!("CARGO_PKG_VERSION");
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => return Err(format!("{other}: no name for it in Debian")),
    };
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(failed)?;
    }
    let tree = folder.join("tree");
    let put = |path: &str, content: &[u8], mode: u32| {
        let path = tree.join(path);
        let parent = path.parent().unwrap_or(&tree);
        fs::create_dir_all(parent)?;
        fs::write(&path, content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
    };
    let read = |path: &str| fs::read(root().join(path)).map_err(|error| format!("{path}: {error}"));
    let bytes = fs::read(program).map_err(|error| format!("{}: {error}", program.display()))?;
    put("usr/bin/denizen", &bytes, 0o755).map_err(failed)?;
    for (shell, path) in [
        ("bash", "usr/share/bash-completion/completions/denizen"),
        ("zsh", "usr/share/zsh/vendor-completions/_denizen"),
        ("fish", "usr/share/fish/vendor_completions.d/denizen.fish"),
    ] {
        let output = Command::new(program).args(["completions", shell]).output();
        let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
        if !output.status.success() {
            return Err(format!("completions of {shell}: {}", output.status));
        }
        put(path, &output.stdout, 0o644).map_err(failed)?;
    }
    for (from, to) in [
        ("packaging/denizen.service", "usr/lib/systemd/system/denizen.service"),
        ("packaging/alerts.yml", "usr/share/doc/denizen/alerts.yml"),
        ("packaging/grafana-dashboard.json", "usr/share/doc/denizen/grafana-dashboard.json"),
        ("docs/operations.md", "usr/share/doc/denizen/operations.md"),
        ("LICENSE-MIT", "usr/share/doc/denizen/copyright"),
    ] {
        put(to, &read(from)?, 0o644).map_err(failed)?;
    }
    let name = format!("denizen-{version}-{architecture}");
    let tarball = format!("{}/{name}.tar.gz", folder.display());
    let tree_text = tree.display().to_string();
    // gzip -n: without the time. Names sorted, one time, root's.
    let script = r#"
        find "$1" -type d -exec chmod 755 {} +
        tar -C "$1" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$3" \
            --transform "s,^\.,$4," -cf - . | gzip -9n > "$2"
    "#;
    let time = epoch.to_string();
    run("sh", &["-ec", script, "sh", &tree_text, &tarball, &time, &name])?;
    let control = format!(
        "Package: denizen\nVersion: {version}\nArchitecture: {architecture}\nSection: admin\n\
         Priority: optional\nMaintainer: denizen <https://github.com/denizen-rs/denizen>\n\
         Recommends: uidmap\nDescription: {}\n",
        "Persistent, isolated computers for agent sessions"
    );
    put("DEBIAN/control", control.as_bytes(), 0o644).map_err(failed)?;
    let deb = format!("{}/denizen_{version}_{architecture}.deb", folder.display());
    let build =
        r#"chmod 755 "$1/DEBIAN"; SOURCE_DATE_EPOCH=$3 dpkg-deb --root-owner-group -b "$1" "$2""#;
    run("sh", &["-ec", build, "sh", &tree_text, &deb, &time])?;
    fs::remove_dir_all(&tree).map_err(failed)?;
    if !run_alone("dpkg-deb", &["--info", &deb]) {
        return Err(format!("{deb} is not a package"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// Stands for the program: what is packed is not looked into.
    const PROGRAM: &str =
        "#!/bin/sh\ncase $1 in completions) echo \"# $2\";; *) echo denizen 0;; esac\n";

    #[test]
    fn what_is_packed_can_be_installed_and_made_again() {
        let place = std::env::temp_dir().join(format!("dist-{}", std::process::id()));
        fs::create_dir_all(&place).unwrap();
        let program = place.join("program");
        fs::write(&program, PROGRAM).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let packed = |name: &str| {
            let folder = place.join(name);
            pack(&program, &folder, 1_700_000_000).unwrap();
            let mut all: Vec<_> = fs::read_dir(&folder).unwrap().map(|it| it.unwrap()).collect();
            all.sort_by_key(fs::DirEntry::file_name);
            all.iter().map(|it| (it.path(), fs::read(it.path()).unwrap())).collect::<Vec<_>>()
        };
        let (first, second) = (packed("first"), packed("second"));
        assert_eq!(first.len(), 2);
        for ((path, one), (_, other)) in first.iter().zip(&second) {
            assert!(one == other, "{}: not the same again", path.display());
        }
        let into = place.join("root");
        for (path, _) in &first {
            let _ = fs::remove_dir_all(&into);
            fs::create_dir_all(&into).unwrap();
            let is_deb = path.extension().is_some_and(|it| it == "deb");
            let mut unpack = if is_deb {
                let mut unpack = Command::new("dpkg-deb");
                unpack.arg("-x").arg(path).arg(&into);
                unpack
            } else {
                let mut unpack = Command::new("tar");
                unpack.args(["--strip-components=1", "-xzf"]).arg(path).arg("-C").arg(&into);
                unpack
            };
            assert!(unpack.status().unwrap().success(), "{}", path.display());
            let said = Command::new(into.join("usr/bin/denizen")).arg("--version").output();
            assert_eq!(String::from_utf8_lossy(&said.unwrap().stdout), "denizen 0\n");
            let bash = into.join("usr/share/bash-completion/completions/denizen");
            assert_eq!(fs::read_to_string(bash).unwrap(), "# bash\n");
            let unit = into.join("usr/lib/systemd/system/denizen.service");
            let text = fs::read_to_string(&unit).unwrap();
            assert!(text.contains("ExecStart=/usr/bin/denizen serve"));
            // Both were packed within a second: the same again tomorrow, too.
            let known = unit.metadata().unwrap();
            assert_eq!((known.mtime(), known.mode() & 0o777), (1_700_000_000, 0o644));
            assert!(into.join("usr/share/doc/denizen/copyright").is_file());
        }
        fs::remove_dir_all(&place).unwrap();
    }
}
