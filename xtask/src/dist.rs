//! `cargo xtask dist`: what is given to those who install denizen, in `target/dist`: a Debian
//! package, and the same files as a tarball. Made twice of the same program they are the same.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{root, run, run_alone};

const MAINTAINER: &str = "denizen maintainers <denizen-rs@users.noreply.github.com>";

/// What the package says of itself: in a line, then in more.
const DESCRIPTION: [&str; 4] = [
    "persistent, isolated computers for agent sessions",
    "Each session is a place to run commands that is still there next time: files,",
    "installed packages, running processes. It is put to sleep when nobody uses it,",
    "backed up, and comes back with the next command.",
];

/// Packs a program that was built, or builds it.
pub fn make(program: Option<&str>) -> Result<(), String> {
    let program = match program {
        Some(program) => PathBuf::from(program),
        None => build()?,
    };
    pack(&program, &root().join("target/dist"), epoch()?)
}

/// Builds the program, static if it can be.
fn build() -> Result<PathBuf, String> {
    let target = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
    let installed = Command::new("rustup").args(["target", "list", "--installed"]).output();
    let is_there = installed.is_ok_and(|it| {
        String::from_utf8_lossy(&it.stdout).lines().any(|installed| installed == target)
    });
    let mut build = vec!["build", "--release", "--locked", "--package", "denizen-cli"];
    // As Debian wants its programs.
    build.extend(["--config", "profile.release.strip=true"]);
    let mut folder = root().join("target");
    if is_there {
        build.extend(["--target", &target]);
        folder.push(&target);
    } else {
        eprintln!("{target} is not installed: the program needs a libc like the one here");
    }
    run("cargo", &build)?;
    Ok(folder.join("release/denizen"))
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

/// What is installed, in a folder that stands for the root of a machine.
struct Tree(PathBuf);

impl Tree {
    fn put(&self, path: &str, content: &[u8], mode: u32) -> Result<(), String> {
        let path = self.0.join(path);
        let write = || {
            fs::create_dir_all(path.parent().unwrap_or(&self.0))?;
            fs::write(&path, content)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))
        };
        write().map_err(|error| format!("{}: {error}", path.display()))
    }

    /// As [`Tree::put`], compressed the way that Debian has pages and changes.
    fn put_compressed(&self, path: &str, content: &[u8]) -> Result<(), String> {
        self.put(path, content, 0o644)?;
        // -n: without the time.
        let path = self.0.join(path);
        run("gzip", &["-9nf", &path.to_string_lossy()])
    }

    /// What it has of the program itself: pages and completions.
    fn fill_from(&self, program: &Path) -> Result<(), String> {
        let said = |args: &[&str]| {
            let output = Command::new(program).args(args).output();
            let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
            if output.status.success() {
                return Ok(output.stdout);
            }
            Err(format!("{} {}: {}", program.display(), args.join(" "), output.status))
        };
        for (shell, path) in [
            ("bash", "usr/share/bash-completion/completions/denizen"),
            ("zsh", "usr/share/zsh/vendor-completions/_denizen"),
            ("fish", "usr/share/fish/vendor_completions.d/denizen.fish"),
        ] {
            self.put(path, &said(&["completions", shell])?, 0o644)?;
        }
        let pages = self.0.with_file_name("pages");
        said(&["man", &pages.to_string_lossy()])?;
        let failed = |error: std::io::Error| format!("{}: {error}", pages.display());
        for page in fs::read_dir(&pages).map_err(failed)? {
            let page = page.map_err(failed)?;
            let path = format!("usr/share/man/man1/{}", page.file_name().to_string_lossy());
            self.put_compressed(&path, &fs::read(page.path()).map_err(failed)?)?;
        }
        fs::remove_dir_all(&pages).map_err(failed)
    }
}

