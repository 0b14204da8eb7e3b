//! Files over the HTTP API, in a sandbox and under `host`, spoken to the real daemon byte by byte.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;

use common::wire::Api;
use common::{text, until};
use serde_json::{Value, json};

const FILES: &str = "/v1/sessions/a/files";

fn at(path: &str) -> String {
    format!("{FILES}{path}")
}

/// A daemon with a session `a`.
fn begin(settings: &[&str]) -> Api {
    let api = Api::with(settings);
    assert_eq!(api.ask("PUT", "/v1/sessions/a", &[], &[]).status, 201);
    api
}

fn put(api: &Api, path: &str, body: &[u8]) {
    let made = api.ask("PUT", &at(path), &[], body);
    assert_eq!(made.status, 201, "{path}: {}", text(&made.body));
}

fn names(list: &Value) -> Vec<&str> {
    list["entries"].as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect()
}

#[test]
fn files_are_written_read_moved_and_removed() {
    for isolation in ["sandbox", "host"] {
        let api = begin(&["--isolation", isolation]);
        api.get(&at("/~/none")).refused(404, "no_file");
        let made = api.ask("PUT", &at("/~/new/f%20%25%FF?mode=0750"), &[], b"content");
        assert_eq!(made.status, 201, "{}", text(&made.body));
        let entry = made.json();
        assert_eq!((&entry["kind"], &entry["mode"]), (&json!("file"), &json!("0750")));
        assert_eq!(entry["size"], 7);
        let escaped = entry["escaped"].as_str().unwrap();
        assert!(escaped.ends_with("/new/f%20%25%FF"), "{escaped}");
        // What is escaped is asked for so.
        let read = api.get(&at(escaped));
        assert_eq!((read.status, read.body.as_slice()), (200, &b"content"[..]));
        assert_eq!(read.header("content-type"), Some("application/octet-stream"));
        assert_eq!(read.header("content-length"), Some("7"));
        assert_eq!(read.header("content-security-policy"), Some("sandbox; default-src 'none'"));
        let head = api.ask("HEAD", &at(escaped), &[], &[]);
        assert_eq!((head.status, head.body.len()), (200, 0));
        assert_eq!(head.header("content-length"), Some("7"));
        // A command sees the same.
        let seen = api.0.exec("a", "cat new/* && stat -c %a new/*");
        assert_eq!(text(&seen.stdout), "content750\n");
        // Again: it keeps its permissions.
        let again = api.ask("PUT", &at(escaped), &[], b"other");
        assert_eq!((again.status, &again.json()["mode"]), (200, &json!("0750")));

        api.get(&at("/~/new")).refused(409, "is_folder");
        api.ask("PUT", &at("/~/new"), &[], b"x").refused(409, "is_folder");
        api.get(&at("/~/new/f%20%25%FF/below")).refused(409, "not_folder");
        api.get(&at("/~/a%00b")).refused(400, "bad_name");
        api.get(&at(&format!("/~/{}", "a".repeat(300)))).refused(400, "bad_name");
        api.get(&at("/~/new?as=list&as=list")).refused(400, "bad_request");
        api.get(&at("/~/new?as=nothing")).refused(400, "bad_request");
        api.get(&at("/~/new?as=list&limit=0")).refused(400, "bad_request");
        api.ask("PUT", &at("/~/x?mode=9"), &[], b"").refused(400, "bad_request");
        api.ask("PATCH", &at("/~/new"), &[], b"").refused(405, "bad_method");
        api.get("/v1/sessions/none/files/etc").refused(404, "unknown_session");
        let nobody = format!("/v1/sessions/{}/files/etc", uuid::Uuid::new_v4());
        api.get(&nobody).refused(404, "unknown_session");
        assert_eq!(api.get("/v1/sessions").json()["sessions"].as_array().unwrap().len(), 1);

        // Made, moved, removed.
        assert_eq!(api.ask("PUT", &at("/~/one/two?as=folder"), &[], &[]).status, 201);
        assert_eq!(api.ask("PUT", &at("/~/one/two?as=folder"), &[], &[]).status, 200);
        api.ask("PUT", &at("/~/new/f%20%25%FF?as=folder"), &[], &[]).refused(409, "already_exists");
        let moved = api.ask("POST", &at("/~/new/f%20%25%FF?to=~/one/%2566%FE"), &[], &[]);
        assert_eq!(moved.status, 200, "{}", text(&moved.body));
        assert!(moved.json()["escaped"].as_str().unwrap().ends_with("/one/%2566%FE"));
        put(&api, "/~/g", b"g");
        api.ask("POST", &at("/~/g?to=~/one/%2566%FE"), &[], &[]).refused(409, "already_exists");
        api.ask("POST", &at("/~/g?to=g"), &[], &[]).refused(400, "bad_request");
        api.ask("POST", &at("/~/g"), &[], &[]).refused(400, "bad_request");
        let replaced = api.ask("POST", &at("/~/g?to=~/one/%2566%FE&replace=true"), &[], &[]);
        assert_eq!(replaced.status, 200, "{}", text(&replaced.body));
        assert_eq!(api.get(&at("/~/one/%2566%FE")).body, b"g");
        api.get(&at("/~/g")).refused(404, "no_file");
        api.ask("DELETE", &at("/~/one"), &[], &[]).refused(409, "not_empty");
        assert_eq!(api.ask("DELETE", &at("/~/one?recursive=true"), &[], &[]).status, 204);
        api.ask("DELETE", &at("/~/one"), &[], &[]).refused(404, "no_file");
        api.ask("DELETE", &at("/~?recursive=true"), &[], &[]).refused(403, "not_permitted");
        // A link is looked at and removed, and what it leads to stays.
        assert!(
            api.0.exec("a", "mkdir d; touch d/kept; ln -s d link; mkfifo fifo").status.success()
        );
        let link = api.get(&at("/~/link?as=stat")).json();
        assert_eq!((&link["kind"], &link["target"]), (&json!("symlink"), &json!("d")));
        assert_eq!(api.ask("DELETE", &at("/~/link?recursive=true"), &[], &[]).status, 204);
        assert_eq!(names(&api.get(&at("/~/d?as=list")).json()), ["kept"]);
        api.get(&at("/~/fifo")).refused(409, "not_file");
    }
}

