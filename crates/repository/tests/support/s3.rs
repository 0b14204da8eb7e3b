//! The smallest server that speaks the part of S3's protocol that backups need (the API reference
//! of Amazon S3: GetObject, HeadObject, PutObject, DeleteObject, DeleteObjects is not one of them,
//! ListObjectsV2), and fails when it is told to. One request, one connection: so that each may end
//! in its own way.
#![allow(clippy::unwrap_used, dead_code)]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// What a request meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// 500, and nothing is done.
    Internal,
    /// 503, and nothing is done.
    SlowDown,
    /// 403.
    Forbidden,
    /// The connection is reset before anything is done.
    Reset,
    /// It is done, and nobody hears of it.
    Unanswered,
    /// The same, but the connection stays open until the client gives up.
    Silent,
    /// The answer ends in its middle.
    Truncated,
    /// What is listed is what was there a while ago.
    Stale,
}

type Objects = BTreeMap<String, Vec<u8>>;

/// Says for each request, by its number, method and path, what it meets.
pub type Plan = Box<dyn Fn(u64, &str, &str) -> Option<Trouble> + Send + Sync>;

pub struct Server {
    pub address: SocketAddr,
    pub objects: Mutex<Objects>,
    stale: Mutex<Objects>,
    plan: Mutex<Option<Plan>>,
    requests: Mutex<u64>,
    /// Ends those that are silent.
    over: (Mutex<bool>, Condvar),
    stopped: AtomicBool,
}

