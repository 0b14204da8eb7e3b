//! Sessions that may reach less than their pool's network has.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use denizen::{EgressRules, Error, Isolation, MicroVmManager, Network, VmExecutionGuard};
use tempfile::TempDir;
use uuid::Uuid;

use crate::common::{config, has_tun, is_apart, isolated, opened, server, text};

fn rules(allow: &[&str], deny: &[&str]) -> EgressRules {
    let all = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    EgressRules { allow: all(allow), deny: all(deny) }
}

async fn pool(folder: &TempDir, isolation: Isolation, network: &Network) -> Arc<MicroVmManager> {
    let config = config(folder.path());
    opened(|| {
        isolated(MicroVmManager::builder((&config).into()), isolation).network(network.clone())
    })
    .await
}

/// What a request within is answered with; nothing where there is no answer.
async fn get(guard: &VmExecutionGuard, url: &str) -> String {
    let curl = format!("NO_PROXY= no_proxy= curl -sS --max-time 20 {url} || true");
    text(guard, &curl).await
}

/// The other end of a connection that a command within makes, which waits for what never comes.
async fn held(listener: TcpListener) -> TcpStream {
    let accepted = tokio::task::spawn_blocking(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut piece = [0; 1];
        stream.read_exact(&mut piece).unwrap();
        stream
    });
    tokio::time::timeout(Duration::from_secs(60), accepted).await.unwrap().unwrap()
}

async fn is_cut(mut stream: TcpStream) {
    let read = tokio::task::spawn_blocking(move || {
        let mut rest = Vec::new();
        // However it ends.
        let _ = stream.read_to_end(&mut rest);
    });
    tokio::time::timeout(Duration::from_secs(60), read).await.unwrap().unwrap();
}

over! {
    sandbox: Sandbox, microvm: MicroVm; {
        rules_of_a_session_narrow_a_filtered_network,
        rules_of_a_session_narrow_a_full_network,
    }
}

async fn rules_of_a_session_narrow_a_filtered_network(isolation: Isolation) {
    let (a, b) = (server("127.0.0.1"), server("127.0.0.1"));
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let hold = holder.local_addr().unwrap().port();
    let open = [a, b, hold].map(|port| format!("127.0.0.1:{port}").parse().unwrap());
    let network = Network::Filtered(open.into_iter().collect());
    let folder = tempfile::tempdir().unwrap();
    let first = pool(&folder, isolation, &network).await;
    let id = Uuid::new_v4();
    let [a, b] = [a, b].map(|port| format!("http://127.0.0.1:{port}/"));
    let guard = first.acquire(id).await.unwrap();
    assert_eq!(get(&guard, &a).await + &get(&guard, &b).await, "outside\noutside\n");

    // Nothing any more, and what was open is cut.
    let waits = format!("NO_PROXY= no_proxy= curl -sS http://127.0.0.1:{hold}/");
    let waiting = guard.command(waits).spawn().await.unwrap();
    let stream = held(holder).await;
    first.set_egress(id, Some(EgressRules::nothing())).await.unwrap();
    is_cut(stream).await;
    drop(waiting);
    assert!(get(&guard, &a).await.contains("denied by the session's own rules"));
    // But for one; and nothing that the pool does not open.
    let only = &a[7..a.len() - 1];
    let one = rules(&[only, "127.0.0.1:1"], &["0.0.0.0/0"]);
    first.set_egress(id, Some(one.clone())).await.unwrap();
    assert_eq!(get(&guard, &a).await, "outside\n");
    assert_ne!(get(&guard, &b).await, "outside\n");
    assert_ne!(get(&guard, "http://127.0.0.1:1/").await, "outside\n");
    drop(guard);
    let named = first.set_egress(id, Some(rules(&[], &["example.org"]))).await.unwrap_err();
    assert!(matches!(named, Error::Egress { .. }), "{named}");
    assert_eq!(first.egress(id).unwrap(), Some(one.clone()));

    // They stay with the session, its forks have them, and others do not.
    first.stop(id, true).await.unwrap();
    first.shutdown().await.unwrap();
    drop(first);
    let second = pool(&folder, isolation, &network).await;
    let fork = second.fork(id).await.unwrap();
    for id in [id, fork] {
        assert_eq!(second.egress(id).unwrap(), Some(one.clone()));
        let guard = second.acquire(id).await.unwrap();
        assert_eq!(get(&guard, &a).await, "outside\n");
        assert_ne!(get(&guard, &b).await, "outside\n");
        drop(guard);
        second.stop(id, true).await.unwrap();
    }
    second.set_egress(id, None).await.unwrap();
    assert_eq!(get(&second.acquire(id).await.unwrap(), &b).await, "outside\n");
    second.remove(fork).await.unwrap();
    assert!(matches!(second.egress(fork), Err(Error::Unknown { .. })));
    drop(second.acquire(fork).await.unwrap());
    assert_eq!(second.egress(fork).unwrap(), None);
    second.shutdown().await.unwrap();
}

