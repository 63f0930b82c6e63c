//! A VM and its stub in this process, and a client that speaks raw packets to them.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use trapline_gdbstub_glue::{Server, Target};
use trapline_vmm::boot::{ApStart, BootRequest, Image};
use trapline_vmm::debug::VcpuId;
use trapline_vmm::devices::Console;
use trapline_vmm::{Vm, VmConfig};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// A bound against hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Asked before each vCPU is armed.
pub(crate) type ArmHook = Arc<dyn Fn(VcpuId) -> io::Result<()> + Send + Sync>;

/// The built-in guest under a stub on a thread of its own.
pub(crate) struct Stub {
    pub(crate) address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Stub {
    pub(crate) fn start(cpus: u32, arm_hook: Option<ArmHook>) -> Self {
        let boot = BootRequest {
            kernel: Image::Bytes(trapline_guests::demo()),
            name: "demo",
            initrd: None,
            cmdline: "quiet",
            cpus,
            ap_start: ApStart::Sipi,
            protocol: None,
        };
        let vm = Vm::boot(VmConfig {
            memory: 64 << 20,
            boot,
            console: Console::new(io::sink()),
            disks: vec![],
            rng: true,
            arm_hook,
        })
        .expect("the demo guest boots");
        let mut server = Server::listen(&"127.0.0.1:0".parse().expect("an address"), false).expect("a free port");
        let line = server.listening().to_string();
        let port: String =
            line.chars().rev().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
        let port: u16 = port.chars().rev().collect::<String>().parse().expect("a port");
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = thread::spawn(move || {
            let mut vm = Target::new(vm);
            while !stopping.load(Ordering::SeqCst) && vm.ended().is_none() {
                turn(&mut server, &mut vm);
            }
        });
        Self { address: SocketAddr::from(([127, 0, 0, 1], port)), stop, thread: Some(thread) }
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            if !thread::panicking() {
                result.expect("the stub's thread did not panic");
            }
        }
    }
}

/// One turn of an event loop.
fn turn(server: &mut Server<Vm>, vm: &mut Target<Vm>) {
    // A new epoll each time: the descriptors come and go, and nothing here is about speed.
    let epoll = Epoll::new().expect("an epoll");
    let watch = |fd: RawFd, events| {
        let event = EpollEvent::new(events, fd as u64);
        epoll.ctl(ControlOperation::Add, fd, event).expect("an open descriptor");
    };
    watch(vm.events().as_raw_fd(), EventSet::IN);
    for interest in server.interests() {
        let mut events = EventSet::empty();
        events.set(EventSet::IN, interest.readable);
        events.set(EventSet::OUT, interest.writable);
        watch(interest.fd, events);
    }
    let mut ready = [EpollEvent::default(); 8];
    let count = epoll.wait(20, &mut ready).unwrap_or(0);
    let ready: Vec<RawFd> = ready[..count].iter().map(EpollEvent::fd).collect();
    for fd in ready {
        if fd == vm.events().as_raw_fd() {
            if let Some(stop) = vm.poll().expect("poll") {
                if server.is_attached() {
                    let _ = server.on_stop(stop, vm).expect("on_stop");
                } else {
                    vm.kill();
                }
            }
        } else {
            let _ = server.on_ready(fd, vm).expect("on_ready");
        }
    }
}

/// A client that speaks packets.
pub(crate) struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    /// Connects and attaches, as gdb begins.
    pub(crate) fn attach(stub: &Stub) -> Self {
        let mut client = Self::connect(stub);
        let supported = client.ask("qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+");
        assert!(supported.contains("PacketSize"), "{supported}");
        assert_eq!(client.ask("QStartNoAckMode"), "OK");
        let stop = client.ask("?");
        assert!(stop.starts_with('T'), "{stop}");
        client
    }

    /// Connects and says nothing.
    pub(crate) fn connect(stub: &Stub) -> Self {
        let stream = TcpStream::connect(stub.address).expect("connect");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_nodelay(true).expect("no delay");
        Self { stream, buffer: Vec::new() }
    }

    /// Sends bytes as they are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("write");
    }

    /// Sends a packet.
    pub(crate) fn send(&mut self, packet: &str) {
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        self.raw(format!("${packet}#{sum:02x}").as_bytes());
    }

    /// The next packet, without frame, acknowledgements and console output.
    pub(crate) fn receive(&mut self) -> String {
        loop {
            if let Some(start) = self.buffer.iter().position(|&b| b == b'$')
                && let Some(end) = self.buffer[start..].iter().position(|&b| b == b'#')
                && self.buffer.len() >= start + end + 3
            {
                let packet = String::from_utf8_lossy(&self.buffer[start + 1..start + end]).into_owned();
                self.buffer.drain(..start + end + 3);
                let packet = unpack(&packet);
                if packet.starts_with('O') && packet != "OK" {
                    continue;
                }
                return packet;
            }
            let mut chunk = [0; 4096];
            let got = self.stream.read(&mut chunk).expect("an answer in time");
            assert!(got > 0, "the stub closed the connection");
            self.buffer.extend_from_slice(&chunk[..got]);
        }
    }

    /// A packet and its answer.
    pub(crate) fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.receive()
    }

    /// Reads memory, as gdb does.
    pub(crate) fn read_u64(&mut self, addr: u64) -> u64 {
        let hex = self.ask(&format!("m{addr:x},8"));
        assert_eq!(hex.len(), 16, "m{addr:x},8: {hex}");
        let bytes: Vec<u8> = (0..8).map(|n| u8::from_str_radix(&hex[2 * n..2 * n + 2], 16).expect("hex")).collect();
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }

    /// The vCPU (from 0) that a stop reply is about.
    pub(crate) fn thread_of(stop: &str) -> u32 {
        let at = stop.find("thread:").expect("a thread in the stop reply") + "thread:".len();
        let id = stop[at..].split(';').next().expect("an id");
        let number = id.rsplit('.').next().expect("a number");
        u32::from_str_radix(number, 16).expect("hex") - 1
    }
}

/// Undoes run-length encoding: `0*"` is four zeros and more.
fn unpack(packet: &str) -> String {
    let mut text = String::new();
    let mut chars = packet.chars();
    while let Some(c) = chars.next() {
        match (c, text.chars().last()) {
            ('*', Some(last)) => {
                let times = chars.next().map_or(0, |n| (n as usize).saturating_sub(29));
                text.extend(std::iter::repeat_n(last, times));
            }
            _ => text.push(c),
        }
    }
    text
}

/// Waits until the condition holds.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not in time");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The address of something in the built-in guest.
pub(crate) fn symbol(name: &str) -> u64 {
    trapline_guests::symbol(trapline_guests::demo(), name).unwrap_or_else(|| panic!("no symbol {name}"))
}