impl Server {
    pub fn start() -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            objects: Mutex::default(),
            stale: Mutex::default(),
            plan: Mutex::default(),
            requests: Mutex::default(),
            over: Default::default(),
            stopped: AtomicBool::new(false),
        });
        let accepting = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if accepting.stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (server, stream) = (accepting.clone(), stream.unwrap());
                // A client that goes away is none of the server's troubles.
                std::thread::spawn(move || drop(server.serve(&stream)));
            }
        });
        server
    }

    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        *self.over.0.lock().unwrap() = true;
        self.over.1.notify_all();
        drop(TcpStream::connect(self.address));
    }

    pub fn plan(&self, plan: Option<Plan>) {
        *self.requests.lock().unwrap() = 0;
        *self.stale.lock().unwrap() = self.objects.lock().unwrap().clone();
        *self.plan.lock().unwrap() = plan;
    }

    pub fn requests(&self) -> u64 {
        *self.requests.lock().unwrap()
    }

    fn serve(&self, stream: &TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let mut words = line.split_whitespace();
        let (Some(method), Some(target)) = (words.next(), words.next()) else { return Ok(()) };
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            match line.trim_end().split_once(':') {
                Some((name, value)) => {
                    headers.insert(name.to_ascii_lowercase(), value.trim().to_owned())
                }
                None => break,
            };
        }
        let length = headers.get("content-length").map_or(0, |it| it.parse().unwrap());
        let mut body = vec![0; length];
        if headers.contains_key("expect") {
            (&*stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        reader.read_exact(&mut body)?;
        let number = {
            let mut requests = self.requests.lock().unwrap();
            *requests += 1;
            *requests - 1
        };
        let trouble = self.plan.lock().unwrap().as_ref().and_then(|it| it(number, method, target));
        let answer = |status: &str, more: &str, body: &[u8], cut: bool| {
            let head = format!(
                "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n{more}\r\n",
                body.len()
            );
            (&*stream).write_all(head.as_bytes())?;
            let length = if cut { body.len() / 2 } else { body.len() };
            if method != "HEAD" {
                (&*stream).write_all(&body[..length])?;
            }
            Ok(())
        };
        let signed = headers.get("authorization").is_some_and(|it| it.contains("Credential="));
        match trouble {
            Some(Trouble::Reset) => return Ok(()),
            Some(Trouble::Internal) => {
                return answer(
                    "500 Internal Server Error",
                    "",
                    b"<Error><Code>InternalError</Code></Error>",
                    false,
                );
            }
            Some(Trouble::SlowDown) => {
                return answer("503 Slow Down", "", b"<Error><Code>SlowDown</Code></Error>", false);
            }
            Some(Trouble::Forbidden) => {
                return answer(
                    "403 Forbidden",
                    "",
                    b"<Error><Code>AccessDenied</Code></Error>",
                    false,
                );
            }
            _ if !signed => {
                return answer(
                    "403 Forbidden",
                    "",
                    b"<Error><Code>AccessDenied</Code></Error>",
                    false,
                );
            }
            _ => {}
        }
        let (status, more, content) = self.act(method, target, &headers, body, trouble);
        match trouble {
            Some(Trouble::Unanswered) => Ok(()),
            Some(Trouble::Silent) => {
                let over = self.over.0.lock().unwrap();
                drop(self.over.1.wait_while(over, |over| !*over).unwrap());
                Ok(())
            }
            trouble => answer(&status, &more, &content, trouble == Some(Trouble::Truncated)),
        }
    }

    fn act(
        &self,
        method: &str,
        target: &str,
        headers: &BTreeMap<String, String>,
        body: Vec<u8>,
        trouble: Option<Trouble>,
    ) -> (String, String, Vec<u8>) {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        // Path style: the bucket is the first step.
        let key =
            path.trim_start_matches('/').split_once('/').map_or("", |(_, key)| key).to_owned();
        let mut objects = self.objects.lock().unwrap();
        let etag = |content: &[u8]| {
            format!(
                "etag: \"{:x}\"\r\nlast-modified: Tue, 01 Jan 2030 00:00:00 GMT\r\n",
                content.len()
            )
        };
        let missing = || {
            (
                "404 Not Found".to_owned(),
                String::new(),
                b"<Error><Code>NoSuchKey</Code></Error>".to_vec(),
            )
        };
        match method {
            "GET" if query.contains("list-type=2") => {
                let decode = |text: &str| text.replace("%2F", "/");
                let prefix = query
                    .split('&')
                    .find_map(|it| it.strip_prefix("prefix="))
                    .map_or(String::new(), decode);
                let after = query
                    .split('&')
                    .find_map(|it| it.strip_prefix("continuation-token="))
                    .map(decode);
                let stale = self.stale.lock().unwrap();
                let from = if trouble == Some(Trouble::Stale) { &*stale } else { &*objects };
                let mut found: Vec<_> = from
                    .iter()
                    .filter(|(name, _)| name.starts_with(&prefix))
                    .filter(|(name, _)| after.as_ref().is_none_or(|after| *name > after))
                    .collect();
                // Small pages, so that there are several.
                let more = found.len() > 7;
                found.truncate(7);
                let next = found.last().filter(|_| more).map_or(String::new(), |(name, _)| {
                    format!("<NextContinuationToken>{name}</NextContinuationToken>")
                });
                let contents: String = found
                    .iter()
                    .map(|(name, content)| {
                        format!(
                            "<Contents><Key>{name}</Key><LastModified>2030-01-01T00:00:00.000Z</LastModified><ETag>\"{:x}\"</ETag><Size>{}</Size></Contents>",
                            content.len(),
                            content.len()
                        )
                    })
                    .collect();
                let xml = format!(
                    "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>{more}</IsTruncated>{next}{contents}</ListBucketResult>"
                );
                (
                    "200 OK".to_owned(),
                    "content-type: application/xml\r\n".to_owned(),
                    xml.into_bytes(),
                )
            }
            "GET" | "HEAD" => {
                let Some(content) = objects.get(&key) else { return missing() };
                let range =
                    headers.get("range").and_then(|it| it.strip_prefix("bytes=")?.split_once('-'));
                let Some((start, end)) = range else {
                    return ("200 OK".to_owned(), etag(content), content.clone());
                };
                let start: usize = start.parse().unwrap();
                let end = end.parse().unwrap_or(usize::MAX).min(content.len() - 1);
                if start > end {
                    return ("416 Range Not Satisfiable".to_owned(), String::new(), Vec::new());
                }
                let more = format!(
                    "{}content-range: bytes {start}-{end}/{}\r\n",
                    etag(content),
                    content.len()
                );
                ("206 Partial Content".to_owned(), more, content[start..=end].to_vec())
            }
            "PUT" => {
                if headers.get("if-none-match").is_some_and(|it| it == "*")
                    && objects.contains_key(&key)
                {
                    return ("412 Precondition Failed".to_owned(), String::new(), Vec::new());
                }
                let etag = etag(&body);
                objects.insert(key, body);
                ("200 OK".to_owned(), etag, Vec::new())
            }
            "DELETE" => {
                objects.remove(&key);
                ("204 No Content".to_owned(), String::new(), Vec::new())
            }
            _ => ("400 Bad Request".to_owned(), String::new(), Vec::new()),
        }
    }
}
