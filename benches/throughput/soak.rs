//! Many tasks and many lost connections: what the agent holds must stay as it was.

use std::{fmt::Write as _, fs, time::Duration};

use crate::{
    World,
    agent::Agent,
    log,
    process::{self, Holds},
    proxy::Proxy,
    rig::{self, Rig},
};

/// Parts of the soak; what the agent holds is looked at after each.
const PARTS: u64 = 100;
/// Parts after which it has seen everything once: what it holds then is what the end is compared with.
const WARM: usize = 10;
/// A connection that is lost more often than this is not lost once it stands.
const BETWEEN: Duration = Duration::from_millis(50);
/// For one part.
const PATIENCE: Duration = Duration::from_mins(5);

/// Runs it and prints what the agent held.
pub(crate) async fn run(world: &mut World) {
    let place = world.place("soak");
    let rig = Rig::new().await;
    let proxy = Proxy::start(&rig.url).await;
    let mut start = rig.agent(Some(&place), log(&place, "agent"), world.size());
    start.url = &proxy.url;
    let mut agent = Agent::start(&start);
    agent.says("ready");
    let (tasks, reconnects) = (world.arguments.soak / PARTS, world.arguments.reconnects.div_ceil(PARTS));
    let mut seen: Vec<Holds> = Vec::new();
    let mut lost = 0;
    for part in 1..=PARTS {
        rig.fill(tasks).await;
        for _ in 0..reconnects.min(world.arguments.reconnects - lost) {
            let before = proxy.accepted();
            proxy.reset();
            lost += 1;
            // Both connections, the publishing and the consuming one.
            until("the agent connects again", || proxy.accepted() >= before + 2).await;
            tokio::time::sleep(BETWEEN).await;
        }
        let end = tokio::time::Instant::now() + PATIENCE;
        while agent.acked() < part * tasks {
            assert!(tokio::time::Instant::now() < end, "the agent is stuck at {} tasks", agent.acked());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        rig.take_events().await;
        seen.push(process::holds(agent.pid()).expect("the agent runs"));
        if part % 10 == 0 {
            eprintln!("{} tasks, {lost} lost connections: {:?}", part * tasks, seen.last());
        }
    }
    agent.end();
    tell(world, &seen, tasks, lost);
    rig.remove(std::iter::once(rig::NODE.to_owned())).await;
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(tokio::time::Instant::now() < end, "waited for: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A single look may fall into the moment in which connections are made anew, so tenths are compared by their medians.
fn tell(world: &mut World, seen: &[Holds], tasks: u64, lost: u64) {
    let all = tasks * seen.len() as u64;
    let warm = &seen[WARM.min(seen.len()) - 1];
    let (at_last, after) = (seen.last().copied().unwrap_or_default(), &seen[WARM.min(seen.len()) - 1..]);
    let most = after.iter().map(|holds| holds.resident).max().unwrap_or(0);
    let tenths: Vec<u64> = seen[WARM.min(seen.len() - 1)..].chunks(seen.len().div_ceil(10)).map(median).collect();
    let overall = median(after);
    let far = tenths.iter().map(|&tenth| (tenth as f64 / overall as f64 - 1.0) * 100.0);
    let (low, high) = far.fold((0.0_f64, 0.0_f64), |(low, high), change| (low.min(change), high.max(change)));
    let tenths: Vec<String> = tenths.iter().map(|&tenth| format!("{:.1}", process::megabytes(tenth))).collect();
    world.fact(format!(
        "soak: {all} tasks and {lost} lost connections: resident memory after the first tenth {:.1} MB in the median, {:.1} MB \
         at most; the tenths' medians {} MB, {low:+.1} to {high:+.1} % of it",
        process::megabytes(overall),
        process::megabytes(most),
        tenths.join(", "),
    ));
    world.fact(format!(
        "soak: threads {} → {}, descriptors {} → {}, children {} → {}",
        warm.threads, at_last.threads, warm.descriptors, at_last.descriptors, warm.children, at_last.children
    ));
    if let Some(out) = &world.arguments.out {
        fs::create_dir_all(out).expect("the results can be written");
        fs::write(out.join("messages-soak.svg"), plot(seen, tasks)).expect("the results can be written");
    }
}

fn median(seen: &[Holds]) -> u64 {
    let mut resident: Vec<u64> = seen.iter().map(|holds| holds.resident).collect();
    resident.sort_unstable();
    resident.get(resident.len() / 2).copied().unwrap_or(0)
}

/// Resident memory over the tasks done.
fn plot(seen: &[Holds], tasks: u64) -> String {
    const LEFT: f64 = 70.0;
    const TOP: f64 = 50.0;
    const WIDTH: f64 = 690.0;
    const HEIGHT: f64 = 200.0;
    let most = seen.iter().map(|holds| process::megabytes(holds.resident)).fold(10.0, f64::max);
    let most = (most / 10.0).ceil() * 10.0;
    let x = |index: usize| LEFT + (index + 1) as f64 / seen.len() as f64 * WIDTH;
    let y = |megabytes: f64| TOP + HEIGHT - megabytes / most * HEIGHT;
    let mut svg = "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 800 300\" width=\"800\" height=\"300\" \
                   font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"800\" height=\"300\" fill=\"#ffffff\"/>\n\
                   <text x=\"16\" y=\"26\" font-size=\"16\" font-weight=\"bold\" fill=\"#1a202c\">Resident memory of an \
                   agent, by tasks done</text>\n"
        .to_owned();
    for step in 0..=4 {
        let at = most * f64::from(step) / 4.0;
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{0:.1}\" x2=\"{1}\" y2=\"{0:.1}\" stroke=\"#e2e8f0\"/>\n\
             <text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\" fill=\"#4a5568\">{at:.0} MB</text>",
            y(at),
            LEFT + WIDTH,
            LEFT - 8.0,
            y(at) + 4.0
        );
    }
    let points: Vec<String> = seen
        .iter()
        .enumerate()
        .map(|(index, holds)| format!("{:.1},{:.1}", x(index), y(process::megabytes(holds.resident))))
        .collect();
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#2b6cb0\" stroke-width=\"2\"/>\n\
         <text x=\"{}\" y=\"275\" text-anchor=\"end\" fill=\"#4a5568\">{} tasks</text>\n</svg>",
        points.join(" "),
        LEFT + WIDTH,
        tasks * seen.len() as u64
    );
    svg
}
