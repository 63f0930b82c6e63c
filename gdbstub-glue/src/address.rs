//! Where the stub listens: what the user may write, and what is opened for it.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The longest path that fits `sockaddr_un` with its final NUL (unix(7)).
const UNIX_PATH_MAX: usize = 107;

/// A listening address as the user wrote it.
///
/// | text | meaning |
/// |---|---|
/// | `:1234`, `1234` | TCP port 1234 of 127.0.0.1; port 0 is any free one |
/// | `HOST:PORT`, `[::1]:PORT` | that host, which must be loopback unless exposure was asked for |
/// | `unix:PATH` | a unix socket |
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A TCP port.
    Tcp {
        /// Name or number of the host.
        host: String,
        /// Port; 0 picks a free one.
        port: u16,
    },
    /// A unix socket.
    Unix(PathBuf),
}

/// Why an address cannot be used; one line that says what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the message says it
pub enum AddressError {
    #[error("'{0}' is no gdb address; write :PORT, HOST:PORT or unix:PATH, for example :1234")]
    Syntax(String),
    #[error("'{0}' is no TCP port; write a number from 0 (any free port) to 65535")]
    Port(String),
    #[error("unix: needs a path, for example unix:/tmp/guest.sock")]
    EmptyPath,
    #[error("the socket path {path} is {len} bytes long and may have {UNIX_PATH_MAX}; choose a shorter one")]
    LongPath { path: String, len: usize },
    #[error("the host '{host}' cannot be resolved: {error}; write its IP address, or :{port} for this machine only")]
    Resolve { host: String, port: u16, error: io::Error },
    #[error(
        "{address} can be reached from other machines, and whoever reaches it controls the guest; write :{port} to \
         stay on this machine, or allow it explicitly with --gdb-expose"
    )]
    Exposed { address: SocketAddr, port: u16 },
    #[error("{address} is in use, perhaps by another guest; choose another port, or :0 for any free one")]
    PortInUse { address: SocketAddr },
    #[error("cannot listen on {address}: {error}; choose another address, for example :1234")]
    Tcp { address: SocketAddr, error: io::Error },
    #[error("the directory {dir} does not exist; create it (mkdir -p {dir}) or choose another path")]
    NoDirectory { dir: String },
    #[error("{path} exists and is no socket; move it away or choose another path")]
    NotASocket { path: String },
    #[error("another process listens on {path}; choose another path")]
    PathInUse { path: String },
    #[error("cannot make the socket {path}: {error}; choose a path in a directory that you can write to")]
    Unix { path: String, error: io::Error },
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(AddressError::EmptyPath);
            }
            if path.contains('\0') {
                return Err(AddressError::Syntax(text.escape_debug().to_string()));
            }
            return Ok(Address::Unix(PathBuf::from(path)));
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => (host, port),
            None if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => ("", text),
            None => return Err(AddressError::Syntax(text.escape_debug().to_string())),
        };
        // `+1234` and the like parse as numbers, but nobody means them.
        if !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(AddressError::Port(port.escape_debug().to_string()));
        }
        let port = port.parse().map_err(|_| AddressError::Port(port.to_owned()))?;
        let host = match host.strip_prefix('[') {
            Some(v6) => v6.strip_suffix(']').filter(|h| !h.is_empty()),
            None if host.contains(':') => None, // an IPv6 address needs its brackets
            None => Some(host),
        }
        .filter(|h| !h.contains(char::is_whitespace))
        .ok_or_else(|| AddressError::Syntax(text.escape_debug().to_string()))?;
        let host = if host.is_empty() { Ipv4Addr::LOCALHOST.to_string() } else { host.to_owned() };
        Ok(Address::Tcp { host, port })
    }
}

/// An open listener and the address under which it can really be reached.
///
/// A unix socket's file goes away with it.
#[derive(Debug)]
pub struct Listening {
    pub(crate) socket: ListeningSocket,
    place: Place,
}

#[derive(Debug)]
pub(crate) enum ListeningSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

