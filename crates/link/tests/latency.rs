//! How much the relays add to a command. Not run by itself: it tells, and judges nothing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::Read;
use std::time::Instant;

use common::{Owner, pair};

fn measure(owner: &mut Owner, what: &str) {
    let mut times = Vec::new();
    for _ in 0..500 {
        let begin = Instant::now();
        let mut running = owner.begin(&["/bin/true"]);
        owner.started(running.id);
        owner.exit(running.id);
        let mut out = Vec::new();
        running.stdout.read_to_end(&mut out).unwrap();
        times.push(begin.elapsed());
    }
    times.sort();
    println!("{what}: 10% {:?}, median {:?}, 90% {:?}", times[50], times[250], times[450]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn the_price_of_the_relays() {
    let (_link, mut owner, _guest) = pair().await;
    measure(&mut owner, "through the relays");
    let (mut owner, _init) = common::direct();
    measure(&mut owner, "directly");
}
