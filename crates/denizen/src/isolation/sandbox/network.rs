//! Sandboxes' ways to networks. A sandbox has a network namespace with nothing in it but its
//! own loopback; what lets it out is a socket or device within, handed to this process when
//! the sandbox is made, and served here (`denizen-network`) until it ends. When nobody serves
//! it, it leads nowhere.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use denizen_agent::Door;
use denizen_network::{
    DNS, Egress, EgressRules, Event, GATEWAY, Gateway, HostResolver, MTU, Narrowed, Rules,
};
use parking_lot::Mutex;
use rustix::fs::FileType;
use rustix::net::sockopt::socket_acceptconn;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use uuid::Uuid;

use super::plan::Plan;
use crate::isolation::{Network, Notice, Notices};

/// Where the proxy listens within.
const PROXY_PORT: u16 = 3128;
/// The sandbox's own address in the gateway's network, and how long the network's prefix is.
const ADDRESS: (Ipv4Addr, u32) = (Ipv4Addr::new(10, 0, 2, 15), 24);

/// The ways of a pool's sandboxes.
pub(super) struct Networks {
    network: Network,
    notices: Option<Notices>,
    served: Arc<Mutex<HashMap<Uuid, Served>>>,
    /// The rules of those that have some of their own. Locked after `served`, if both are.
    own: Arc<Mutex<HashMap<Uuid, EgressRules>>>,
}

/// A way that is served, and whose it is.
struct Served {
    owner: Arc<Mutex<Uuid>>,
    own: watch::Sender<EgressRules>,
    task: AbortHandle,
}

impl Networks {
    pub(super) fn new(network: Network, notices: Option<Notices>) -> Self {
        Self { network, notices, served: Arc::default(), own: Arc::default() }
    }

    /// What a sandbox needs within.
    pub(super) fn plan(&self, plan: &mut Plan) {
        match self.network {
            Network::None => {}
            Network::Filtered(_) => plan.step(["listen", &PROXY_PORT.to_string()]),
            Network::Full(_) => {
                let number = |address: Ipv4Addr| u32::from(address).to_string();
                let (address, prefix) = ADDRESS;
                plan.step(["tun", &number(address), &number(GATEWAY.0)]);
                plan.step([prefix.to_string(), MTU.to_string()]);
                plan.step(["put", "/etc/resolv.conf", "644", &format!("nameserver {DNS}\n")]);
            }
        }
    }

    /// What tells programs of the way.
    pub(super) fn env(&self) -> BTreeMap<String, String> {
        if !matches!(self.network, Network::Filtered(_)) {
            return BTreeMap::new();
        }
        let proxy = format!("http://127.0.0.1:{PROXY_PORT}");
        // Some programs know the one spelling, some the other.
        [
            ("http_proxy", proxy.as_str()),
            ("https_proxy", &proxy),
            ("HTTP_PROXY", &proxy),
            ("HTTPS_PROXY", &proxy),
            ("no_proxy", "localhost,127.0.0.1,::1"),
            ("NO_PROXY", "localhost,127.0.0.1,::1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
    }

    /// Who takes a sandbox's way and serves it.
    pub(super) fn door(&self, id: Uuid, runtime: &Handle) -> Option<Door> {
        let rules = match &self.network {
            Network::None => return None,
            Network::Filtered(rules) => rules.clone(),
            Network::Full(rules) => {
                // All that is public, and what the rules add.
                let all = "*".parse().into_iter();
                all.chain(rules.allow.iter().cloned()).collect()
            }
        };
        let full = matches!(self.network, Network::Full(_));
        let (served, own, runtime) = (self.served.clone(), self.own.clone(), runtime.clone());
        let notices = self.notices.clone();
        Some(Door(Arc::new(move |way: OwnedFd| {
            let notices = notices.clone();
            let owner = Arc::new(Mutex::new(id));
            let told = {
                let owner = owner.clone();
                move |event| {
                    if let (Event::Denied(denial), Some(notices)) = (event, &notices) {
                        // A session that is refused all the time need not be told of each.
                        let _ = notices.try_send((*owner.lock(), Notice::Denied(denial)));
                    }
                }
            };
            let mut served = served.lock();
            let (own, narrowed) = watch::channel(own.lock().get(&id).cloned().unwrap_or_default());
            let serving = serve(owner.clone(), way, rules.clone(), narrowed, full, told);
            let task = runtime.spawn(serving).abort_handle();
            if let Some(before) = served.insert(id, Served { owner, own, task }) {
                before.task.abort();
            }
        })))
    }

    /// A sandbox's way is now of a session of another name.
    pub(super) fn rename(&self, from: Uuid, to: Uuid) {
        let mut served = self.served.lock();
        if let Some(way) = served.remove(&from) {
            *way.owner.lock() = to;
            way.own.send_replace(self.own.lock().get(&to).cloned().unwrap_or_default());
            served.insert(to, way);
        }
    }

    /// Which rules of its own a sandbox has from now on.
    pub(super) fn narrow(&self, id: Uuid, rules: Option<EgressRules>) {
        let served = self.served.lock();
        let mut own = self.own.lock();
        if let Some(way) = served.get(&id) {
            way.own.send_replace(rules.clone().unwrap_or_default());
        }
        match rules {
            Some(rules) => drop(own.insert(id, rules)),
            None => drop(own.remove(&id)),
        }
    }

    /// Whether a way that a sandbox has had before is what the network wants. The sandbox's first
    /// process has given it, so it may be anything.
    pub(super) fn fits(&self, way: Option<&OwnedFd>) -> bool {
        match (&self.network, way) {
            (Network::None, way) => way.is_none(),
            (Network::Filtered(_), Some(way)) => socket_acceptconn(way) == Ok(true),
            (Network::Full(_), Some(way)) => rustix::fs::fstat(way)
                .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_char_device()),
            (_, None) => false,
        }
    }

    /// Ends a sandbox's way.
    pub(super) fn close(&self, id: Uuid) {
        if let Some(way) = self.served.lock().remove(&id) {
            way.task.abort();
        }
    }
}

async fn serve(
    owner: Arc<Mutex<Uuid>>,
    way: OwnedFd,
    rules: Rules,
    narrowed: Narrowed,
    full: bool,
    told: impl Fn(Event) + Send + Sync + 'static,
) {
    let resolver = Arc::new(HostResolver);
    let never = std::future::pending();
    let ended = if full {
        let gateway = Gateway::new(rules, resolver, told).narrowed(narrowed);
        gateway.serve(way, never).await.map_err(|e| e.to_string())
    } else {
        let listener = tokio::net::TcpListener::from_std(std::net::TcpListener::from(way));
        match listener {
            Ok(listener) => {
                let egress = Egress::new(rules, resolver, told).narrowed(narrowed);
                egress.serve(listener, never).await.map_err(|e| e.to_string())
            }
            Err(error) => Err(error.to_string()),
        }
    };
    if let Err(error) = ended {
        tracing::warn!(session = %owner.lock(), error, "the session's network has ended");
    }
}