#[derive(Debug)]
enum Place {
    Tcp(SocketAddr),
    /// The file that we made, known by its inode: what another process may have put there
    /// since is not ours to remove.
    Unix {
        path: PathBuf,
        file: Option<(u64, u64)>,
    },
}

impl Address {
    /// Opens it, without blocking reads and accepts.
    ///
    /// An address that other machines can reach is refused unless `expose` is set.
    pub fn listen(&self, expose: bool) -> Result<Listening, AddressError> {
        match self {
            Address::Tcp { host, port } => listen_tcp(host, *port, expose),
            Address::Unix(path) => listen_unix(path),
        }
    }
}

fn listen_tcp(host: &str, port: u16, expose: bool) -> Result<Listening, AddressError> {
    let unresolved = |error| AddressError::Resolve { host: host.to_owned(), port, error };
    let mut addresses = (host, port).to_socket_addrs().map_err(unresolved)?.collect::<Vec<_>>();
    // gdb tries `localhost` as IPv4 too; one listener is enough, and `:1234` means IPv4.
    addresses.sort_by_key(|a| !a.is_ipv4());
    let Some(&address) = addresses.first() else {
        return Err(unresolved(io::Error::other("it has no address")));
    };
    if !expose && let Some(&address) = addresses.iter().find(|a| !a.ip().is_loopback()) {
        return Err(AddressError::Exposed { address, port });
    }
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AddrInUse => AddressError::PortInUse { address },
        _ => AddressError::Tcp { address, error },
    };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let real = listener.local_addr().map_err(failed)?;
    Ok(Listening { socket: ListeningSocket::Tcp(listener), place: Place::Tcp(real) })
}

fn listen_unix(path: &Path) -> Result<Listening, AddressError> {
    let shown = || path.display().to_string();
    let len = path.as_os_str().len();
    if len > UNIX_PATH_MAX {
        return Err(AddressError::LongPath { path: shown(), len });
    }
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    if !dir.is_dir() {
        return Err(AddressError::NoDirectory { dir: dir.display().to_string() });
    }
    reclaim(path)?;
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AddrInUse => AddressError::PathInUse { path: shown() },
        _ => AddressError::Unix { path: shown(), error },
    };
    let listener = UnixListener::bind(path).map_err(failed)?;
    let file = path.symlink_metadata().ok().map(|m| (m.dev(), m.ino()));
    let place = Place::Unix { path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()), file };
    let listening = Listening { socket: ListeningSocket::Unix(listener), place };
    // Whoever can connect owns the guest: only this user may.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    if let ListeningSocket::Unix(listener) = &listening.socket {
        listener.set_nonblocking(true).map_err(failed)?;
    }
    Ok(listening)
}

/// Removes a socket that nobody listens on any more. Anything else at `path` stays.
fn reclaim(path: &Path) -> Result<(), AddressError> {
    let shown = || path.display().to_string();
    let metadata = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(AddressError::Unix { path: shown(), error }),
    };
    if !metadata.file_type().is_socket() {
        return Err(AddressError::NotASocket { path: shown() });
    }
    match UnixStream::connect(path) {
        // Only a refused connection proves that nobody is there.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|error| AddressError::Unix { path: shown(), error })
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(AddressError::Unix { path: shown(), error })
        }
        _ => Err(AddressError::PathInUse { path: shown() }),
    }
}

impl Listening {
    /// What gdb's `target remote` takes.
    pub fn remote(&self) -> String {
        match &self.place {
            Place::Tcp(address) if address.ip() == Ipv4Addr::LOCALHOST || address.ip().is_unspecified() => {
                format!(":{}", address.port())
            }
            Place::Tcp(address) => address.to_string(),
            Place::Unix { path, .. } => path.display().to_string(),
        }
    }
}

