//! A source of random bytes (virtio 1.2, 5.4).

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::core::Backend;
use super::request::{Fault, Request};

/// Most bytes of one answer. A driver that wants more asks again, and a guest that wants many keeps nobody busy for long.
const MOST: u64 = 4096;

/// Random bytes from the host's kernel.
#[derive(Debug, Clone, Copy, Default)]
pub struct Entropy;

impl Backend for Entropy {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn serve(&mut self, request: &Request<'_>) -> Result<u32, Fault> {
        let mut bytes = vec![0; request.writable().min(MOST) as usize];
        // Short only where a signal interrupts it; the driver takes what it gets.
        let got = getrandom(bytes.as_mut_slice(), GetRandomFlags::empty()).unwrap_or(0);
        request.write(0, &bytes[..got])?;
        Ok(got as u32)
    }
}
