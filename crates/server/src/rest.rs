//! What is left of a request when it is refused half-way. A client that is still sending when
//! its connection is closed sees a broken pipe instead of the answer, so the server reads on for
//! a while. It must never keep what it reads.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use futures::StreamExt;
use hyper::body::Body as _;
use parking_lot::Mutex;

/// How long it reads on: enough for whoever sends as fast as it can to see that it need not.
const A_WHILE: Duration = Duration::from_secs(5);

/// A body that is read by whoever it is for, and then by us.
#[derive(Clone)]
struct Rest(Arc<Mutex<BodyDataStream>>);

impl Rest {
    fn poll(&self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, axum::Error>>> {
        self.0.lock().poll_next_unpin(context)
    }

    async fn read(self) {
        let end = poll_fn(|context| {
            while let Some(Ok(_)) = ready!(self.poll(context)) {}
            Poll::Ready(())
        });
        // Who sends for ever is cut off.
        let _ = tokio::time::timeout(A_WHILE, end).await;
    }
}

/// Answers as `next` does, and reads on where that is an error.
pub(crate) async fn read_on(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    let rest = Rest(Arc::new(Mutex::new(body.into_data_stream())));
    let reading = rest.clone();
    let body = Body::from_stream(futures::stream::poll_fn(move |context| reading.poll(context)));
    let answer = next.run(Request::from_parts(parts, body)).await;
    if answer.status().is_client_error() || answer.status().is_server_error() {
        tokio::spawn(rest.read());
    }
    answer
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::put;

    use super::*;

    #[tokio::test]
    async fn who_is_still_sending_sees_why_it_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let full = put(async || (StatusCode::INSUFFICIENT_STORAGE, "no room"));
        let app = Router::new().route("/", full).layer(axum::middleware::from_fn(read_on));
        let server = tokio::spawn(async { axum::serve(listener, app).await });
        let told = tokio::task::spawn_blocking(move || {
            let mut client = UnixStream::connect(socket).unwrap();
            let head = "PUT / HTTP/1.1\r\nhost: it\r\nconnection: close\r\n";
            write!(client, "{head}content-length: {}\r\n\r\n", 64 << 20).unwrap();
            for _ in 0..64 {
                client.write_all(&vec![0; 1 << 20]).unwrap();
            }
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            answer
        });
        assert!(told.await.unwrap().ends_with("no room"));
        server.abort();
    }
}
