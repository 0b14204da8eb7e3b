//! What the daemon tells of its work: a log on standard error, and traces to an OpenTelemetry
//! collector (OTLP over HTTP) where the standard variables name one. Without them nothing of that
//! is there, and nothing costs anything. A collector that is slow or gone must never hold the
//! daemon up: what does not fit its queue is dropped.

use std::io::IsTerminal;

use opentelemetry::trace::TracerProvider;
use opentelemetry::{KeyValue, global};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, reload};

use crate::{Failure, Result};

/// How the daemon's log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// A JSON object in each line.
    Json,
}

/// Ends the traces when it is dropped: what is still to be sent is sent then.
pub struct Telemetry(Option<SdkTracerProvider>);

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(provider) = self.0.take()
            && let Err(error) = provider.shutdown()
        {
            tracing::warn!(%error, "not all traces were sent");
        }
    }
}

/// Changes what the log tells.
pub type Filter = Box<dyn Fn(EnvFilter) -> std::result::Result<(), String> + Send + Sync>;

/// What the log is to tell, in the words of the setting `log`. What clients of MCP say is no part
/// of it, unless it is asked for.
pub fn parsed(filter: &str) -> Result<EnvFilter> {
    let quiet = if filter.contains("rmcp") { "" } else { ",rmcp=off" };
    EnvFilter::try_new(format!("{filter}{quiet}"))
        .map_err(|error| Failure::new(format!("`log` is {filter:?}: {error}")))
}

/// Begins to tell. Once in a process.
pub fn begin(format: LogFormat, filter: &str) -> Result<(Telemetry, Filter)> {
    let (filter, handle) = reload::Layer::new(parsed(filter)?);
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let log = match format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => log.json().flatten_event(true).with_current_span(false).boxed(),
    };
    // Also without a collector: what a client sends is handed on.
    global::set_text_map_propagator(TraceContextPropagator::new());
    let failed = |error| Failure::new(format!("cannot send traces: {error}"));
    let provider = provider().map_err(failed)?;
    let traces = provider.as_ref().map(|provider| {
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("denizen"));
        let layer = layer.with_location(false).with_threads(false).with_tracked_inactivity(false);
        layer.with_filter(Targets::new().with_target("denizen", LevelFilter::INFO))
    });
    tracing_subscriber::registry().with(log.with_filter(filter)).with(traces).init();
    let change = move |filter| handle.reload(filter).map_err(|error| error.to_string());
    Ok((Telemetry(provider), Box::new(change)))
}

/// What sends spans, if there is somebody to send them to.
fn provider() -> std::result::Result<Option<SdkTracerProvider>, ExporterBuildError> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let is_off = set("OTEL_SDK_DISABLED").is_some_and(|it| it.eq_ignore_ascii_case("true"))
        || set("OTEL_TRACES_EXPORTER").is_some_and(|it| it != "otlp");
    let endpoints = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
    if is_off || endpoints.into_iter().all(|name| set(name).is_none()) {
        return Ok(None);
    }
    // Somebody else may have chosen one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let exporter = SpanExporter::builder().with_http().build()?;
    let mut resource = Resource::builder()
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    let is_named = set("OTEL_SERVICE_NAME").is_some()
        || set("OTEL_RESOURCE_ATTRIBUTES").is_some_and(|it| it.contains("service.name="));
    if !is_named {
        resource = resource.with_service_name("denizen");
    }
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter);
    Ok(Some(provider.with_resource(resource.build()).build()))
}
