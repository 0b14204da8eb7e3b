//! How fast bytes go through the proxy, beside a direct connection, and how long a request
//! takes: `cargo run --release --example speed`. All on loopback.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use denizen_network::{Egress, HostResolver, Rule, Rules};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const BYTES: usize = 2 << 30;
const REQUESTS: u32 = 2_000;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[tokio::main]
async fn main() -> Result<()> {
    let server = TcpListener::bind("127.0.0.1:0").await?;
    let to = server.local_addr()?;
    tokio::spawn(serve(server));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let by = listener.local_addr()?;
    let rules: Rules = ["127.0.0.1".parse::<Rule>()?].into_iter().collect();
    let egress = Egress::new(rules, Arc::new(HostResolver), |_| {});
    tokio::spawn(async move { egress.serve(listener, std::future::pending()).await });

    for _ in 0..3 {
        let direct = download(TcpStream::connect(to).await?).await?;
        let mut tunnel = TcpStream::connect(by).await?;
        let connect = format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n");
        tunnel.write_all(connect.as_bytes()).await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(tunnel.read_u8().await?);
        }
        let through = download(tunnel).await?;
        println!("direct {direct:.2} GiB/s, tunnel {through:.2} GiB/s");
    }
    let direct = request(to, &format!("GET /0 HTTP/1.1\r\nHost: {to}\r\n\r\n")).await?;
    let close = "Connection: close";
    let through =
        request(by, &format!("GET http://{to}/0 HTTP/1.1\r\nHost: {to}\r\n{close}\r\n\r\n"))
            .await?;
    println!("a request: direct {direct:?}, through the proxy {through:?}");
    Ok(())
}

/// Sends as many bytes as a GET's path says.
async fn serve(listener: TcpListener) {
    let bytes = vec![7; 256 * 1024];
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut head = vec![0; 1024];
        let Ok(length) = stream.read(&mut head).await else { continue };
        let text = String::from_utf8_lossy(&head[..length]).into_owned();
        let digits = text.trim_start_matches("GET /").split(' ').next().unwrap_or_default();
        let mut left = digits.parse().unwrap_or(0);
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {left}\r\n\r\n");
        let mut sent = stream.write_all(head.as_bytes()).await;
        while left > 0 && sent.is_ok() {
            let count = bytes.len().min(left);
            sent = stream.write_all(&bytes[..count]).await;
            left -= count;
        }
    }
}

async fn download(mut stream: TcpStream) -> Result<f64> {
    let begin = Instant::now();
    stream.write_all(format!("GET /{BYTES} HTTP/1.1\r\n\r\n").as_bytes()).await?;
    let (mut buffer, mut seen) = (vec![0; 256 * 1024], 0_u32);
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            break;
        }
        seen += u32::try_from(read)?;
    }
    Ok(f64::from(seen) / f64::from(1 << 30) / begin.elapsed().as_secs_f64())
}

async fn request(to: std::net::SocketAddr, text: &str) -> Result<Duration> {
    let begin = Instant::now();
    for _ in 0..REQUESTS {
        let mut stream = TcpStream::connect(to).await?;
        stream.write_all(text.as_bytes()).await?;
        stream.read_to_end(&mut Vec::new()).await?;
    }
    Ok(begin.elapsed() / REQUESTS)
}
