//! A server with the tools, resources and prompts that `@modelcontextprotocol/conformance` asks
//! for by name, behind the same HTTP as denizen's own. It says where it listens, and serves until
//! it is ended. Nothing of it is in the product.
#![allow(deprecated, clippy::unwrap_used, reason = "the suite asks for what is deprecated too")]

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{HOST, ORIGIN};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use denizen_client::{Client, Target};
use denizen_mcp::{Door, Http};
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, CompleteRequestParams, CompleteResult,
    ElicitRequest, GetPromptRequestParams, GetPromptResponse, GetPromptResult, ListPromptsResult,
    ListResourceTemplatesResult, ListResourcesResult, ListToolsResult, LoggingLevel,
    LoggingMessageNotificationParam, PaginatedRequestParams, ProgressNotificationParam,
    ReadResourceRequestParams, ReadResourceResponse, ReadResourceResult, ServerCapabilities,
    ServerConfig, ServerRequest, SetLevelRequestParams, SubscribeRequestParams,
    UnsubscribeRequestParams,
};
use rmcp::service::{RequestContext, RoleServer};
use rmcp::{ErrorData, ServerHandler};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// A picture of one red point.
const PNG: &str = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8DwHwAFBQIAX8jx0gAAAABJRU5ErkJggg==";
/// A sound of no length.
const WAV: &str = "UklGRiQAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQAAAAA=";

const PAUSE: Duration = Duration::from_millis(50);

struct Fixtures;

type Context = RequestContext<RoleServer>;

fn made<T: DeserializeOwned>(value: Value) -> Result<T, ErrorData> {
    serde_json::from_value(value)
        .map_err(|error| ErrorData::internal_error(error.to_string(), None))
}

fn text(text: impl Into<String>) -> Value {
    json!({ "type": "text", "text": text.into() })
}

fn resource(uri: &str, kind: &str, text: &str) -> Value {
    json!({ "type": "resource", "resource": { "uri": uri, "mimeType": kind, "text": text } })
}

fn image() -> Value {
    json!({ "type": "image", "data": PNG, "mimeType": "image/png" })
}

impl Fixtures {
    async fn ask_user(context: &Context, message: &str, schema: Value) -> Result<Value, ErrorData> {
        let params = json!({ "message": message, "requestedSchema": schema });
        let request = ElicitRequest::new(made(params)?);
        let answer = context.peer.send_request(ServerRequest::ElicitRequest(request)).await;
        let answer = answer.map_err(|error| ErrorData::internal_error(error.to_string(), None))?;
        let answer = serde_json::to_value(answer).unwrap_or_default();
        let told = format!("action={}, content={}", answer["action"], answer["content"]);
        Ok(json!([text(told)]))
    }

    async fn log(context: &Context, what: &str) {
        let told = LoggingMessageNotificationParam::new(LoggingLevel::Info, json!(what));
        let _ = context.peer.notify_logging_message(told).await;
        tokio::time::sleep(PAUSE).await;
    }