#[test]
fn a_session_that_sleeps_wakes_for_its_files_as_its_own_user() {
    let api = begin(&[]);
    put(&api, "/volume/f", b"1");
    assert_eq!(api.ask("POST", "/v1/sessions/a/stop", &[], &[]).status, 204);
    assert_eq!(api.get("/v1/sessions/a").json()["state"], "stopped");
    assert_eq!(api.get(&at("/volume/f")).body, b"1");
    assert_eq!(api.get("/v1/sessions/a").json()["state"], "active");
    // What paths mean is what they mean within: this is the sandbox's, not this machine's.
    put(&api, "/etc/only-here", b"");
    assert!(!std::path::Path::new("/etc/only-here").exists());
    assert!(names(&api.get(&at("/?as=list")).json()).contains(&"volume"));
    api.ask("PUT", &at("/proc/none"), &[], b"").refused(404, "no_file");
    // The volume is a file system of its own.
    api.ask("POST", &at("/volume/f?to=/etc/f"), &[], &[]).refused(409, "other_disk");
}

#[test]
fn parts_of_a_file_are_read() {
    let api = begin(&[]);
    put(&api, "/volume/f", b"0123456789");
    let part = |range: &str, more: &[&str]| {
        let range = format!("range: {range}");
        api.ask("GET", &at("/volume/f"), &[&[range.as_str()], more].concat(), &[])
    };
    let whole = api.get(&at("/volume/f"));
    assert_eq!(whole.header("accept-ranges"), Some("bytes"));
    let tag = whole.header("etag").unwrap().to_owned();
    for (range, wanted, content) in [
        ("bytes=2-4", "bytes 2-4/10", "234"),
        ("bytes=7-", "bytes 7-9/10", "789"),
        ("bytes=-2", "bytes 8-9/10", "89"),
        ("bytes=8-99", "bytes 8-9/10", "89"),
    ] {
        let answer = part(range, &[]);
        assert_eq!((answer.status, answer.header("content-range")), (206, Some(wanted)));
        assert_eq!(text(&answer.body), content, "{range}");
    }
    let beyond = part("bytes=10-", &[]);
    beyond.refused(416, "bad_range");
    assert_eq!(beyond.header("content-range"), Some("bytes */10"));
    assert_eq!(part("bytes=0-1,4-5", &[]).status, 200);
    let same = format!("if-range: {tag}");
    assert_eq!(part("bytes=0-1", &[&same]).status, 206);
    assert_eq!(part("bytes=0-1", &["if-range: \"other\""]).status, 200);
    let known = format!("if-none-match: \"x\", {tag}");
    let unchanged = api.ask("GET", &at("/volume/f"), &[&known], &[]);
    assert_eq!((unchanged.status, unchanged.body.len()), (304, 0));
    let head = api.ask("HEAD", &at("/volume/f"), &["range: bytes=2-4"], &[]);
    assert_eq!((head.status, head.header("content-length")), (206, Some("3")));
    // Another one of the same size, at the same time.
    assert!(
        api.0.exec("a", "cp -p f g; echo 012345678 > g; touch -r f g; mv g f").status.success()
    );
    assert_eq!(api.ask("GET", &at("/volume/f"), &[&known], &[]).status, 200);
    assert_eq!(part("bytes=0-1", &[&same]).status, 200);
}

