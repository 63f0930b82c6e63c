//! What is said when a wait has run out: what every thread of this process was doing meanwhile, so
//! that a failure on a machine that nobody can look at tells a stuck vCPU from a starved one.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

/// How long the threads are watched.
const WATCHED: Duration = Duration::from_secs(2);

/// The threads of this process: what they are doing, and what they did in two seconds; and what
/// KVM counted meanwhile, where that can be read.
pub(crate) fn threads() -> String {
    let (before, exits_before) = (tasks(), kvm_counters());
    sleep(WATCHED);
    let mut text = format!("machine: load {}; in {WATCHED:?}:", read(Path::new("/proc/loadavg")).trim());
    for (name, now) in kvm_counters() {
        let then = exits_before.iter().find(|(known, _)| *known == name).map_or(0, |(_, count)| *count);
        let _ = write!(text, " {name} +{}", now.saturating_sub(then));
    }
    for (id, now) in tasks() {
        let then = before.iter().find(|(known, _)| *known == id).map_or(Task::default(), |(_, task)| task.clone());
        let _ = write!(
            text,
            "\n  thread {}: state {}, in {}; ran {} ms, waited for a CPU {} ms, {} turns",
            now.name,
            now.state,
            now.inside,
            (now.ran.saturating_sub(then.ran)) / 1_000_000,
            (now.waited.saturating_sub(then.waited)) / 1_000_000,
            now.turns.saturating_sub(then.turns),
        );
    }
    text
}

#[derive(Clone, Default)]
struct Task {
    name: String,
    state: String,
    /// The kernel function it sleeps in, if it does.
    inside: String,
    /// Nanoseconds on a CPU, nanoseconds runnable without one, times it got one.
    ran: u64,
    waited: u64,
    turns: u64,
}

fn tasks() -> Vec<(String, Task)> {
    let Ok(entries) = fs::read_dir("/proc/self/task") else { return Vec::new() };
    let mut tasks: Vec<_> = entries
        .flatten()
        .map(|entry| {
            let folder = entry.path();
            let stat = read(&folder.join("stat"));
            let schedstat = read(&folder.join("schedstat"));
            let mut numbers = schedstat.split_whitespace().map(|word| word.parse().unwrap_or(0));
            let mut number = || numbers.next().unwrap_or(0);
            let task = Task {
                name: read(&folder.join("comm")).trim().to_owned(),
                // The name, in parentheses, may hold anything.
                state: stat.rsplit_once(") ").map_or("?", |(_, rest)| &rest[..1]).to_owned(),
                inside: read(&folder.join("wchan")),
                ran: number(),
                waited: number(),
                turns: number(),
            };
            (entry.file_name().to_string_lossy().into_owned(), task)
        })
        .collect();
    tasks.sort_by(|a, b| a.0.len().cmp(&b.0.len()).then_with(|| a.0.cmp(&b.0)));
    tasks
}

/// Counters of all virtual machines of this host; root's alone to see.
fn kvm_counters() -> Vec<(&'static str, u64)> {
    let names = ["exits", "irq_exits", "signal_exits", "halt_exits", "irq_injections", "request_irq_exits"];
    let read = |name| read(&Path::new("/sys/kernel/debug/kvm").join(name)).trim().parse().ok();
    names.into_iter().filter_map(|name| Some((name, read(name)?))).collect()
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_default()
}
