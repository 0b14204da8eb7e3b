//! Creations that are asked for again, as their clients do not know whether they were heard: by
//! the key that they come with (`Idempotency-Key`), the same answer is given and nothing is done
//! twice. What has failed may be tried again.
//!
//! Kept in memory, for a day: a daemon that was started anew has forgotten them.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use denizen_api::{Code, IDEMPOTENCY_KEY};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::refusal::{Answer, Refused};
use crate::access::Caller;

/// How long an answer is kept, and how many are.
const KEPT: Duration = Duration::from_hours(24);
const MOST: usize = 10_000;

type Hash = [u8; 32];

/// Answers that may be wanted again.
#[derive(Default)]
pub(crate) struct Repeats(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    /// By who asked, and the key.
    answers: HashMap<Hash, Kind>,
    /// Those that are done, oldest first.
    order: VecDeque<(Instant, Hash)>,
}

struct Kind {
    request: Hash,
    /// None while it is being answered.
    answer: Option<(StatusCode, serde_json::Value)>,
}

fn hash(parts: &[&[u8]]) -> Hash {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

impl Repeats {
    /// Does what is asked for, or gives the answer that it had when it was done. `request` is all
    /// that makes it another request. What was begun is finished even if nobody waits for it.
    pub(crate) async fn once(
        self: &Arc<Self>,
        caller: Caller,
        headers: &HeaderMap,
        request: &[&str],
        work: impl Future<Output = Answer<(StatusCode, serde_json::Value)>> + Send + 'static,
    ) -> Answer<(StatusCode, axum::Json<serde_json::Value>)> {
        let Some(key) = headers.get(IDEMPOTENCY_KEY) else {
            let (status, answer) = work.await?;
            return Ok((status, axum::Json(answer)));
        };
        let asked = hash(&[caller.identity().as_bytes(), key.as_bytes()]);
        let request: Vec<&[u8]> = request.iter().map(|part| part.as_bytes()).collect();
        if let Some((status, answer)) = self.begin(asked, hash(&request))? {
            return Ok((status, axum::Json(answer)));
        }
        let begun = Begun { repeats: self.clone(), asked, answer: None };
        let done = tokio::spawn(async move {
            // It counts as one of the caller's requests until it is done.
            let _caller = caller;
            let mut begun = begun;
            let answer = work.await?;
            begun.answer = Some(answer.clone());
            Ok::<_, Refused>(answer)
        });
        let done = done.await.unwrap_or_else(|error| {
            Err(Refused::new(Code::Failed, format!("the request was given up: {error}")))
        });
        let (status, answer) = done?;
        Ok((status, axum::Json(answer)))
    }

    /// The answer, if there is one; it is to be found otherwise.
    fn begin(&self, asked: Hash, request: Hash) -> Answer<Option<(StatusCode, serde_json::Value)>> {
        let mut kept = self.0.lock();
        while let Some((at, oldest)) = kept.order.front().copied()
            && (at.elapsed() > KEPT || kept.order.len() >= MOST)
        {
            kept.order.pop_front();
            kept.answers.remove(&oldest);
        }
        let Some(known) = kept.answers.get(&asked) else {
            kept.answers.insert(asked, Kind { request, answer: None });
            return Ok(None);
        };
        if known.request != request {
            let detail = "take another Idempotency-Key for another request";
            return Err(Refused::new(Code::OtherRequest, detail));
        }
        let Some(answer) = &known.answer else {
            let detail = "a request with this Idempotency-Key is being answered: ask again later";
            return Err(Refused::new(Code::Repeating, detail));
        };
        Ok(Some(answer.clone()))
    }
}

/// A request that is being answered; when dropped, its answer is kept or it is forgotten.
struct Begun {
    repeats: Arc<Repeats>,
    asked: Hash,
    answer: Option<(StatusCode, serde_json::Value)>,
}

impl Drop for Begun {
    fn drop(&mut self) {
        let mut kept = self.repeats.0.lock();
        match self.answer.take() {
            Some(answer) => {
                if let Some(known) = kept.answers.get_mut(&self.asked) {
                    known.answer = Some(answer);
                }
                kept.order.push_back((Instant::now(), self.asked));
            }
            None => drop(kept.answers.remove(&self.asked)),
        }
    }
}
