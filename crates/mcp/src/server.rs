//! The handler: what MCP asks for, answered by the tools and resources.

// What the protocol is about to drop is served to those who still use it.
#![allow(deprecated)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use denizen_client::api::Whoami;
use futures::future::BoxFuture;
use http::request::Parts;
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CompleteRequestParams, CompleteResult, CompletionInfo,
    Implementation, ListResourceTemplatesResult, ListResourcesResult, ListToolsResult,
    LoggingLevel, LoggingMessageNotificationParam, PaginatedRequestParams,
    ReadResourceRequestParams, ReadResourceResponse, ReadResourceResult, Reference,
    ServerCapabilities, ServerConfig, SetLevelRequestParams, Tool,
};
use rmcp::service::{RequestContext, RoleServer, ServiceExt};
use rmcp::{ErrorData, ServerHandler};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::call::{Call, Door, name};
use crate::forward::Forwards;
use crate::output::Outputs;
use crate::{resources, tools};

/// What a client tells its model of this server.
const INSTRUCTIONS: &str = "\
Each session is a computer of its own: its files stay between calls, and what runs in the \
background goes on. A call that names no session uses one that belongs to this client; \
list_sessions says which. Paths are absolute in the session or relative to its working directory. \
Take a snapshot before something that is hard to undo, and restore it if that went wrong; fork a \
session to try several ways.";

/// Nothing is logged to a client until it says so.
const SILENT: u8 = u8::MAX;

/// Has the daemon started if it is not there; why it is not, if it cannot be.
pub type Wake = Box<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// A server of MCP, for one client or for one request of one.
pub struct Server {
    /// By which all requests reach the daemon; else each has a [`Door`] with it.
    door: Option<Door>,
    /// Sees to it that the daemon is there.
    wake: Option<Wake>,
    outputs: Arc<Outputs>,
    /// Only for who is on this machine.
    forwards: Option<Forwards>,
    whoami: OnceCell<Arc<Whoami>>,
    level: AtomicU8,
}

impl Server {
    /// One whose requests all reach the daemon by one door, and which has that started.
    pub fn new(door: Door, wake: Wake) -> Self {
        let (door, wake, forwards) = (Some(door), Some(wake), Some(Forwards::default()));
        Self { door, wake, forwards, ..Self::by_request(Arc::default()) }
    }

    /// One whose requests come by HTTP, each with a door among its extensions.
    pub(crate) fn by_request(outputs: Arc<Outputs>) -> Self {
        let (whoami, level) = (OnceCell::new(), AtomicU8::new(SILENT));
        Self { door: None, wake: None, outputs, forwards: None, whoami, level }
    }

    async fn call<'a>(
        &'a self,
        context: &'a RequestContext<RoleServer>,
    ) -> Result<Call<'a>, ErrorData> {
        // One that was started in the background leaves when there is nothing to do for a while.
        if let Some(wake) = &self.wake {
            wake().await.map_err(|why| ErrorData::internal_error(why, None))?;
        }
        let asked = context.extensions.get::<Parts>();
        let door = self.door.as_ref().or_else(|| asked?.extensions.get::<Door>()).cloned();
        let door = door.ok_or_else(|| {
            ErrorData::internal_error("it is not known who asks".to_owned(), None)
        })?;
        let (outputs, forwards) = (&*self.outputs, self.forwards.as_ref());
        Ok(Call { door, context, outputs, forwards, whoami: &self.whoami })
    }

    /// Does it, until it is done or the client wants it no more; what is dropped then ends.
    async fn until_cancelled<T>(
        context: &RequestContext<RoleServer>,
        work: impl Future<Output = Result<T, ErrorData>>,
    ) -> Result<T, ErrorData> {
        tokio::select! {
            done = work => done,
            // Nobody reads this.
            () = context.ct.cancelled() => {
                Err(ErrorData::invalid_request("the request was cancelled".to_owned(), None))
            }
        }
    }

    /// Tells a client that wants to know what is called.
    async fn log(&self, context: &RequestContext<RoleServer>, tool: &str) {
        if self.level.load(Ordering::Relaxed) > number(LoggingLevel::Info) {
            return;
        }
        let told =
            LoggingMessageNotificationParam::new(LoggingLevel::Info, json!({ "tool": tool }));
        // A client that does not take it does without.
        let _ = context.peer.notify_logging_message(told.with_logger("denizen")).await;
    }
}

