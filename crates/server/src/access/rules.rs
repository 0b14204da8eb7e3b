//! Which route asks for what: the one place that says so. What is not listed asks for an
//! unlimited admin, and a test fails for a route of ours that is not listed.

use axum::http::Method;

use denizen_api::Scope;

/// What a route touches, which is what a caller that is limited to some sessions is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum On {
    /// The session that the request names.
    Session,
    /// What the caller may see, which is the handler's to find out, or nothing of any session.
    Some,
    /// All of it: only for callers that are not limited.
    All,
}

/// What a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Nothing.
    Nothing,
    /// The token of a volume: of the one that the path names, the handler finds out.
    Volume,
    /// A scope, over what is touched.
    Scope(Scope, On),
}

use Need::{Nothing, Scope as Of, Volume};
use On::{All, Session, Some as Seen};
use Scope::{Admin, Operate, Read};

/// Method and path as the router has it; `GET` is `HEAD` too, `*` is any.
const RULES: &[(&str, &str, Need)] = &[
    // The page itself, which is the same for all; how to ask; and whether anybody is there.
    ("GET", "/", Nothing),
    ("GET", "/assets/{*path}", Nothing),
    ("GET", "/v1/openapi.json", Nothing),
    ("GET", "/healthz", Nothing),
    ("GET", "/readyz", Nothing),
    ("GET", "/v1/health", Of(Read, Seen)),
    ("GET", "/v1/whoami", Of(Read, Seen)),
    ("GET", "/v1/metrics", Of(Read, All)),
    ("POST", "/v1/shutdown", Of(Admin, All)),
    ("GET", "/v1/keys", Of(Admin, All)),
    ("POST", "/v1/keys", Of(Admin, All)),
    ("DELETE", "/v1/keys/{id}", Of(Admin, All)),
    ("GET", "/v1/events", Of(Read, Seen)),
    ("GET", "/v1/images", Of(Read, Seen)),
    // By a path of this machine, or with its credentials.
    ("POST", "/v1/images", Of(Admin, All)),
    ("DELETE", "/v1/images", Of(Admin, All)),
    ("GET", "/v1/backups", Of(Read, All)),
    ("POST", "/v1/backups/verify", Of(Operate, All)),
    ("POST", "/v1/backups/forget", Of(Admin, All)),
    ("DELETE", "/v1/backups/{backup}", Of(Admin, All)),
    ("POST", "/v1/recover", Of(Admin, All)),
    ("GET", "/v1/sessions", Of(Read, Seen)),
    ("POST", "/v1/sessions", Of(Operate, Seen)),
    ("GET", "/v1/sessions/{session}", Of(Read, Session)),
    ("PUT", "/v1/sessions/{session}", Of(Operate, Session)),
    // Its backups stay; and who may run commands in it may delete all that is in it anyway.
    ("DELETE", "/v1/sessions/{session}", Of(Operate, Session)),
    ("POST", "/v1/sessions/{session}/start", Of(Operate, Session)),
    ("POST", "/v1/sessions/{session}/pause", Of(Operate, Session)),
    ("POST", "/v1/sessions/{session}/stop", Of(Operate, Session)),
    ("POST", "/v1/sessions/{session}/backup", Of(Operate, Session)),
    ("GET", "/v1/sessions/{session}/backups", Of(Read, Session)),
    ("POST", "/v1/sessions/{session}/restore", Of(Operate, Session)),
    ("POST", "/v1/sessions/{session}/fork", Of(Operate, Session)),
    ("GET", "/v1/sessions/{session}/diff", Of(Operate, Session)),
    ("GET", "/v1/sessions/{session}/snapshots", Of(Read, Session)),
    ("PUT", "/v1/sessions/{session}/snapshots/{name}", Of(Operate, Session)),
    ("DELETE", "/v1/sessions/{session}/snapshots/{name}", Of(Operate, Session)),
    ("GET", "/v1/sessions/{session}/export", Of(Operate, Session)),
    ("POST", "/v1/sessions/{session}/import", Of(Operate, Session)),
    // What is run has passwords in its arguments, and prints what is in files.
    ("GET", "/v1/sessions/{session}/logs/{job}", Of(Operate, Session)),
    ("POST", "/v1/sessions/{session}/tokens", Of(Operate, Session)),
    ("DELETE", "/v1/sessions/{session}/tokens", Of(Operate, Session)),
    ("*", "/v1/sessions/{session}/ports/{port}", Of(Operate, Session)),
    ("*", "/v1/sessions/{session}/ports/{port}/", Of(Operate, Session)),
    ("*", "/v1/sessions/{session}/ports/{port}/{*rest}", Of(Operate, Session)),
    ("*", "/v1/sessions/{session}/files/", Of(Operate, Session)),
    ("*", "/v1/sessions/{session}/files/{*path}", Of(Operate, Session)),
    ("GET", "/v1/sessions/{session}/processes", Of(Operate, Session)),
    ("POST", "/v1/sessions/{session}/processes", Of(Operate, Session)),
    ("GET", "/v1/sessions/{session}/processes/{process}/output", Of(Operate, Session)),
    ("POST", "/v1/sessions/{session}/processes/{process}/input", Of(Operate, Session)),
    ("POST", "/v1/sessions/{session}/processes/{process}/signal", Of(Operate, Session)),
    ("PUT", "/v1/sessions/{session}/processes/{process}/size", Of(Operate, Session)),
    // E2B's control plane: of which sandboxes a caller may know is the handlers' to find out.
    ("GET", "/sandboxes", Of(Read, Seen)),
    ("POST", "/sandboxes", Of(Operate, Seen)),
    ("GET", "/v2/sandboxes", Of(Read, Seen)),
    ("POST", "/v2/sandboxes", Of(Operate, Seen)),
    ("GET", "/sandboxes/metrics", Of(Read, Seen)),
    // It has the token that lets in.
    ("GET", "/sandboxes/{sandbox}", Of(Operate, Seen)),
    ("DELETE", "/sandboxes/{sandbox}", Of(Operate, Seen)),
    ("POST", "/sandboxes/{sandbox}/pause", Of(Operate, Seen)),
    ("POST", "/sandboxes/{sandbox}/resume", Of(Operate, Seen)),
    ("POST", "/sandboxes/{sandbox}/connect", Of(Operate, Seen)),
    ("POST", "/v2/sandboxes/{sandbox}/connect", Of(Operate, Seen)),
    ("POST", "/sandboxes/{sandbox}/timeout", Of(Operate, Seen)),
    ("POST", "/sandboxes/{sandbox}/refreshes", Of(Operate, Seen)),
    ("POST", "/sandboxes/{sandbox}/fork", Of(Operate, Seen)),
    ("POST", "/sandboxes/{sandbox}/snapshots", Of(Operate, Seen)),
    ("GET", "/sandboxes/{sandbox}/metrics", Of(Read, Seen)),
    ("GET", "/sandboxes/{sandbox}/logs", Of(Read, Seen)),
    ("GET", "/v2/sandboxes/{sandbox}/logs", Of(Read, Seen)),
    ("PUT", "/sandboxes/{sandbox}/network", Of(Operate, Seen)),
    // Templates are of all sessions: what one key builds, another one's sandboxes are made of.
    ("GET", "/snapshots", Of(Read, All)),
    ("GET", "/templates", Of(Read, Seen)),
    ("GET", "/v2/templates", Of(Read, Seen)),
    ("GET", "/default-templates", Of(Read, Seen)),
    ("POST", "/v3/templates", Of(Operate, All)),
    ("GET", "/templates/aliases/{alias}", Of(Read, Seen)),
    ("POST", "/templates/tags", Of(Operate, All)),
    ("DELETE", "/templates/tags", Of(Operate, All)),
    ("GET", "/templates/{template}", Of(Read, Seen)),
    ("DELETE", "/templates/{template}", Of(Operate, All)),
    ("PATCH", "/templates/{template}", Of(Operate, All)),
    ("PATCH", "/v2/templates/{template}", Of(Operate, All)),
    ("GET", "/templates/{template}/tags", Of(Read, Seen)),
    ("GET", "/templates/{template}/files/{hash}", Of(Operate, All)),
    // The link that it is sent to says that it may be.
    ("PUT", "/templates/{template}/files/{hash}/content", Nothing),
    ("POST", "/v2/templates/{template}/builds/{build}", Of(Operate, All)),
    ("GET", "/templates/{template}/builds/{build}/status", Of(Read, All)),
    ("GET", "/templates/{template}/builds/{build}/logs", Of(Read, All)),
    // Volumes, too.
    ("GET", "/volumes", Of(Read, All)),
    ("POST", "/volumes", Of(Operate, All)),
    // It has the token that lets in.
    ("GET", "/volumes/{volume}", Of(Operate, All)),
    ("DELETE", "/volumes/{volume}", Of(Operate, All)),
    ("*", "/volumecontent/{volume}/path", Volume),
    ("*", "/volumecontent/{volume}/dir", Volume),
    ("*", "/volumecontent/{volume}/file", Volume),
    ("*", "/secrets", Of(Read, Seen)),
    ("*", "/secrets/{secret}", Of(Read, Seen)),
    // Only a way to the routes above, each of which is asked for as whoever asks here.
    ("*", "/mcp", Of(Operate, Seen)),
    // envd's, for the session in a header.
    ("*", "/process.Process/{method}", Of(Operate, Session)),
    ("*", "/filesystem.Filesystem/{method}", Of(Operate, Session)),
    ("*", "/files", Of(Operate, Session)),
    ("GET", "/health", Of(Operate, Session)),
    ("GET", "/envs", Of(Operate, Session)),
    ("GET", "/metrics", Of(Operate, Session)),
    ("POST", "/init", Of(Operate, Session)),
];

