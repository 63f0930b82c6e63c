//! One request of the guest's: bytes to read, and bytes to write, wherever it has them in its RAM.

use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::core::Core;
use crate::memory::GuestRam;

/// Why a request is not served to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The guest has reset the device, or the machine is being taken apart.
    Gone,
    /// It does not keep to the rules; the words say which.
    Broken(&'static str),
}

/// A piece of guest RAM.
#[derive(Debug, Clone, Copy)]
struct Piece {
    gpa: u64,
    len: u64,
}

/// What a chain of descriptors names, checked: all of it is RAM.
#[derive(Debug)]
pub(super) struct Parts {
    head: u16,
    readable: Vec<Piece>,
    writable: Vec<Piece>,
}

impl Parts {
    /// Reads a chain, which has at most `size` descriptors (virtio 1.2, 2.7.5.3.1).
    pub(super) fn of(
        chain: DescriptorChain<&GuestMemoryMmap>,
        ram: &GuestRam,
        size: u16,
    ) -> Result<Self, &'static str> {
        let mut parts = Self { head: chain.head_index(), readable: Vec::new(), writable: Vec::new() };
        let (mut whole, mut count) = (false, 0);
        for descriptor in chain {
            count += 1;
            if count > size {
                return Err("a chain of descriptors is longer than its queue");
            }
            // The iterator ends where it finds no more, for whatever reason.
            whole = !descriptor.has_next();
            let piece = Piece { gpa: descriptor.addr().0, len: descriptor.len().into() };
            let in_ram = piece.gpa.checked_add(piece.len).is_some()
                && (piece.len == 0 || ram.mem().check_range(GuestAddress(piece.gpa), piece.len as usize));
            if !in_ram {
                return Err("a descriptor names what is not RAM");
            }
            if descriptor.is_write_only() {
                parts.writable.push(piece);
            } else if parts.writable.is_empty() {
                parts.readable.push(piece);
            } else {
                return Err("a descriptor to read comes after one to write");
            }
        }
        if whole { Ok(parts) } else { Err("a chain of descriptors has no end") }
    }
}

/// One request, as a [`Backend`](super::Backend) sees it.
#[derive(Debug)]
pub struct Request<'a> {
    core: &'a Core,
    generation: u64,
    parts: Parts,
    features: u64,
}

impl<'a> Request<'a> {
    pub(super) fn new(core: &'a Core, generation: u64, parts: Parts, features: u64) -> Self {
        Self { core, generation, parts, features }
    }

    pub(super) fn head(&self) -> u16 {
        self.parts.head
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether the driver has taken this feature.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }

    /// Number of bytes to read.
    pub fn readable(&self) -> u64 {
        self.parts.readable.iter().map(|piece| piece.len).sum()
    }

    /// Number of bytes that may be written.
    pub fn writable(&self) -> u64 {
        self.parts.writable.iter().map(|piece| piece.len).sum()
    }

    /// Reads all of `into`, from byte `at` of those to read on. Waits while the debugger has the world stopped.
    pub fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Fault> {
        let pieces = cut(&self.parts.readable, at, into.len())?;
        let ram = self.core.ram();
        let all = self.core.pass(self.generation, |_| {
            let mut rest = into;
            pieces.iter().all(|piece| {
                let (this, others) = std::mem::take(&mut rest).split_at_mut(piece.len as usize);
                rest = others;
                ram.device_read(piece.gpa, this)
            })
        })?;
        if all { Ok(()) } else { Err(Fault::Broken("its RAM cannot be read")) }
    }

    /// Writes all of `bytes`, from byte `at` of those that may be written on. Waits while the debugger has the world
    /// stopped.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Fault> {
        let pieces = cut(&self.parts.writable, at, bytes.len())?;
        let ram = self.core.ram();
        let all = self.core.pass(self.generation, |_| {
            let mut rest = bytes;
            pieces.iter().all(|piece| {
                let (this, others) = rest.split_at(piece.len as usize);
                rest = others;
                ram.device_write(piece.gpa, this)
            })
        })?;
        if all { Ok(()) } else { Err(Fault::Broken("its RAM cannot be written")) }
    }
}

/// The pieces that hold `len` bytes from byte `at` on.
fn cut(pieces: &[Piece], at: u64, len: usize) -> Result<Vec<Piece>, Fault> {
    let (mut skip, mut left, mut found) = (at, len as u64, Vec::new());
    for piece in pieces {
        if left == 0 {
            break;
        }
        if skip >= piece.len {
            skip -= piece.len;
            continue;
        }
        let len = (piece.len - skip).min(left);
        found.push(Piece { gpa: piece.gpa + skip, len });
        (skip, left) = (0, left - len);
    }
    if left == 0 { Ok(found) } else { Err(Fault::Broken("a request is too short")) }
}