#[test]
fn an_upload_goes_on_where_it_broke_off() {
    let api = begin(&[]);
    put(&api, "/volume/f", b"before");
    let content: Vec<u8> =
        (0..3_000_000u32).flat_map(|it| it.to_le_bytes()[..3].to_vec()).collect();
    let total = content.len();
    let upload = at("/volume/f?upload=one");
    let so_far = || api.get(&at("/volume/f?as=upload&upload=one"));
    so_far().refused(404, "no_file");
    let send = |first: usize, last: usize| {
        let range = format!("content-range: bytes {first}-{last}/{total}");
        api.ask("PUT", &upload, &[&range], &content[first..=last])
    };
    let first = send(0, 999_999);
    assert_eq!((first.status, first.json()), (202, json!({ "received": 1_000_000 })));
    // A cut: what is announced does not come.
    let mut cut = api.connect();
    let last = total - 1;
    write!(
        cut,
        "PUT {upload} HTTP/1.1\r\nhost: it\r\ncontent-length: {}\r\n\
         content-range: bytes 1000000-{last}/{total}\r\n\r\n",
        total - 1_000_000
    )
    .unwrap();
    cut.write_all(&content[1_000_000..3_000_000]).unwrap();
    cut.shutdown(Shutdown::Both).unwrap();
    drop(cut);
    // What is on its way when a connection is cut may be lost; what has come is kept.
    let range = |first: usize, last: usize| send(first, last).status;
    let received = || usize::try_from(so_far().json()["received"].as_u64().unwrap()).unwrap();
    until("the upload is free", || range(received(), 2_999_999 + 1_000_000) == 202);
    // What was there is whole all the time.
    assert_eq!(api.get(&at("/volume/f")).body, b"before");
    assert_eq!(received(), 4_000_000);
    let gap = send(4_000_001, 5_000_000);
    gap.refused(409, "bad_offset");
    assert_eq!(gap.header("upload-offset"), Some("4000000"));
    // Going back is no gap.
    assert_eq!(range(2_000_000, 2_999_999), 202);
    assert_eq!(received(), 3_000_000);
    let done = send(3_000_000, last);
    assert_eq!(done.status, 200, "{}", text(&done.body));
    assert_eq!(done.json()["size"], json!(total));
    assert!(api.get(&at("/volume/f")).body == content);
    so_far().refused(404, "no_file");
    assert_eq!(names(&api.get(&at("/volume?as=list")).json()), ["f"]);

    // Less than was announced, no name, no sense.
    api.ask("PUT", &upload, &[], b"x").refused(400, "bad_request");
    let range = ["content-range: bytes 0-9/10"];
    api.ask("PUT", &at("/volume/f"), &range, b"0123456789").refused(400, "bad_request");
    api.ask("PUT", &upload, &["content-range: bytes 5-2/10"], b"x").refused(400, "bad_request");
    api.ask("PUT", &at("/volume/f?upload=../x"), &range, b"0").refused(400, "bad_request");
    api.ask("PUT", &upload, &range, b"short").refused(400, "broken_off");
    assert_eq!(so_far().json()["received"], 5);
    api.ask("PUT", &upload, &range, b"more than ten").refused(400, "broken_off");
    assert_eq!(api.ask("DELETE", &upload, &[], &[]).status, 204);
    so_far().refused(404, "no_file");
    assert!(api.get(&at("/volume/f")).body == content);
    // Without a name, one that is cut leaves nothing.
    let mut cut = api.connect();
    let path = at("/volume/g");
    write!(cut, "PUT {path} HTTP/1.1\r\nhost: it\r\ncontent-length: 100\r\n\r\nhalf").unwrap();
    drop(cut);
    until("it leaves nothing", || names(&api.get(&at("/volume?as=list")).json()) == ["f"]);
}

