//! How long until deliveries come again: after a restart of the broker, and after a connection went silent.

use std::{
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{
    World,
    agent::{Agent, unix_nanos},
    log,
    proxy::Proxy,
    rig::{self, Rig},
    spread::Spread,
};

/// Tasks that the agent has in hand meanwhile: the broker delivers them again.
const IN_HAND: u64 = 8;
/// Longer than any of it takes.
const HOLD: Duration = Duration::from_hours(2);

/// Prints the spreads.
pub(crate) async fn run(world: &mut World) {
    let place = world.place("reconnect");
    let rig = Rig::new().await;
    let proxy = Proxy::start(&rig.url).await;
    let mut start = rig.agent(Some(&place), log(&place, "agent"), world.size());
    (start.hold, start.url) = (HOLD, &proxy.url);
    let mut agent = Agent::start(&start);
    agent.says("ready");
    rig.fill(IN_HAND).await;
    rig::until_empty(&rig, &rig.queue(), Duration::from_secs(30)).await;
    let mut silent = Vec::new();
    for _ in 0..world.arguments.stalls {
        agent.order("next");
        let begun = unix_nanos();
        proxy.silence();
        silent.push(received(&agent, begun));
    }
    let mut restarted = Vec::new();
    for _ in 0..world.arguments.restarts {
        tokio::task::spawn_blocking(rig::kill_broker).await.expect("the broker is killed");
        agent.order("next");
        let listening = listening(&rig.url);
        let restarting = tokio::task::spawn_blocking(|| rig::broker("restart", &[]));
        let accepts = listening.await.expect("somebody looks");
        restarted.push(received(&agent, accepts));
        restarting.await.expect("the broker comes back");
    }
    let (silent, restarted) = (Spread::of(silent), Spread::of(restarted));
    world.fact(format!("reconnect: half-open connection to first delivery: {silent}"));
    world.fact(format!("reconnect: broker's listener accepts to first delivery: {restarted}"));
    drop(agent);
}

/// Milliseconds from `begun` to the first delivery.
fn received(agent: &Agent, begun: u128) -> f64 {
    let at: u128 = agent.says("received").parse().expect("it is a number");
    at.saturating_sub(begun) as f64 / 1e6
}

/// When the broker's port takes connections again, looked at from now on.
fn listening(url: &str) -> tokio::task::JoinHandle<u128> {
    let address = url.rsplit(['@', '/']).nth(1).expect("the address has a host").to_owned();
    let down = Arc::new(AtomicBool::new(false));
    tokio::task::spawn_blocking(move || {
        loop {
            match TcpStream::connect(&address) {
                Ok(_) if down.load(Ordering::Relaxed) => return unix_nanos(),
                Ok(_) => {}
                Err(_) => down.store(true, Ordering::Relaxed),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    })
}
