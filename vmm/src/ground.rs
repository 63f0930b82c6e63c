//! Guest memory and its protection, as the coordinator changes them for the debugger.
//!
//! Patches and read-only pages are one thing for all vCPUs, so that the coordinator, and not a
//! vCPU thread, makes them: with every vCPU parked, between two images.

use std::collections::BTreeSet;
use std::io;

use crate::debug::INT3;
use crate::memory::GuestRam;
use crate::paging::{read_physical, write_all_physical};

/// What can be done to guest memory. It changes only while no vCPU runs.
pub trait Ground: Send {
    /// Reads RAM from `gpa` on; how many bytes could be read before the first that is not RAM.
    fn read(&self, gpa: u64, into: &mut [u8]) -> usize;

    /// Replaces the byte at `gpa` if it is `from`. `Ok(false)`: it was another, and stays.
    fn replace(&mut self, gpa: u64, from: u8, to: u8) -> io::Result<bool>;

    /// Makes exactly these pages read-only for the guest, by the address of each. On error the
    /// pages are as they were.
    fn protect(&mut self, pages: &BTreeSet<u64>) -> io::Result<()>;

    /// With `true`, devices do not touch guest memory any more once this returns; with `false` they go on.
    fn hold_devices(&mut self, hold: bool) {
        let _ = hold;
    }

    /// Devices have stored to watched pages, and nobody has looked yet.
    fn has_device_stores(&self) -> bool {
        false
    }
}

/// Guest RAM whose pages cannot be protected.
pub struct RamGround(pub GuestRam);

impl Ground for RamGround {
    fn read(&self, gpa: u64, into: &mut [u8]) -> usize {
        read_physical(self.0.mem(), gpa, into)
    }

    fn replace(&mut self, gpa: u64, from: u8, to: u8) -> io::Result<bool> {
        let mut byte = [0];
        if self.read(gpa, &mut byte) != 1 {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no RAM at {gpa:#x}")));
        }
        let done = byte[0] == from && write_all_physical(self.0.mem(), gpa, &[to]);
        if done || to != INT3 {
            self.0.patching(gpa, from, to);
        }
        Ok(done)
    }

    fn protect(&mut self, pages: &BTreeSet<u64>) -> io::Result<()> {
        if pages.is_empty() { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    fn has_device_stores(&self) -> bool {
        self.0.has_device_stores()
    }
}

/// No memory at all: for a coordinator whose table uses slots only.
pub(crate) struct NoGround;

impl Ground for NoGround {
    fn read(&self, _: u64, _: &mut [u8]) -> usize {
        0
    }

    fn replace(&mut self, _: u64, _: u8, _: u8) -> io::Result<bool> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn protect(&mut self, pages: &BTreeSet<u64>) -> io::Result<()> {
        if pages.is_empty() { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }
}