#[test]
fn a_large_folder_is_listed_in_parts() {
    let api = begin(&[]);
    let made = api.0.exec("a", "mkdir many; cd many; seq 2500 | xargs touch; touch 'a&b=%41'");
    assert!(made.status.success());
    let mut path = at("/volume/many?as=list");
    let mut seen = Vec::new();
    let mut parts = 0;
    loop {
        let part = api.get(&path).json();
        seen.extend(names(&part).into_iter().map(str::to_owned));
        parts += 1;
        let Some(next) = part["next"].as_str() else { break };
        path = at(&format!("/volume/many?as=list&after={next}"));
    }
    assert_eq!((parts, seen.len()), (3, 2501));
    assert!(seen.is_sorted());
    let one = api.get(&at("/volume/many?as=list&limit=1&after=999")).json();
    assert_eq!((names(&one), &one["next"]), (vec!["a&b=%41"], &Value::Null));
    let one = api.get(&at("/volume/many?as=list&limit=1&after=a%26b%3D%2541")).json();
    assert_eq!(names(&one), [""; 0]);
    api.get(&at("/volume/many/1?as=list")).refused(409, "not_folder");
}

#[test]
fn folders_come_and_go_as_archives_and_hostile_ones_do_nothing() {
    let api = begin(&[]);
    let made = api.0.exec("a", "mkdir -p d/e; echo x > d/e/f; chmod 700 d/e/f; ln -s e/f d/link");
    assert!(made.status.success());
    let archive = api.get(&at("/volume/d?as=tar"));
    assert_eq!(archive.header("content-type"), Some("application/x-tar"));
    let tar = ["content-type: application/x-tar"];
    let unpacked = api.ask("PUT", &at("/volume/copy?as=tar"), &tar, &archive.body());
    assert_eq!(unpacked.status, 201, "{}", text(&unpacked.body));
    let same = api.0.exec("a", "diff -r d copy && stat -c %a copy/e/f && readlink copy/link");
    assert_eq!(text(&same.stdout), "700\ne/f\n");
    api.get(&at("/volume/d/e/f?as=tar")).refused(409, "not_folder");
    api.ask("PUT", &at("/volume/x?as=tar"), &[], b"x").refused(415, "bad_type");
    let garbage = vec![b'x'; 2048];
    api.ask("PUT", &at("/volume/x?as=tar"), &tar, &garbage).refused(422, "bad_archive");

    let outside = api.0.state.path().join("outside");
    for hostile in [
        entry("../../../../../../../etc/hostile", b'0', "", b"x"),
        entry("a/../../hostile", b'0', "", b"x"),
        // Through a link that it brought itself.
        [entry("l", b'2', "/etc", b""), entry("l/hostile", b'0', "", b"x")].concat(),
        entry("h", b'1', "/etc/passwd", b""),
        entry("h", b'1', "../../etc/passwd", b""),
        entry("null", b'3', "", b""),
        entry("disk", b'4', "", b""),
    ] {
        let mut archive = hostile;
        archive.extend([0; 1024]);
        let refused = api.ask("PUT", &at("/volume/hostile?as=tar"), &tar, &archive);
        assert!(matches!(refused.status, 400..500), "{}", text(&refused.body));
    }
    // An absolute path is one in the folder.
    let mut archive = entry(outside.to_str().unwrap(), b'0', "", b"x");
    archive.extend([0; 1024]);
    assert_eq!(api.ask("PUT", &at("/volume/abs?as=tar"), &tar, &archive).status, 201);
    assert!(!outside.exists());
    let found =
        api.0.exec("a", "ls /etc/hostile /volume/../hostile; find hostile -type b -o -type c");
    assert_eq!(text(&found.stdout), "");
}

