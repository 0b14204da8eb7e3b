//! What tests of the library share.
#![allow(clippy::unwrap_used, dead_code, reason = "each test program uses a part of it")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use denizen::{
    Builder, Clock, Error, Isolation, Limits, MicroVmManager, RegistryError, VmExecutionGuard,
    VmPoolConfig,
};
use parking_lot::Mutex;

/// A clock that stands still until it is moved.
#[derive(Debug, Default)]
pub struct Manual(Mutex<Duration>);

impl Manual {
    pub fn pass(&self, time: Duration) {
        *self.0.lock() += time;
    }
}

impl Clock for Manual {
    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000) + *self.0.lock()
    }
    fn uptime(&self) -> Duration {
        Duration::from_secs(1000) + *self.0.lock()
    }
    fn boot(&self) -> String {
        "the same".to_owned()
    }
}

/// Shared by all tests of one user, so that the host's root is copied once.
pub fn cache() -> PathBuf {
    match std::env::var_os("DENIZEN_TEST_CACHE") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"),
    }
}

/// Makes a test for each isolation, in a module of its name, of functions that take one.
#[macro_export]
macro_rules! over {
    ($($module:ident: $isolation:ident),*; $tests:tt) => {
        $($crate::over!(@ $module $isolation $tests);)*
    };
    (@ $module:ident $isolation:ident { $($test:ident),* $(,)? }) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    super::$test(denizen::Isolation::$isolation).await;
                }
            )*
        }
    };
}

/// A pool in this folder, whose commands a plain shell runs.
pub fn config(folder: &Path) -> VmPoolConfig {
    VmPoolConfig {
        enabled: true,
        volume_root: folder.join("pool"),
        shell: "/bin/sh".into(),
        shell_args: vec!["-c".to_owned()],
        ..VmPoolConfig::default()
    }
}

/// Has a pool be of an isolation, with what that needs here.
pub fn isolated(builder: Builder, isolation: Isolation) -> Builder {
    let builder = builder.isolation(isolation).limits(limits(isolation)).cache(cache());
    if isolation != Isolation::MicroVm {
        return builder;
    }
    let builder = builder.kernel(guest().join("vmlinuz"), Some(guest().join("modules")));
    builder.agent_program(program()).image(root().to_str().unwrap())
}

/// What sessions may use in tests: guests as little as will do.
pub fn limits(isolation: Isolation) -> Limits {
    match isolation {
        Isolation::MicroVm => {
            Limits { memory_bytes: Some(256 << 20), disk_bytes: Some(1 << 30), ..Limits::default() }
        }
        _ => Limits::default(),
    }
}

/// Where the program `denizen` and the kernel of guests are for a user who cannot see where
/// they were made.
pub const COPIES: &str = "DENIZEN_TEST_COPIES";

/// The program `denizen`, which runs in guests. It is of another package, which `cargo nextest`
/// builds before it runs tests of this one.
pub fn program() -> PathBuf {
    let program = match std::env::var_os(COPIES) {
        Some(folder) => Path::new(&folder).join("denizen"),
        None => std::env::current_exe().unwrap().parent().unwrap().join("../denizen"),
    };
    assert!(program.exists(), "no program: `cargo build -p denizen-cli` makes it");
    program
}

/// The folder of the kernel of guests and its modules.
pub fn guest() -> PathBuf {
    let guest = match std::env::var_os(COPIES) {
        Some(folder) => Path::new(&folder).join("guest"),
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("../guest"),
    };
    assert!(guest.join("vmlinuz").exists(), "no kernel: `cargo xtask test` fetches one");
    guest
}

/// Puts programs of this machine, and what these need, into the folder `$1`.
const ROOT: &str = r#"
    cd "$1"
    mkdir -p dev etc home opt proc root run srv sys tmp var usr/bin usr/lib usr/lib64 volume
    for name in bin lib lib64; do ln -s usr/$name $name; done
    ln -s usr/bin sbin; ln -s bin usr/sbin
    printf 'root:x:0:0:root:/root:/bin/sh
daemon:x:1:1::/:/bin/sh
' > etc/passwd
    printf 'root:x:0:
daemon:x:1:
' > etc/group
    mkdir -p usr/share/doc; echo kept > usr/share/doc/kept
    export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    for name in bash cat chmod chown cp curl cut date dd df du env false find fstrim getent grep         gzip head hostname id kill ln ls mkdir mkfifo mv nproc printf ps pwd python3 readlink rm         rmdir sed seq setsid sh sha256sum sleep sort stat stty sync tail tar tee test timeout         touch tr true tty uname wc xargs; do
        path=$(command -v $name) || exit
        case $path in /*) ;; *) path=/usr/bin/$name ;; esac
        cp -L "$path" usr/bin/$name
    done
    python3 -c 'import mmap, socket, sys
for module in sys.modules.values():
    for name in ["__file__", "__cached__"]:
        if getattr(module, name, None): print(getattr(module, name))' > files
    for file in usr/bin/* $(grep '\.so$' files); do
        ldd $file 2> /dev/null | grep -o '/[^ ]*' || true
    done | sort -u >> files
    while read -r file; do
        into=.$file
        case $file in /lib*) into=./usr$file ;; esac
        [ ! -e "$file" ] || { mkdir -p "${into%/*}"; cp -L --preserve=timestamps "$file" "$into"; }
    done < files
    rm files
"#;

/// The root that guests have in tests: made once, so that disks of it are, too.
fn root() -> PathBuf {
    let name = ROOT
        .bytes()
        .fold(0u64, |sum, byte| sum.wrapping_mul(0x0100_0000_01b3).wrapping_add(byte.into()));
    let root = cache().join(format!("root-{name:016x}"));
    if !root.exists() {
        std::fs::create_dir_all(cache()).unwrap();
        let partial = tempfile::tempdir_in(cache()).unwrap().keep();
        std::fs::set_permissions(&partial, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let mut shell = std::process::Command::new("sh");
        let made = shell.args(["-ec", ROOT, "sh"]).arg(&partial).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        if std::fs::rename(&partial, &root).is_err() {
            // Another test was faster.
            assert!(root.exists());
            std::fs::remove_dir_all(&partial).unwrap();
        }
    }
    root
}

/// Opens a pool once the last task of the one before it, in this process, has let go of its lock.
pub async fn opened(builder: impl Fn() -> Builder) -> Arc<MicroVmManager> {
    loop {
        match builder().build() {
            Err(Error::Registry(RegistryError::Locked { .. })) => tokio::task::yield_now().await,
            opened => return opened.unwrap(),
        }
    }
}

/// What a command line prints, which must end well.
pub async fn text(guard: &VmExecutionGuard, line: &str) -> String {
    let output = guard.command(line).output().await.unwrap();
    assert!(output.exit.success(), "{line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A server that answers every request with one line.
pub fn server(address: &str) -> u16 {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut seen = Vec::new();
            let mut piece = [0; 1024];
            while !seen.ends_with(b"\r\n\r\n") {
                match stream.read(&mut piece) {
                    Ok(count @ 1..) => seen.extend_from_slice(&piece[..count]),
                    _ => break,
                }
            }
            let answer =
                "HTTP/1.1 200 OK\r\nContent-Length: 8\r\nConnection: close\r\n\r\noutside\n";
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    port
}

/// Whether this is the process in which a test has a network of its own, with addresses that are
/// nobody else's (192.0.2.1 is there). Elsewhere it is run so here, by its name: in namespaces that
/// unshare(1) makes, where a line of shell is run first; or it is said why that cannot be.
pub fn is_apart(test: &str, namespaces: &[&str], prepare: &str) -> bool {
    if std::env::var_os("DENIZEN_TEST_APART").is_some() {
        return true;
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: an address of the test's own needs root");
        return false;
    }
    let again = format!(
        "ip link set lo up && ip addr add 192.0.2.1/32 dev lo && {prepare} && exec \"$0\" \"$@\""
    );
    let output = std::process::Command::new("unshare")
        .args(namespaces)
        .args(["sh", "-c", &again])
        .arg(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env("DENIZEN_TEST_APART", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}{said}", String::from_utf8_lossy(&output.stdout));
    false
}

/// Whether a gateway can be made here; says so if not.
pub fn has_tun() -> bool {
    let tun = std::fs::File::options().write(true).open("/dev/net/tun");
    let is_kept = tun.is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied);
    if is_kept {
        println!("skipped: this machine keeps /dev/net/tun from its users");
    }
    !is_kept
}