/// The packages that the program cannot do without: those with the libraries that it is linked to.
fn depends(program: &Path) -> Result<String, String> {
    const ELF: &[u8] = b"\x7fELF";
    let failed = |error: std::io::Error| format!("dpkg-shlibdeps: {error}");
    if !fs::read(program).map_err(failed)?.starts_with(ELF) {
        return Ok(String::new());
    }
    // It looks for the description of a source package where it stands.
    let place = root().join("target/dist/shlibdeps");
    fs::create_dir_all(place.join("debian")).map_err(failed)?;
    let source = "Source: denizen\n\nPackage: denizen\nArchitecture: any\n";
    fs::write(place.join("debian/control"), source).map_err(failed)?;
    let program = fs::canonicalize(program).map_err(failed)?;
    let mut ask = Command::new("dpkg-shlibdeps");
    ask.arg("-O").arg("-e").arg(program).current_dir(&place);
    let output = ask.output().map_err(failed)?;
    fs::remove_dir_all(&place).map_err(failed)?;
    if !output.status.success() {
        return Err(format!("dpkg-shlibdeps: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let said = String::from_utf8_lossy(&output.stdout);
    // Nothing is said of a program that is linked to nothing.
    Ok(said.trim().strip_prefix("shlibs:Depends=").unwrap_or_default().to_owned())
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
    let bytes = fs::read(program).map_err(|error| format!("{}: {error}", program.display()))?;
    let depends = depends(program)?;
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(failed)?;
    }
    let tree = Tree(folder.join("tree"));
    let read = |path: &str| fs::read(root().join(path)).map_err(|error| format!("{path}: {error}"));
    tree.put("usr/bin/denizen", &bytes, 0o755)?;
    tree.fill_from(program)?;
    for (from, to) in [
        ("packaging/denizen.service", "usr/lib/systemd/system/denizen.service"),
        ("packaging/denizen.socket", "usr/lib/systemd/system/denizen.socket"),
        ("packaging/config.toml", "etc/denizen/config.toml"),
        ("packaging/alerts.yml", "usr/share/doc/denizen/alerts.yml"),
        ("packaging/grafana-dashboard.json", "usr/share/doc/denizen/grafana-dashboard.json"),
        ("docs/operations.md", "usr/share/doc/denizen/operations.md"),
        ("LICENSE-MIT", "usr/share/doc/denizen/copyright"),
    ] {
        tree.put(to, &read(from)?, 0o644)?;
    }
    tree.put_compressed("usr/share/doc/denizen/NEWS", &read("CHANGELOG.md")?)?;
    let name = format!("denizen-{version}-{architecture}");
    let tarball = format!("{}/{name}.tar.gz", folder.display());
    let tree_text = tree.0.display().to_string();
    // gzip -n: without the time. Names sorted, one time, root's.
    let script = r#"
        find "$1" -type d -exec chmod 755 {} +
        tar -C "$1" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$3" \
            --transform "s,^\.,$4," -cf - . | gzip -9n > "$2"
    "#;
    let time = epoch.to_string();
    run("sh", &["-ec", script, "sh", &tree_text, &tarball, &time, &name])?;
    let depends = if depends.is_empty() { depends } else { format!("Depends: {depends}\n") };
    let control = format!(
        "Package: denizen\nVersion: {version}\nArchitecture: {architecture}\nSection: admin\n\
         Priority: optional\nMaintainer: {MAINTAINER}\n{depends}Recommends: uidmap\n\
         Homepage: {}\nDescription: {}\n",
        env!("CARGO_PKG_REPOSITORY"),
        DESCRIPTION.join("\n ")
    );
    tree.put("DEBIAN/control", control.as_bytes(), 0o644)?;
    tree.put("DEBIAN/conffiles", b"/etc/denizen/config.toml\n", 0o644)?;
    for script in ["postinst", "prerm", "postrm"] {
        tree.put(
            &format!("DEBIAN/{script}"),
            &read(&format!("packaging/debian/{script}"))?,
            0o755,
        )?;
    }
    let date = Command::new("date").args(["-uR", "-d", &format!("@{epoch}")]).output();
    let date = date.map_err(|error| format!("date: {error}"))?.stdout;
    let changes = format!(
        "denizen ({version}) unstable; urgency=medium\n\n  * What is new is told in NEWS.gz.\n\n \
         -- {MAINTAINER}  {}",
        String::from_utf8_lossy(&date)
    );
    tree.put_compressed("usr/share/doc/denizen/changelog", changes.as_bytes())?;
    let deb = format!("{}/denizen_{version}_{architecture}.deb", folder.display());
    // What a package is checked by (dpkg --verify).
    let build = r#"
        find "$1" -type d -exec chmod 755 {} +
        (cd "$1" && find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum) > "$1/DEBIAN/md5sums"
        chmod 644 "$1/DEBIAN/md5sums"
        SOURCE_DATE_EPOCH=$3 dpkg-deb --root-owner-group -b "$1" "$2"
    "#;
    run("sh", &["-ec", build, "sh", &tree_text, &deb, &time])?;
    fs::remove_dir_all(&tree.0).map_err(failed)?;
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
    const PROGRAM: &str = "#!/bin/sh\ncase $1 in completions) echo \"# $2\";; man) mkdir -p $2; \
        echo .TH denizen 1 > $2/denizen.1;; *) echo denizen 0;; esac\n";

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
            for file in [
                "usr/share/doc/denizen/copyright",
                "usr/share/man/man1/denizen.1.gz",
                "usr/lib/systemd/system/denizen.socket",
                "etc/denizen/config.toml",
            ] {
                assert!(into.join(file).is_file(), "{file}");
            }
        }
        install(
            &first.iter().find(|(path, _)| path.extension().unwrap() == "deb").unwrap().0,
            &place,
        );
        let package = first.iter().find(|(path, _)| path.extension().unwrap() == "deb");
        let mut lint = Command::new("lintian");
        lint.args(["--allow-root", "--fail-on", "error"]).arg(&package.unwrap().0);
        let lint = lint.output().unwrap();
        assert!(lint.status.success(), "{}", String::from_utf8_lossy(&lint.stdout));
        fs::remove_dir_all(&place).unwrap();
    }

    /// Has dpkg itself install the package into a machine that has nothing, check it, and remove it
    /// again: the configuration stays until it is purged.
    fn install(package: &Path, place: &Path) {
        let machine = place.join("machine");
        for folder in ["var/lib/dpkg/updates", "var/lib/dpkg/info", "var/log"] {
            fs::create_dir_all(machine.join(folder)).unwrap();
        }
        for file in ["status", "available"] {
            fs::write(machine.join("var/lib/dpkg").join(file), "").unwrap();
        }
        let dpkg = |args: &[&str]| {
            let mut dpkg = Command::new("dpkg");
            // Its scripts find no shell there, and no systemd to tell.
            dpkg.arg("--root")
                .arg(&machine)
                .args(["--force-script-chrootless", "--force-not-root"]);
            let output = dpkg.args(args).output().unwrap();
            assert!(output.status.success(), "{args:?}: {output:?}");
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        dpkg(&["--force-depends", "--install", &package.to_string_lossy()]);
        assert!(dpkg(&["--status", "denizen"]).contains("Status: install ok installed"));
        assert_eq!(dpkg(&["--verify", "denizen"]), "");
        let config = machine.join("etc/denizen/config.toml");
        fs::write(&config, "spares = 0\n").unwrap();
        // The same again, as an upgrade: what was changed there stays.
        dpkg(&["--force-depends", "--force-confold", "--install", &package.to_string_lossy()]);
        assert_eq!(fs::read_to_string(&config).unwrap(), "spares = 0\n");
        dpkg(&["--remove", "denizen"]);
        assert!(config.exists() && !machine.join("usr/bin/denizen").exists());
        dpkg(&["--purge", "denizen"]);
        assert!(!config.exists());
    }
}