/// A file in a tar archive (pax(1), ustar).
fn entry(name: &str, kind: u8, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0000644");
    header[108..115].copy_from_slice(b"0000000");
    header[116..123].copy_from_slice(b"0000000");
    header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    header[136..147].copy_from_slice(b"00000000000");
    header[148..156].copy_from_slice(b"        ");
    header[156] = kind;
    header[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    let mut all = header.to_vec();
    all.extend_from_slice(content);
    all.resize(all.len().next_multiple_of(512), 0);
    all
}

#[test]
fn changes_in_a_folder_are_told() {
    let api = begin(&[]);
    assert!(api.0.exec("a", "mkdir -p d/e").status.success());
    let mut flat = api.follow("GET", &at("/volume/d?as=watch"), &[], &Value::Null);
    let deep = at("/volume/d?as=watch&recursive=true");
    let mut deep = api.follow("GET", &deep, &[], &Value::Null);
    // Whoever watches uses the session.
    assert_eq!(api.get("/v1/sessions/a").json()["in_use"], true);
    assert!(api.0.exec("a", "echo x > d/e/f; mv d/e/f 'd/g h'; rm 'd/g h'").status.success());
    let mut of = |kind: &str, path: &str| {
        let (_, _, change) =
            deep.find(|(_, _, it)| it["kind"] == kind && it["path"] == path).unwrap();
        change
    };
    of("created", "/volume/d/e/f");
    of("written", "/volume/d/e/f");
    of("renamed", "/volume/d/e/f");
    assert_eq!(of("created", "/volume/d/g h")["escaped"], "/volume/d/g%20h");
    of("removed", "/volume/d/g h");
    let (kind, _, first) = flat.next().unwrap();
    assert_eq!((kind.as_str(), &first["path"]), ("change", &json!("/volume/d/g h")));
    api.get(&at("/volume/none?as=watch")).refused(404, "no_file");
    drop((flat, deep));
    until("nobody uses it", || api.get("/v1/sessions/a").json()["in_use"] == false);
}

#[test]
fn a_session_is_stopped_by_force_whoever_reads_or_writes_its_files() {
    for isolation in ["sandbox", "host"] {
        let api = begin(&["--isolation", isolation]);
        assert!(api.0.exec("a", "head -c 50000000 /dev/zero > large").status.success());
        let watch = api.follow("GET", &at("/~?as=watch"), &[], &Value::Null);
        let mut slow = api.send("GET", &at("/~/large"), &[], &[]);
        slow.read_exact(&mut [0; 1000]).unwrap();
        let mut writer = api.connect();
        let path = at("/~/new");
        write!(writer, "PUT {path} HTTP/1.1\r\nhost: it\r\ncontent-length: 9\r\n\r\n").unwrap();
        let all = || api.get(&at("/~?as=list")).json();
        until("it is being written", || names(&all()).iter().any(|it| it.starts_with(".denizen-")));
        api.ask("POST", "/v1/sessions/a/stop", &[], &[]).refused(409, "in_use");
        let stopped = api.ask("POST", "/v1/sessions/a/stop?force=true", &[], &[]);
        assert_eq!(stopped.status, 204, "{}", text(&stopped.body));
        // It has an end now; before that, it may tell of the upload.
        watch.for_each(drop);
        let mut told = [0; 12];
        writer.read_exact(&mut told).unwrap();
        assert_eq!(text(&told), "HTTP/1.1 409");
        // It goes on as ever; what was ended with all else may have left a part of the new one.
        assert!(names(&all()).contains(&"large") && !names(&all()).contains(&"new"));
    }
}

#[test]
fn who_reads_slowly_holds_nothing_up_and_little_memory() {
    let api = begin(&[]);
    let made = api.0.exec("a", "head -c 200000000 /dev/zero > large");
    assert!(made.status.success());
    let memory = || {
        let status = format!("/proc/{}/status", api.0.daemon_pid().unwrap());
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let before = memory();
    let mut slow: Vec<_> =
        (0..24).map(|_| api.send("GET", &at("/volume/large"), &[], &[])).collect();
    for reader in &mut slow {
        reader.read_exact(&mut [0; 1000]).unwrap();
    }
    // Others are served meanwhile.
    assert_eq!(api.get(&at("/volume/large")).body.len(), 200_000_000);
    let grown = memory().saturating_sub(before);
    assert!(grown < 48 * 1024, "{grown} KiB more");
}
