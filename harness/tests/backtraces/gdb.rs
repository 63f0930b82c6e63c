//! A gdb, and the machine that it and we look at.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use serde::Deserialize;
use tempfile::NamedTempFile;
use trapline_gdbstub_glue::{Address, Server, Target};
use trapline_vmm::Vm;
use trapline_vmm::debug::{ResumePlan, RunMode, VcpuId};

/// A bound against hanging: gdb reads 378 MB of symbols on a machine that is emulated.
const PATIENCE: Duration = Duration::from_secs(600);
/// Said when a command is done.
const MARK: &str = "@@trapline-mark@@";

/// A frame as gdb sees it.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct GdbFrame {
    /// `normal`, `inline`, `tailcall` or `other`.
    pub(crate) kind: String,
    pub(crate) pc: u64,
    pub(crate) name: Option<String>,
    pub(crate) line: u32,
}

/// A stack as gdb sees it.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct GdbStack {
    pub(crate) frames: Vec<GdbFrame>,
    /// Why there are no more; none if it was not asked for more.
    pub(crate) ended: Option<String>,
}

/// A guest with gdb attached to it; both are served by this one thread.
pub(crate) struct Bench {
    pub(crate) vm: Target<Vm>,
    server: Server<Vm>,
    gdb: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// What gdb has said since the last command.
    said: String,
    _script: NamedTempFile,
}

impl Drop for Bench {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.gdb.kill();
        let _ = self.gdb.wait();
    }
}

/// Whether there is a gdb that speaks Python.
pub(crate) fn is_there() -> bool {
    let asked = Command::new("gdb").args(["-nx", "-q", "-batch", "-ex", "python print(6 * 7)"]).output();
    asked.is_ok_and(|answer| String::from_utf8_lossy(&answer.stdout).trim() == "42")
}

impl Bench {
    /// Attaches a gdb that has these symbols. The guest stands afterwards.
    pub(crate) fn attach(vm: Vm, symbols: &Path) -> Self {
        let mut script = tempfile::Builder::new().suffix(".py").tempfile().unwrap();
        script.write_all(include_bytes!("frames.py")).unwrap();
        let server = Server::listen(&":0".parse::<Address>().unwrap(), false).unwrap();
        let (mut said, both) = std::io::pipe().unwrap();
        let mut gdb = Command::new("gdb")
            .args(["-nx", "-q", "-iex", "set auto-load off", "-iex", "set style enabled off"])
            .arg(symbols)
            .stdin(Stdio::piped())
            .stdout(both.try_clone().unwrap())
            .stderr(both)
            .spawn()
            .unwrap();
        let input = gdb.stdin.take().unwrap();
        let (sender, output) = mpsc::channel();
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(got @ 1..) = said.read(&mut chunk) {
                if sender.send(chunk[..got].to_vec()).is_err() {
                    break;
                }
            }
        });
        let script_path = script.path().display().to_string();
        let mut bench = Bench { vm: Target::new(vm), server, gdb, input, output, said: String::new(), _script: script };
        for setting in
            ["pagination off", "confirm off", "width 0", "prompt", "debuginfod enabled off", "remotetimeout 300"]
        {
            bench.run(&format!("set {setting}"));
        }
        bench.run(&format!("source {script_path}"));
        bench.connect();
        bench
    }

    /// Types a command; all that gdb says until it is done.
    pub(crate) fn run(&mut self, command: &str) -> String {
        self.start(command);
        self.finish(command)
    }

    fn start(&mut self, command: &str) {
        self.said.clear();
        writeln!(self.input, "{command}\necho \\n{MARK}\\n").unwrap();
        self.input.flush().unwrap();
    }

    fn finish(&mut self, command: &str) -> String {
        self.serve_until(command, |bench| bench.said.contains(MARK));
        let (said, _) = self.said.split_once(MARK).unwrap();
        said.trim().to_owned()
    }

    /// Serves gdb and looks after the guest until something is so.
    fn serve_until(&mut self, what: &str, mut is_so: impl FnMut(&Self) -> bool) {
        let started = Instant::now();
        while !is_so(self) {
            assert!(started.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain for gdb: {what}; it said {}", self.said);
            self.serve();
        }
    }

    fn serve(&mut self) {
        for chunk in self.output.try_iter() {
            self.said.push_str(&String::from_utf8_lossy(&chunk));
        }
        if let Some(stop) = self.vm.poll().unwrap() {
            let _ = self.server.on_stop(stop, &mut self.vm).unwrap();
        }
        let sockets: Vec<_> = self.server.interests().map(|interest| interest.fd).collect();
        for socket in sockets {
            // Where there is nothing to read or write, nothing happens.
            let _ = self.server.on_ready(socket, &mut self.vm).unwrap();
        }
        std::thread::sleep(Duration::from_micros(200));
    }

    /// Lets the guest run for so long without gdb, which then attaches again and so stops it.
    ///
    /// At a stop that comes while gdb is attached, gdb leaves inlined functions out that begin where the vCPU stands:
    /// for a person who steps they have not been called yet.
    pub(crate) fn run_for(&mut self, time: Duration) {
        self.run("detach");
        let until = Instant::now() + time;
        while self.vm.is_running() && Instant::now() < until {
            self.serve();
        }
        assert!(self.vm.is_running(), "it stands: {:?}", self.vm.ended());
        self.connect();
    }

    fn connect(&mut self) {
        let said = self.run(&format!("target remote {}", self.server.listening().remote()));
        assert!(self.server.is_attached() && !self.vm.is_running(), "{said}");
    }

    /// The stack of a vCPU as gdb sees it; not more than `most` of the frames that are on the stack.
    pub(crate) fn stack(&mut self, vcpu: VcpuId, most: usize) -> GdbStack {
        let said = self.run(&format!("trapline-frames {} {most}", vcpu.0 + 1));
        let json = said.lines().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("gdb says {said}"));
        serde_json::from_str(json).unwrap_or_else(|error| panic!("gdb says {said}: {error}"))
    }
}

/// Everybody goes on.
pub(crate) fn all_run(vm: &Vm) -> ResumePlan {
    ResumePlan::all(vm.vcpus(), RunMode::Continue)
}
