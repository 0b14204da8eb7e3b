//! A repository in a bucket of S3, or of a server that speaks its protocol.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    RetryConfig,
};
use tokio::runtime::{Handle, Runtime};

use super::{Files, Range};
use crate::error::Error;

/// How long one request may take, and how long a request that fails for a reason that passes
/// is tried again. After that the backup has failed, and is tried again as a whole.
const REQUEST: Duration = Duration::from_mins(2);
const AGAIN: Duration = Duration::from_mins(1);
const TRIES: usize = 8;

/// A place in an object store.
pub struct Bucket {
    store: AmazonS3,
    place: String,
    prefix: String,
    /// Callers block, on threads that may belong to a runtime or to nobody.
    handle: Handle,
    runtime: Option<Runtime>,
}

impl Drop for Bucket {
    /// Where it is dropped nobody may be able to wait for it.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl std::fmt::Debug for Bucket {
    /// Without what lets us in.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bucket").field("place", &self.place).finish_non_exhaustive()
    }
}

/// How long a bucket is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long one request may take.
    pub request: Duration,
    /// How long a request that fails for a reason that passes is tried again.
    pub again: Duration,
    /// How many times it is tried again at most.
    pub tries: usize,
    /// How long it is left alone after the first failure; after each further one twice as long,
    /// up to 15 seconds.
    pub pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let pause = Duration::from_millis(100);
        Self { request: REQUEST, again: AGAIN, tries: TRIES, pause }
    }
}

impl Bucket {
    /// A bucket, and what all names in it begin with. What is not given is found as the AWS tools
    /// find it.
    ///
    /// # Errors
    /// [`Error::Destination`] if what is given or found cannot be used.
    pub fn open(bucket: &str, prefix: &str) -> Result<Self, Error> {
        Self::with(bucket, prefix, AmazonS3Builder::from_env(), Patience::default())
    }

    /// The same with the server and the credentials given, and with other patience.
    ///
    /// # Errors
    /// As with [`Bucket::open`].
    pub fn open_at(
        bucket: &str,
        prefix: &str,
        server: &str,
        [key, secret]: [&str; 2],
        patience: Patience,
    ) -> Result<Self, Error> {
        let builder = AmazonS3Builder::new().with_endpoint(server).with_region("us-east-1");
        let builder = builder.with_access_key_id(key).with_secret_access_key(secret);
        Self::with(bucket, prefix, builder, patience)
    }

    fn with(
        bucket: &str,
        prefix: &str,
        builder: AmazonS3Builder,
        patience: Patience,
    ) -> Result<Self, Error> {
        let place = super::Destination::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() };
        let failed = |problem: String| Error::Destination { text: place.to_string(), problem };
        // The process may have chosen another one already: any will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let keys = [AmazonS3ConfigKey::S3Endpoint, AmazonS3ConfigKey::Endpoint];
        let endpoint = keys.iter().find_map(|key| builder.get_config_value(key));
        let plain = endpoint.is_some_and(|url| url.starts_with("http://"));
        let client = ClientOptions::new().with_timeout(patience.request).with_allow_http(plain);
        let backoff = BackoffConfig { init_backoff: patience.pause, ..BackoffConfig::default() };
        let (max_retries, retry_timeout) = (patience.tries, patience.again);
        let retry = RetryConfig { backoff, max_retries, retry_timeout };
        let store = builder
            .with_bucket_name(bucket)
            .with_client_options(client)
            .with_retry(retry)
            // One by one, which every server knows.
            .with_disable_bulk_delete(true)
            .build()
            .map_err(|error| failed(error.to_string()))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("denizen-s3")
            .enable_all()
            .build()
            .map_err(|error| failed(error.to_string()))?;
        Ok(Self {
            store,
            place: place.to_string(),
            prefix: prefix.to_owned(),
            handle: runtime.handle().clone(),
            runtime: Some(runtime),
        })
    }

    fn path(&self, name: &str) -> Path {
        if self.prefix.is_empty() {
            Path::from(name)
        } else {
            Path::from(format!("{}/{name}", self.prefix))
        }
    }

    /// Runs a request to its end. Callers are on threads that may block, some of them within a
    /// runtime of their own, where this one must not be entered: it works elsewhere meanwhile.
    fn wait<T: Send>(
        &self,
        request: impl Future<Output = object_store::Result<T>> + Send,
    ) -> io::Result<T> {
        let done = if Handle::try_current().is_ok() {
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| self.handle.block_on(request));
                waiting.join().map_err(|_| io::Error::other("the request panicked"))
            })?
        } else {
            self.handle.block_on(request)
        };
        done.map_err(|error| {
            let kind = match &error {
                object_store::Error::NotFound { .. } => io::ErrorKind::NotFound,
                object_store::Error::AlreadyExists { .. } => io::ErrorKind::AlreadyExists,
                object_store::Error::PermissionDenied { .. }
                | object_store::Error::Unauthenticated { .. } => io::ErrorKind::PermissionDenied,
                _ => io::ErrorKind::Other,
            };
            io::Error::new(kind, error)
        })
    }
}

impl Files for Bucket {
    fn place(&self) -> String {
        self.place.clone()
    }

    fn is_far(&self) -> bool {
        true
    }

    fn prepare(&self) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<(String, u64)>> {
        let path = self.path(folder);
        let found: Vec<_> = self.wait(self.store.list(Some(&path)).try_collect())?;
        let cut = if self.prefix.is_empty() { 0 } else { self.prefix.len() + 1 };
        let names = found
            .into_iter()
            .filter_map(|meta| Some((meta.location.as_ref().get(cut..)?.to_owned(), meta.size)));
        Ok(names.collect())
    }

    fn size(&self, name: &str) -> io::Result<Option<u64>> {
        match self.wait(self.store.head(&self.path(name))) {
            Ok(meta) => Ok(Some(meta.size)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read(&self, name: &str, range: Option<Range>) -> io::Result<Bytes> {
        let path = self.path(name);
        let Some(Range { offset, length }) = range else {
            return self.wait(async { self.store.get(&path).await?.bytes().await });
        };
        self.wait(self.store.get_range(&path, offset..offset.saturating_add(length)))
    }

    fn write(&self, name: &str, content: Vec<Bytes>, new: bool) -> io::Result<()> {
        let mode = if new { PutMode::Create } else { PutMode::Overwrite };
        let options = PutOptions { mode, ..PutOptions::default() };
        let payload = PutPayload::from_iter(content);
        self.wait(self.store.put_opts(&self.path(name), payload, options)).map(drop)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.wait(self.store.delete(&self.path(name)))
    }

    /// What is not whole is not there.
    fn sweep(&self) -> io::Result<()> {
        Ok(())
    }
}