impl fmt::Display for Listening {
    /// The command line to paste.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Within single quotes the shell leaves everything alone but a single quote.
        write!(f, "gdb -ex 'target remote {}'", self.remote().replace('\'', r"'\''"))
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Place::Unix { path, file: Some(ours) } = &self.place
            && let Ok(metadata) = path.symlink_metadata()
            && (metadata.dev(), metadata.ino()) == *ours
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.to_owned(), port }
    }

    #[test]
    fn what_may_be_written() {
        for (text, address) in [
            (":1234", tcp("127.0.0.1", 1234)),
            ("1234", tcp("127.0.0.1", 1234)),
            (":0", tcp("127.0.0.1", 0)),
            ("localhost:2345", tcp("localhost", 2345)),
            ("0.0.0.0:1", tcp("0.0.0.0", 1)),
            ("[::1]:1234", tcp("::1", 1234)),
            ("unix:/run/a b.sock", Address::Unix("/run/a b.sock".into())),
            ("unix:rel.sock", Address::Unix("rel.sock".into())),
        ] {
            assert_eq!(text.parse::<Address>().unwrap(), address, "{text}");
        }
    }

    #[test]
    fn what_may_not() {
        let said = |text: &str| text.parse::<Address>().unwrap_err().to_string();
        for text in ["", "here", "::1:1234", "[::1:1234", "[]:1", "a b:1", "unix:a\0b"] {
            assert!(said(text).ends_with("for example :1234"), "{text}: {}", said(text));
        }
        for text in [":", ":65536", ":-1", ":+1", "host:gdb", ":12 "] {
            assert!(said(text).contains("is no TCP port"), "{text}: {}", said(text));
        }
        assert_eq!(said("unix:"), "unix: needs a path, for example unix:/tmp/guest.sock");
    }

    #[test]
    fn a_free_port_is_picked_and_told() {
        let listening = tcp("127.0.0.1", 0).listen(false).unwrap();
        let port: u16 = listening.remote().strip_prefix(':').unwrap().parse().unwrap();
        assert_ne!(port, 0);
        assert_eq!(listening.to_string(), format!("gdb -ex 'target remote :{port}'"));
    }

    #[test]
    fn an_occupied_port_is_told() {
        let first = tcp("127.0.0.1", 0).listen(false).unwrap();
        let error = first.remote().parse::<Address>().unwrap().listen(false).unwrap_err();
        assert!(matches!(error, AddressError::PortInUse { .. }), "{error}");
    }

    #[test]
    fn exposure_is_asked_for_twice() {
        let error = tcp("0.0.0.0", 0).listen(false).unwrap_err();
        assert!(matches!(error, AddressError::Exposed { .. }), "{error}");
        let listening = tcp("0.0.0.0", 0).listen(true).unwrap();
        assert!(listening.remote().starts_with(':'));
        assert!(tcp("localhost", 0).listen(false).is_ok());
    }

    #[test]
    fn a_unix_socket_comes_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("it's a guest.sock");
        let address = Address::Unix(path.clone());
        let listening = address.listen(false).unwrap();
        assert_eq!(
            listening.to_string(),
            format!("gdb -ex 'target remote {}/it'\\''s a guest.sock'", dir.path().display())
        );
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(address.listen(false).unwrap_err(), AddressError::PathInUse { .. }));
        drop(listening);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_socket_is_reclaimed_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        drop(UnixListener::bind(&path).unwrap()); // std leaves the file
        assert!(path.exists());
        drop(Address::Unix(path.clone()).listen(false).unwrap());

        std::fs::write(&path, "precious").unwrap();
        let error = Address::Unix(path.clone()).listen(false).unwrap_err();
        assert!(matches!(error, AddressError::NotASocket { .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn what_replaced_our_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listening = Address::Unix(path.clone()).listen(false).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "another's").unwrap();
        drop(listening);
        assert!(path.exists());
    }

    #[test]
    fn a_missing_directory_and_a_long_path_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let error = Address::Unix(dir.path().join("no/sock")).listen(false).unwrap_err().to_string();
        assert!(error.contains("mkdir -p"), "{error}");
        let error = Address::Unix(dir.path().join("x".repeat(200))).listen(false).unwrap_err().to_string();
        assert!(error.contains("choose a shorter one"), "{error}");
    }
}