/// Answers every request with one line.
fn serve(address: &str) {
    let listener = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut piece = [0; 4096];
            if matches!(stream.read(&mut piece), Ok(1..)) {
                let answer = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\noutside\n";
                let _ = stream.write_all(answer.as_bytes());
            }
        }
    });
}

async fn rules_of_a_session_narrow_a_full_network(isolation: Isolation) {
    // With names of its own, too.
    let hosts = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(hosts.path(), "192.0.2.1 a.test b.test\n192.0.2.2 c.test\n").unwrap();
    let prepare = format!(
        "ip addr add 192.0.2.2/32 dev lo && mount --bind '{}' /etc/hosts",
        hosts.path().display()
    );
    let test = format!("{}::rules_of_a_session_narrow_a_full_network", isolation.name());
    if !has_tun() || !is_apart(&test, &["--net", "--mount"], &prepare) {
        return;
    }
    for address in ["192.0.2.1:80", "192.0.2.2:80"] {
        serve(address);
    }
    let holder = TcpListener::bind("192.0.2.2:0").unwrap();
    let hold = holder.local_addr().unwrap().port();
    let network = Network::Full(["192.0.2.0/24".parse().unwrap()].into_iter().collect());
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(&folder, isolation, &network).await;
    let id = Uuid::new_v4();
    let guard = pool.acquire(id).await.unwrap();
    for name in ["a.test", "b.test", "c.test", "192.0.2.1", "192.0.2.2"] {
        assert_eq!(get(&guard, name).await, "outside\n", "{name}");
    }
    // One address is closed, and what is open there is cut.
    let waits = format!("curl -sS http://192.0.2.2:{hold}/");
    let waiting = guard.command(waits).spawn().await.unwrap();
    let stream = held(holder).await;
    pool.set_egress(id, Some(rules(&[], &["192.0.2.2"]))).await.unwrap();
    is_cut(stream).await;
    drop(waiting);
    assert_eq!(get(&guard, "a.test").await, "outside\n");
    assert_eq!(get(&guard, "192.0.2.2").await + &get(&guard, "c.test").await, "");
    // A name is open, where its address is not.
    let one = rules(&["a.test"], &["0.0.0.0/0"]);
    pool.set_egress(id, Some(one)).await.unwrap();
    assert_eq!(get(&guard, "a.test").await, "outside\n");
    for closed in ["b.test", "c.test", "192.0.2.1", "192.0.2.2", "-H 'Host: b.test' a.test"] {
        assert_eq!(get(&guard, closed).await, "", "{closed}");
    }
    pool.set_egress(id, Some(EgressRules::nothing())).await.unwrap();
    assert_eq!(get(&guard, "a.test").await, "");
    pool.set_egress(id, None).await.unwrap();
    assert_eq!(get(&guard, "b.test").await, "outside\n");
    drop(guard);
    pool.shutdown().await.unwrap();
}