/// What a request needs whose path is that of a router's route.
pub(crate) fn need(method: &Method, route: &str) -> Need {
    rule(method, route).unwrap_or(Of(Admin, All))
}

/// The same, if there is such a route.
pub(super) fn rule(method: &Method, route: &str) -> Option<Need> {
    let method = if *method == Method::HEAD { "GET" } else { method.as_str() };
    let rule = RULES.iter().find(|(for_method, for_route, _)| {
        (*for_method == "*" || *for_method == method) && *for_route == route
    });
    rule.map(|(_, _, need)| *need)
}

/// Whether a request, by its route or its path if that is envd's, goes on with what another has
/// begun: a key pressed in a terminal is no news.
pub(crate) fn goes_on(route: &str) -> bool {
    [
        "/process.Process/List",
        "/process.Process/SendInput",
        "/process.Process/StreamInput",
        "/process.Process/Update",
        "/filesystem.Filesystem/GetWatcherEvents",
        "/v1/sessions/{session}/processes/{process}/input",
        "/v1/sessions/{session}/processes/{process}/size",
        // What it does is asked for once more, by its own route.
        "/mcp",
    ]
    .contains(&route)
}

/// The route of a path that the router left to a service of its own, as the rules have it.
pub(crate) fn of_envd(path: &str) -> Option<&'static str> {
    let services = ["/process.Process/{method}", "/filesystem.Filesystem/{method}"];
    let service = services.into_iter().find(|it| path.starts_with(it.trim_end_matches("{method}")));
    let paths = ["/files", "/health", "/envs", "/metrics", "/init"];
    service.or_else(|| paths.into_iter().find(|route| *route == path))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use super::*;
    use crate::KeptLogs;
    use crate::lease::Leases;

    /// Method and path of every route, as axum writes a router down for debugging.
    fn routes(router: &impl std::fmt::Debug) -> Vec<(Method, String)> {
        let written = format!("{router:?}");
        // The fallbacks are routers of their own, behind the first.
        let (routes, paths) = written.split_once("node: Node { paths: {").unwrap();
        let paths = paths.split_once("fallback_router").unwrap().0;
        let methods = ["get", "head", "delete", "options", "patch", "post", "put", "trace"];
        let mut all = Vec::new();
        for path in paths.split("RouteId(").skip(1) {
            let Some((id, path)) = path.split_once("): \"") else { continue };
            let path = path.split_once('"').unwrap().0;
            let endpoint = routes.split_once(&format!("RouteId({id}): MethodRouter(")).unwrap().1;
            for method in methods {
                let handler = endpoint.split_once(&format!(" {method}: ")).unwrap().1;
                if !handler.starts_with("None") {
                    all.push((method.to_uppercase().parse().unwrap(), path.to_owned()));
                }
            }
        }
        all
    }

    #[tokio::test]
    async fn every_route_has_a_rule() {
        let folder = tempfile::tempdir().unwrap();
        let config = denizen::VmPoolConfig {
            enabled: true,
            volume_root: folder.path().join("pool"),
            ..denizen::VmPoolConfig::default()
        };
        let pool = denizen::MicroVmManager::builder((&config).into());
        let pool = pool.isolation(denizen::Isolation::Host).build().unwrap();
        let leases = Arc::new(Leases::new(pool.clone(), KeptLogs::default()));
        let envd = denizen_agent::envd::router(Arc::new(crate::lease::Resolver(leases.clone())));
        let processes =
            denizen_agent::envd::processes(Arc::new(crate::lease::Resolver(leases.clone())));
        let recent = crate::api::Recent::of(&pool).unwrap();
        let keys = super::super::Keys::open(folder.path()).unwrap();
        let front = super::super::Front::default();
        let audit = super::super::audit::Audit::open(folder.path(), 1).unwrap();
        let sandboxes = crate::e2b::Sandboxes::open(pool.clone(), leases.clone(), folder.path());
        let sandboxes = Arc::new(sandboxes.unwrap());
        let (stop, all) = (Arc::default(), sandboxes.clone());
        let api = crate::api::Api::new(pool.clone(), leases.clone(), stop, recent, all);
        let access =
            super::super::Access::new(pool.clone(), leases, keys, sandboxes.clone(), front, audit);
        let access = Arc::new(access);
        let e2b = crate::e2b::router(crate::e2b::E2b::new(sandboxes, access.clone()));
        let api = crate::api::router(api, access);
        let mut all = Vec::new();
        for routes in [routes(&api), routes(&crate::web::router()), routes(&envd), routes(&e2b)] {
            assert!(routes.len() > 1, "{routes:?}");
            all.extend(routes);
        }
        let known = (Method::DELETE, "/v1/sessions/{session}".to_owned());
        assert!(all.contains(&known), "{all:?}");
        let lacking: Vec<_> =
            all.iter().filter(|(method, path)| rule(method, path).is_none()).collect();
        assert!(lacking.is_empty(), "routes without a rule: {lacking:?}");
        // Its one route is a service, for all methods.
        assert!(format!("{processes:?}").contains("\"/process.Process/{method}\""));
        assert!(rule(&Method::POST, "/process.Process/{method}").is_some());
        pool.shutdown().await.unwrap();
    }

    #[test]
    fn what_has_no_rule_asks_for_an_unlimited_admin() {
        let all = Of(Admin, All);
        for (method, path) in [
            ("GET", "/v1/sessionz"),
            ("POST", "/v1/sessions/"),
            ("DELETE", "/v1/sessions"),
            ("PATCH", "/v1/keys"),
            ("OPTIONS", "/v1/sessions/{session}"),
            ("TRACE", "/"),
        ] {
            assert_eq!(need(&method.parse().unwrap(), path), all, "{method} {path}");
        }
        assert_eq!(need(&Method::HEAD, "/v1/sessions"), Of(Read, Seen));
    }
}
