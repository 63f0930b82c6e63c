//! The fake machine on a thread of its own, for debuggers that are processes.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use trapline_gdbstub_glue::{Address, Outcome, Server, Target};

use super::event_loop::serve;
use super::fake::{Fake, Seen};

/// No debugger takes this long for what is asked of it here, not even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running machine and its stub.
pub struct Machine {
    /// What `target remote` takes.
    pub remote: String,
    pub seen: Arc<Mutex<Seen>>,
    enough: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Outcome>>>,
}

impl Machine {
    pub fn start(fake: Fake) -> Self {
        Self::start_at(fake, &":0".parse().unwrap())
    }

    pub fn start_at(fake: Fake, address: &Address) -> Self {
        let mut server = Server::listen(address, false).unwrap();
        let remote = server.listening().remote();
        let seen = fake.seen.clone();
        let enough = Arc::new(AtomicBool::new(false));
        let stop = enough.clone();
        let thread = std::thread::spawn(move || {
            let mut target = Target::new(fake);
            let mut outcomes = Vec::new();
            let last = serve(&mut server, &mut target, |_, outcome| {
                if outcome != Outcome::Continue {
                    outcomes.push(outcome);
                }
                stop.load(Ordering::Relaxed)
            });
            let last = last.unwrap();
            if matches!(last, Outcome::Killed | Outcome::Ended) {
                outcomes.push(last);
            }
            outcomes
        });
        Self { remote, seen, enough, thread: Some(thread) }
    }

    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }

    /// Waits until the machine looks like this.
    pub fn wait(&self, what: &str, condition: impl Fn(&Seen) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(&self.seen()) {
            assert!(Instant::now() < deadline, "waited in vain: {what}; {:?}", self.seen());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it and says what the clients did.
    pub fn finish(mut self) -> Vec<Outcome> {
        self.enough.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }

    /// Runs gdb on it with these commands, and returns what it prints.
    pub fn gdb(&self, commands: &[&str]) -> String {
        let mut gdb = self.gdb_command(commands);
        finish(&mut gdb)
    }

    pub fn gdb_command(&self, commands: &[&str]) -> Command {
        let mut gdb = Command::new("gdb");
        gdb.args(["-nx", "-q", "-batch"]);
        let connect = format!("target remote {}", self.remote);
        for command in ["set confirm off", "set pagination off", "set width 0", &connect].iter().chain(commands) {
            gdb.args(["-ex", command]);
        }
        gdb
    }

    /// Runs lldb on it with these commands, and returns what it prints.
    pub fn lldb(&self, program: &str, commands: &[&str]) -> String {
        let mut lldb = Command::new(program);
        lldb.args(["--batch", "--no-lldbinit"]);
        let connect = format!("gdb-remote 127.0.0.1{}", self.remote);
        for command in ["settings set auto-confirm true", &connect].iter().chain(commands) {
            lldb.args(["--one-line", command]);
        }
        finish(&mut lldb)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.enough.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Everything that a program prints until it ends. It is killed if it does not.
pub fn finish(command: &mut Command) -> String {
    let out = tempfile::tempfile().unwrap();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out.try_clone().unwrap())
        .stderr(out.try_clone().unwrap())
        .env("LC_ALL", "C")
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let ended = loop {
        if child.try_wait().unwrap().is_some() {
            break true;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            break false;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut out = out;
    let mut text = String::new();
    std::io::Seek::rewind(&mut out).unwrap();
    std::io::Read::read_to_string(&mut out, &mut text).unwrap();
    assert!(ended, "{command:?} did not end; it printed:\n{text}");
    text
}