/// How much a level weighs.
fn number(level: LoggingLevel) -> u8 {
    level as u8
}

impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        let capabilities = ServerCapabilities::builder()
            .enable_tools()
            .enable_resources()
            .enable_completions()
            .enable_logging()
            .build();
        let mut info = ServerConfig::new(capabilities);
        info.server_info = Implementation::new("denizen", env!("CARGO_PKG_VERSION"));
        info.instructions = Some(INSTRUCTIONS.to_owned());
        info
    }

    async fn list_tools(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        Ok(ListToolsResult::with_all_items(tools::list()))
    }

    fn get_tool(&self, name: &str) -> Option<Tool> {
        tools::named(name)
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        let call = self.call(&context).await?;
        self.log(&context, &request.name).await;
        let arguments = Value::Object(request.arguments.unwrap_or_default());
        let done = Self::until_cancelled(&context, async {
            let done = tools::call(&call, &request.name, arguments).await;
            done.ok_or_else(|| {
                ErrorData::invalid_params(format!("there is no tool {}", request.name), None)
            })
        });
        Ok(done.await?.into())
    }

    async fn list_resources(
        &self,
        _: Option<PaginatedRequestParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<ListResourcesResult, ErrorData> {
        let call = self.call(&context).await?;
        let all = Self::until_cancelled(&context, resources::list(&call)).await?;
        Ok(ListResourcesResult::with_all_items(all))
    }

    async fn list_resource_templates(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListResourceTemplatesResult, ErrorData> {
        Ok(ListResourceTemplatesResult::with_all_items(vec![resources::template()]))
    }

    async fn read_resource(
        &self,
        request: ReadResourceRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<ReadResourceResponse, ErrorData> {
        let call = self.call(&context).await?;
        let read = resources::read(&call, &request.uri);
        let content = Self::until_cancelled(&context, read).await?;
        Ok(ReadResourceResult::new(vec![content]).into())
    }

    /// Names of sessions, for the template of resources; there is nothing else to complete.
    async fn complete(
        &self,
        request: CompleteRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CompleteResult, ErrorData> {
        let is_session = matches!(&request.r#ref, Reference::Resource(it) if it.uri == resources::TEMPLATE)
            && request.argument.name == "session";
        if !is_session {
            return Ok(CompleteResult::default());
        }
        let call = self.call(&context).await?;
        let all = Self::until_cancelled(&context, async {
            let all = call.client().sessions().await;
            all.map_err(|error| ErrorData::internal_error(error.to_string(), None))
        });
        let names = all.await?.iter().map(name).collect::<Vec<_>>();
        let fit = names.into_iter().filter(|name| name.starts_with(&request.argument.value));
        let fit = fit.take(CompletionInfo::MAX_VALUES).collect();
        let fit = CompletionInfo::new(fit).map_err(|why| ErrorData::internal_error(why, None))?;
        Ok(CompleteResult::new(fit))
    }

    async fn set_level(
        &self,
        request: SetLevelRequestParams,
        _: RequestContext<RoleServer>,
    ) -> Result<(), ErrorData> {
        self.level.store(number(request.level), Ordering::Relaxed);
        Ok(())
    }
}

/// Why standard input and output do not serve.
#[derive(Debug, thiserror::Error)]
#[error("MCP on standard input and output: {0}")]
pub struct StdioError(String);

/// Serves on standard input and output, until the input ends. What still runs in the foreground
/// then is killed. Not cancel-safe: dropped, what is being asked for is not answered.
///
/// # Errors
/// [`StdioError`], if no client of MCP is there.
pub async fn stdio(door: Door, wake: Wake) -> Result<(), StdioError> {
    let failed = |error: &dyn std::fmt::Display| StdioError(error.to_string());
    let server = Server::new(door, wake);
    let serving = Box::pin(server.serve(rmcp::transport::io::stdio_pipes())).await;
    serving.map_err(|error| failed(&error))?.waiting().await.map_err(|error| failed(&error))?;
    Ok(())
}