    async fn tool(&self, name: &str, input: Value, context: &Context) -> Result<Value, ErrorData> {
        Ok(match name {
            "test_simple_text" => {
                json!([text("This is a simple text response for testing.")])
            }
            "test_image_content" => json!([image()]),
            "test_audio_content" => {
                json!([{ "type": "audio", "data": WAV, "mimeType": "audio/wav" }])
            }
            "test_embedded_resource" => {
                let content = "This is an embedded resource content.";
                json!([resource("test://embedded-resource", "text/plain", content)])
            }
            "test_multiple_content_types" => {
                let content = r#"{"test":"data","value":123}"#;
                let embedded =
                    resource("test://mixed-content-resource", "application/json", content);
                json!([text("Multiple content types test:"), image(), embedded])
            }
            "test_tool_with_logging" => {
                Self::log(context, "Tool execution started").await;
                Self::log(context, "Tool processing data").await;
                Self::log(context, "Tool execution completed").await;
                json!([text("It has logged.")])
            }
            "test_tool_with_progress" => {
                if let Some(token) = context.meta.get_progress_token() {
                    for progress in [0.0, 50.0, 100.0] {
                        let told = ProgressNotificationParam::new(token.clone(), progress);
                        let _ = context.peer.notify_progress(told.with_total(100.0)).await;
                        tokio::time::sleep(PAUSE).await;
                    }
                }
                json!([text("It has made progress.")])
            }
            "test_sampling" => {
                let message = json!({ "role": "user", "content": text(input["prompt"].as_str().unwrap_or_default()) });
                let params = json!({ "messages": [message], "maxTokens": 100 });
                let answer = context.peer.create_message(made(params)?).await;
                let answer =
                    answer.map_err(|error| ErrorData::internal_error(error.to_string(), None))?;
                json!([text(format!("LLM response: {answer:?}"))])
            }
            "test_elicitation" => {
                let schema = json!({
                    "type": "object",
                    "properties": {
                        "username": { "type": "string", "description": "User's response" },
                        "email": { "type": "string", "description": "User's email address" },
                    },
                    "required": ["username", "email"],
                });
                Self::ask_user(context, input["message"].as_str().unwrap_or_default(), schema)
                    .await?
            }
            "test_elicitation_sep1034_defaults" => {
                let schema = json!({
                    "type": "object",
                    "properties": {
                        "name": { "type": "string", "default": "John Doe" },
                        "age": { "type": "integer", "default": 30 },
                        "score": { "type": "number", "default": 95.5 },
                        "status": { "type": "string", "enum": ["active", "inactive", "pending"], "default": "active" },
                        "verified": { "type": "boolean", "default": true },
                    },
                });
                Self::ask_user(context, "Please confirm", schema).await?
            }
            "test_elicitation_sep1330_enums" => {
                let titled = json!([
                    { "const": "value1", "title": "First" },
                    { "const": "value2", "title": "Second" },
                ]);
                let options = json!(["option1", "option2", "option3"]);
                let schema = json!({
                    "type": "object",
                    "properties": {
                        "untitledSingle": { "type": "string", "enum": options },
                        "titledSingle": { "type": "string", "oneOf": titled },
                        "legacyEnum": { "type": "string", "enum": ["opt1", "opt2"], "enumNames": ["One", "Two"] },
                        "untitledMulti": { "type": "array", "items": { "type": "string", "enum": options } },
                        "titledMulti": { "type": "array", "items": { "anyOf": titled } },
                    },
                });
                Self::ask_user(context, "Please choose", schema).await?
            }
            "test_reconnection" | "json_schema_2020_12_tool" => json!([text("Nothing is done.")]),
            _ => return Err(ErrorData::invalid_params(format!("no tool {name}"), None)),
        })
    }
}

impl ServerHandler for Fixtures {
    fn get_info(&self) -> ServerConfig {
        let capabilities = ServerCapabilities::builder()
            .enable_tools()
            .enable_prompts()
            .enable_resources()
            .enable_resources_subscribe()
            .enable_completions()
            .enable_logging();
        ServerConfig::new(capabilities.build())
    }

