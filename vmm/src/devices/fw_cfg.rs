//! QEMU's firmware configuration interface as far as test kernels ask for it (QEMU, docs/specs/fw_cfg.rst): traditional
//! port interface, no DMA.

use serde::{Deserialize, Serialize};

use super::DeviceEvent;
use super::bus::Device;

/// Selector port (2 bytes, write); the data port (1 byte, read) follows it.
pub const PORT: u16 = 0x510;
/// Ports of both.
pub const PORTS: u16 = 2;

const DATA: u64 = 1;

const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const RAM_SIZE: u16 = 0x03;
const NB_CPUS: u16 = 0x05;
const MAX_CPUS: u16 = 0x0f;
const FILE_DIR: u16 = 0x19;

/// `ID` bit 0: traditional interface. Bit 1 would be DMA.
const TRADITIONAL: u32 = 1;

/// Ports 0x510 and 0x511.
#[derive(Clone, Debug)]
pub struct FwCfg {
    ram_size: u64,
    cpus: u16,
    key: Option<u16>,
    item: Vec<u8>,
    next: usize,
}

/// What the guest has selected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FwCfgState {
    /// The item; `None` before the first.
    pub key: Option<u16>,
    /// Bytes of it that were read.
    pub read: u64,
}

impl FwCfg {
    /// For a machine with `ram_size` bytes of RAM and `cpus` vCPUs.
    pub fn new(ram_size: u64, cpus: u16) -> Self {
        Self { ram_size, cpus, key: None, item: Vec::new(), next: 0 }
    }

    /// What is selected.
    pub fn save(&self) -> FwCfgState {
        FwCfgState { key: self.key, read: self.next as u64 }
    }

    /// Selects what was selected.
    pub fn restore(&mut self, state: &FwCfgState) {
        self.key = state.key;
        self.item = state.key.map_or_else(Vec::new, |key| self.item(key));
        self.next = usize::try_from(state.read).unwrap_or(usize::MAX);
    }

    /// The bytes of an item; nothing for one that we do not have.
    fn item(&self, key: u16) -> Vec<u8> {
        match key {
            SIGNATURE => b"QEMU".to_vec(),
            ID => TRADITIONAL.to_le_bytes().to_vec(),
            RAM_SIZE => self.ram_size.to_le_bytes().to_vec(),
            NB_CPUS | MAX_CPUS => self.cpus.to_le_bytes().to_vec(),
            // Number of files, big endian.
            FILE_DIR => 0u32.to_be_bytes().to_vec(),
            _ => Vec::new(),
        }
    }
}

impl Device for FwCfg {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The selector cannot be read.
        if let (DATA, [byte]) = (offset, data) {
            // After the end, and for unknown items, there are zeros.
            *byte = self.item.get(self.next).copied().unwrap_or(0);
            self.next = self.next.saturating_add(1);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<DeviceEvent> {
        if let (0, [low, high]) = (offset, data) {
            self.restore(&FwCfgState { key: Some(u16::from_le_bytes([*low, *high])), read: 0 });
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{Bus, Shared};

    fn get(bus: &Bus, key: u16, len: usize) -> Vec<u8> {
        bus.pio_write(PORT, &key.to_le_bytes());
        let mut data = vec![0; len];
        bus.pio_read_string(PORT + 1, 1, &mut data);
        data
    }

    #[test]
    fn items_that_test_kernels_read() {
        let mut bus = Bus::new();
        let device = Shared::new(FwCfg::new(0x1_2345_6000, 4));
        bus.add_pio(PORT, PORTS, &device).unwrap();
        assert_eq!(get(&bus, 0, 4), b"QEMU");
        assert_eq!(get(&bus, 1, 4), [1, 0, 0, 0]);
        assert_eq!(get(&bus, 3, 8), 0x1_2345_6000u64.to_le_bytes());
        assert_eq!(get(&bus, 5, 2), [4, 0]);
        assert_eq!(get(&bus, 0x0f, 2), [4, 0]);
        assert_eq!(get(&bus, 0x19, 4), [0; 4]);
        assert_eq!(get(&bus, 0xffff, 3), [0; 3], "unknown item");
        assert_eq!(get(&bus, 0, 6), b"QEMU\0\0", "beyond the end");
    }

    #[test]
    fn odd_accesses_change_nothing() {
        let mut device = FwCfg::new(0, 1);
        device.write(0, &[0, 0]);
        device.write(0, &[1]);
        device.write(0, &[1, 0, 0, 0]);
        device.write(1, &[1]);
        let mut byte = [0xff];
        device.read(0, &mut byte);
        assert_eq!(byte, [0xff], "the selector is write-only");
        device.read(1, &mut byte);
        assert_eq!(byte, [b'Q']);
    }
}