    async fn list_tools(
        &self,
        _: Option<PaginatedRequestParams>,
        _: Context,
    ) -> Result<ListToolsResult, ErrorData> {
        let names = [
            "test_simple_text",
            "test_image_content",
            "test_audio_content",
            "test_embedded_resource",
            "test_multiple_content_types",
            "test_tool_with_logging",
            "test_error_handling",
            "test_tool_with_progress",
            "test_sampling",
            "test_elicitation",
            "test_elicitation_sep1034_defaults",
            "test_elicitation_sep1330_enums",
            "test_reconnection",
        ];
        let any = json!({ "type": "object" });
        let mut tools: Vec<Value> = names
            .iter()
            .map(|name| json!({ "name": name, "description": "A fixture", "inputSchema": any }))
            .collect();
        tools.push(json!({
            "name": "json_schema_2020_12_tool",
            "description": "Tool with JSON Schema 2020-12 features",
            "inputSchema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "$defs": {
                    "address": {
                        "type": "object",
                        "properties": { "street": { "type": "string" }, "city": { "type": "string" } },
                    },
                },
                "properties": { "name": { "type": "string" }, "address": { "$ref": "#/$defs/address" } },
                "additionalProperties": false,
            },
        }));
        made(json!({ "tools": tools }))
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: Context,
    ) -> Result<CallToolResponse, ErrorData> {
        let input = Value::Object(request.arguments.unwrap_or_default());
        if request.name == "test_error_handling" {
            let told = text("This tool intentionally returns an error for testing");
            return Ok(CallToolResult::error(made(json!([told]))?).into());
        }
        let content = self.tool(&request.name, input, &context).await?;
        Ok(CallToolResult::success(made(content)?).into())
    }

    async fn list_resources(
        &self,
        _: Option<PaginatedRequestParams>,
        _: Context,
    ) -> Result<ListResourcesResult, ErrorData> {
        let uris = ["test://static-text", "test://static-binary", "test://watched-resource"];
        let all: Vec<_> = uris.iter().map(|uri| json!({ "uri": uri, "name": uri })).collect();
        made(json!({ "resources": all }))
    }

    async fn list_resource_templates(
        &self,
        _: Option<PaginatedRequestParams>,
        _: Context,
    ) -> Result<ListResourceTemplatesResult, ErrorData> {
        let template = json!({ "uriTemplate": "test://template/{id}/data", "name": "template" });
        made(json!({ "resourceTemplates": [template] }))
    }

    async fn read_resource(
        &self,
        request: ReadResourceRequestParams,
        _: Context,
    ) -> Result<ReadResourceResponse, ErrorData> {
        let uri = request.uri.as_str();
        let id = uri.strip_prefix("test://template/").and_then(|rest| rest.strip_suffix("/data"));
        let content = match (uri, id) {
            (_, Some(id)) => {
                let data =
                    json!({ "id": id, "templateTest": true, "data": format!("Data for ID: {id}") });
                json!({ "uri": uri, "mimeType": "application/json", "text": data.to_string() })
            }
            ("test://static-binary", _) => {
                json!({ "uri": uri, "mimeType": "image/png", "blob": PNG })
            }
            ("test://static-text" | "test://watched-resource", _) => {
                let content = "This is the content of the static text resource.";
                json!({ "uri": uri, "mimeType": "text/plain", "text": content })
            }
            _ => return Err(ErrorData::resource_not_found(uri.to_owned(), None)),
        };
        Ok(ReadResourceResult::new(made(json!([content]))?).into())
    }

    async fn subscribe(&self, _: SubscribeRequestParams, _: Context) -> Result<(), ErrorData> {
        Ok(())
    }

    async fn unsubscribe(&self, _: UnsubscribeRequestParams, _: Context) -> Result<(), ErrorData> {
        Ok(())
    }

    async fn list_prompts(
        &self,
        _: Option<PaginatedRequestParams>,
        _: Context,
    ) -> Result<ListPromptsResult, ErrorData> {
        let names = [
            "test_simple_prompt",
            "test_prompt_with_arguments",
            "test_prompt_with_embedded_resource",
            "test_prompt_with_image",
        ];
        let all = names.map(|name| json!({ "name": name, "description": "A fixture" }));
        made(json!({ "prompts": all }))
    }

    async fn get_prompt(
        &self,
        request: GetPromptRequestParams,
        _: Context,
    ) -> Result<GetPromptResponse, ErrorData> {
        let input = Value::Object(request.arguments.unwrap_or_default());
        let given = |name: &str| input[name].as_str().unwrap_or_default().to_owned();
        let contents = match request.name.as_str() {
            "test_simple_prompt" => vec![text("This is a simple prompt for testing.")],
            "test_prompt_with_arguments" => {
                let (one, two) = (given("arg1"), given("arg2"));
                vec![text(format!("Prompt with arguments: arg1='{one}', arg2='{two}'"))]
            }
            "test_prompt_with_embedded_resource" => {
                let content = "Embedded resource content for testing.";
                let embedded = resource(&given("resourceUri"), "text/plain", content);
                vec![embedded, text("Please process the embedded resource above.")]
            }
            "test_prompt_with_image" => vec![image(), text("Please analyze the image above.")],
            name => return Err(ErrorData::invalid_params(format!("no prompt {name}"), None)),
        };
        let messages: Vec<_> =
            contents.iter().map(|content| json!({ "role": "user", "content": content })).collect();
        let result: GetPromptResult = made(json!({ "messages": messages }))?;
        Ok(result.into())
    }

    async fn complete(
        &self,
        _: CompleteRequestParams,
        _: Context,
    ) -> Result<CompleteResult, ErrorData> {
        Ok(CompleteResult::default())
    }

    async fn set_level(&self, _: SetLevelRequestParams, _: Context) -> Result<(), ErrorData> {
        Ok(())
    }
}

/// The daemon's guard does this for denizen's own.
fn is_local(request: &Request) -> bool {
    let headers = [HOST, ORIGIN].map(|name| request.headers().get(name));
    headers.into_iter().flatten().all(|value| {
        let value = value.to_str().unwrap_or_default();
        let host = value.strip_prefix("http://").unwrap_or(value);
        host.starts_with("localhost:") || host.starts_with("127.0.0.1:")
    })
}

async fn answer(State(http): State<Http<Fixtures>>, request: Request) -> Response {
    if !is_local(&request) {
        return StatusCode::FORBIDDEN.into_response();
    }
    let client = Client::new(Target::socket("/nowhere"));
    let door = Door { client, identity: "anybody".to_owned(), session: None, ports: None };
    http.answer(door, request).await.map(Body::new)
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("http://localhost:{}/mcp", listener.local_addr()?.port());
    let app = Router::new().route("/mcp", any(answer)).with_state(Http::new(|| Fixtures));
    axum::serve(listener, app).await
}
