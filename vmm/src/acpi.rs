//! The ACPI tables: as much as Linux needs to find its processors, interrupt controllers and console, to reset and to
//! switch off.
//!
//! ```text
//! RSDP -> XSDT -> FADT -> DSDT (COM1, pvpanic, virtio devices, \_S5)
//!              |       -> FACS
//!              -> MADT (local APICs, I/O APIC, overrides, wakeup mailbox)
//! ```
//!
//! Not hardware-reduced: that would take PIC and PIT from Linux, which calibrates its timers with them.

use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink, aml};

use crate::boot::{ApStart, layout};
use crate::devices::virtio::Place;
use crate::devices::{cmos, pm, pvpanic, reset, serial};
use crate::limits::PAGE_SIZE;

const OEM_ID: [u8; 6] = *b"TRAPLN";
const OEM_TABLE_ID: [u8; 8] = *b"TRAPLINE";
const OEM_REVISION: u32 = 1;

/// ISA interrupt of the ACPI fixed hardware.
const SCI: u16 = 9;

/// FADT, IAPC_BOOT_ARCH: there are ISA devices; there is no VGA. (No 8042 either: Linux would look for a keyboard.)
const BOOT_ARCH: u16 = 1 | 1 << 2;

/// The tables as bytes, each with the guest-physical address where it goes. There are virtio devices in the places
/// given.
pub fn tables(cpus: u32, ap_start: ApStart, virtio: &[Place]) -> Vec<(u64, Vec<u8>)> {
    let mut placed = Placed(layout::ACPI_START);
    let rsdp_at = placed.next(Rsdp::len());
    let dsdt = dsdt(virtio);
    let dsdt_at = placed.next(dsdt.len());
    let fadt = fadt(dsdt_at);
    let fadt_at = placed.next(fadt.len());
    let madt = madt(cpus, ap_start);
    let madt_at = placed.next(madt.len());

    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt_at);
    xsdt.add_entry(madt_at);
    let xsdt = bytes(&xsdt);
    let xsdt_at = placed.next(xsdt.len());

    vec![
        (rsdp_at, bytes(&Rsdp::new(OEM_ID, xsdt_at))),
        (dsdt_at, dsdt),
        (fadt_at, fadt),
        (madt_at, madt),
        (xsdt_at, xsdt),
        (layout::FACS, bytes(&FACS::new())),
    ]
}

/// Gives out addresses one after the other.
struct Placed(u64);

impl Placed {
    fn next(&mut self, len: usize) -> u64 {
        let at = self.0;
        self.0 = (at + len as u64).next_multiple_of(16);
        at
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Fixed ACPI description table (ACPI 6.5, 5.2.9).
fn fadt(dsdt_at: u64) -> Vec<u8> {
    let port = |port: u16, bytes: u8, access| GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt_at)
        .firmware_ctrl_32(layout::FACS as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.dsdt = (dsdt_at as u32).into();
    fadt.sci_int = SCI.into();
    fadt.pm1a_evt_blk = u32::from(pm::EVENT_PORT).into();
    fadt.pm1_evt_len = pm::EVENT_LEN;
    fadt.x_pm1a_evt_blk = port(pm::EVENT_PORT, pm::EVENT_LEN, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(pm::CONTROL_PORT).into();
    fadt.pm1_cnt_len = pm::CONTROL_LEN;
    fadt.x_pm1a_cnt_blk = port(pm::CONTROL_PORT, pm::CONTROL_LEN, AccessSize::WordAccess);
    // More than 100 and 1000 us: there are no C2 and C3.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = cmos::CENTURY;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(reset::RESET_PORT, 1, AccessSize::ByteAccess);
    fadt.reset_value = reset::RESET_VALUE;
    bytes(&fadt.finalize())
}

/// Multiple APIC description table (ACPI 6.5, 5.2.12), from its structures' bytes: the crate has neither overrides nor
/// the wakeup structure.
fn madt(cpus: u32, ap_start: ApStart) -> Vec<u8> {
    /// There are 8259s besides the APICs.
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u32 = 1;
    const ISA_BUS: u8 = 0;
    /// Polarity active high, trigger level.
    const LEVEL_HIGH: u16 = 0b1101;
    const ALL_PROCESSORS: u8 = 0xff;

    let mut structures = Vec::new();
    let mut add = |type_: u8, fields: &[&[u8]]| {
        let fields = fields.concat();
        structures.push(type_);
        structures.push(fields.len() as u8 + 2);
        structures.extend(fields);
    };
    // The ids are below 255 (MAX_VCPUS), for which the specification wants local APIC and not x2APIC structures.
    for id in 0..cpus as u8 {
        add(0, &[&[id, id], &ENABLED.to_le_bytes()]);
    }
    let ioapic = (layout::IOAPIC as u32).to_le_bytes();
    add(1, &[&[0, 0], &ioapic, &0u32.to_le_bytes()]);
    let mut interrupt = |isa: u8, gsi: u32, flags: u16| {
        let (gsi, flags) = (gsi.to_le_bytes(), flags.to_le_bytes());
        add(2, &[&[ISA_BUS, isa], &gsi, &flags]);
    };
    // The PIT is on pin 2 of the I/O APIC, where the PIC has its cascade.
    interrupt(0, 2, 0);
    interrupt(SCI as u8, SCI.into(), LEVEL_HIGH);
    // NMIs come in on LINT1.
    add(4, &[&[ALL_PROCESSORS, 0, 0, 1]]);
    if ap_start == ApStart::Mailbox {
        let (version, reserved) = ([0; 2], [0; 4]);
        add(16, &[&version, &reserved, &layout::AP_MAILBOX.to_le_bytes()]);
    }

    // Revision 5 is the first with the wakeup structure.
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(36, layout::LOCAL_APIC as u32);
    madt.write_u32(40, PCAT_COMPAT);
    madt.append_slice(&structures);
    madt.as_slice().to_vec()
}

/// Differentiated system description table: what is not found by convention.
fn dsdt(virtio: &[Place]) -> Vec<u8> {
    /// Present, enabled, shown, working.
    const STATUS: u8 = 0xf;
    let status = aml::Name::new("_STA".into(), &STATUS);

    let uart_id = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501"));
    let uart_number = aml::Name::new("_UID".into(), &aml::ZERO);
    let uart_ports = aml::IO::new(serial::COM1, serial::COM1, 0, serial::PORTS as u8);
    let uart_irq = aml::Interrupt::new(true, true, false, false, serial::COM1_IRQ);
    let uart_resources = aml::ResourceTemplate::new(vec![&uart_ports, &uart_irq]);
    let uart_resources = aml::Name::new("_CRS".into(), &uart_resources);
    let uart = aml::Device::new("COM1".into(), vec![&uart_id, &uart_number, &status, &uart_resources]);

    let panic_id = aml::Name::new("_HID".into(), &"QEMU0001");
    let panic_ports = aml::IO::new(pvpanic::PORT, pvpanic::PORT, 1, 1);
    let panic_resources = aml::ResourceTemplate::new(vec![&panic_ports]);
    let panic_resources = aml::Name::new("_CRS".into(), &panic_resources);
    let panic = aml::Device::new("PEVT".into(), vec![&panic_id, &status, &panic_resources]);

    let virtio: Vec<Vec<u8>> = virtio.iter().map(|place| virtio_device(place, &status)).collect();
    let virtio: Vec<Raw<'_>> = virtio.iter().map(|bytes| Raw(bytes)).collect();
    let mut children: Vec<&dyn Aml> = vec![&uart, &panic];
    children.extend(virtio.iter().map(|device| device as &dyn Aml));
    let devices = aml::Scope::new("\\_SB_".into(), children);
    let s5 = aml::Package::new(vec![&pm::SLEEP_TYPE_S5, &pm::SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO]);
    let s5 = aml::Name::new("\\_S5_".into(), &s5);

    // Revision 2: integers have 64 bits.
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&bytes(&devices));
    dsdt.append_slice(&bytes(&s5));
    dsdt.as_slice().to_vec()
}

/// One virtio-mmio device, by the ID that Linux's driver looks for.
fn virtio_device(place: &Place, status: &dyn Aml) -> Vec<u8> {
    let id = aml::Name::new("_HID".into(), &"LNRO0005");
    let number = aml::Name::new("_UID".into(), &place.slot);
    let registers = aml::Memory32Fixed::new(true, place.address as u32, PAGE_SIZE as u32);
    // A consumer's, edge triggered, active high, its own.
    let irq = aml::Interrupt::new(true, true, false, false, place.gsi);
    let resources = aml::ResourceTemplate::new(vec![&registers, &irq]);
    let resources = aml::Name::new("_CRS".into(), &resources);
    let name = format!("VIO{}", place.slot);
    bytes(&aml::Device::new(name.as_str().into(), vec![&id, &number, status, &resources]))
}

/// AML that is bytes already.
struct Raw<'a>(&'a [u8]);

impl Aml for Raw<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::PLACES;
    use crate::limits::MAX_VCPUS;

    fn all() -> Vec<Vec<(u64, Vec<u8>)>> {
        [1, 2, 4, MAX_VCPUS]
            .into_iter()
            .flat_map(|cpus| [(cpus, ApStart::Sipi), (cpus, ApStart::Mailbox)])
            .map(|(cpus, ap_start)| tables(cpus, ap_start, &places()))
            .collect()
    }

    fn places() -> Vec<Place> {
        (0..).map_while(Place::new).collect()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn find<'a>(tables: &'a [(u64, Vec<u8>)], signature: &[u8]) -> (u64, &'a [u8]) {
        let (at, table) = tables.iter().find(|(_, t)| t.starts_with(signature)).unwrap();
        (*at, table)
    }

    fn word(table: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(table[at..at + 4].try_into().unwrap())
    }

    fn quad(table: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    /// (type, body) of every structure of a MADT.
    fn structures(madt: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let mut rest = &madt[44..];
        let mut found = Vec::new();
        while let [type_, len, ..] = rest {
            let (this, next) = rest.split_at(usize::from(*len));
            found.push((*type_, this[2..].to_vec()));
            rest = next;
        }
        found
    }

    #[test]
    fn checksums_and_lengths_are_right() {
        for tables in all() {
            for (at, table) in &tables {
                let signature = String::from_utf8_lossy(&table[..4]).into_owned();
                match &table[..4] {
                    b"RSD " => {
                        assert_eq!(sum(&table[..20]), 0);
                        assert_eq!(word(table, 20) as usize, table.len());
                        assert_eq!(at % 16, 0, "found by scanning at 16-byte steps");
                        assert_eq!(sum(table), 0);
                    }
                    b"FACS" => assert_eq!((word(table, 4) as usize, at % 64), (table.len(), 0)),
                    _ => {
                        assert_eq!(sum(table), 0, "{signature}");
                        assert_eq!(word(table, 4) as usize, table.len(), "{signature}");
                    }
                }
            }
        }
    }

    #[test]
    fn tables_lie_apart_in_their_area() {
        for tables in all() {
            let mut ranges: Vec<_> = tables.iter().map(|(at, t)| (*at, at + t.len() as u64)).collect();
            ranges.sort_unstable();
            assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{ranges:x?}");
            for (start, end) in ranges {
                let area = layout::ACPI_START..=layout::ACPI_END;
                let facs = start == layout::FACS;
                assert!(facs || area.contains(&start) && area.contains(&end));
            }
        }
    }

    #[test]
    fn everything_is_found_from_the_rsdp() {
        for tables in all() {
            let (at, rsdp) = find(&tables, b"RSD PTR ");
            assert_eq!(at, layout::ACPI_START, "where boot hands it out");
            let (xsdt_at, xsdt) = find(&tables, b"XSDT");
            assert_eq!(quad(rsdp, 24), xsdt_at);
            let entries: Vec<_> = (36..xsdt.len()).step_by(8).map(|n| quad(xsdt, n)).collect();
            let (fadt_at, fadt) = find(&tables, b"FACP");
            assert_eq!(entries, [fadt_at, find(&tables, b"APIC").0]);
            let dsdt_at = find(&tables, b"DSDT").0;
            assert_eq!((u64::from(word(fadt, 40)), quad(fadt, 140)), (dsdt_at, dsdt_at));
            assert_eq!(u64::from(word(fadt, 36)), find(&tables, b"FACS").0);
        }
    }

    #[test]
    fn every_processor_is_listed_once() {
        for cpus in [1, 2, 4, MAX_VCPUS] {
            let tables = tables(cpus, ApStart::Sipi, &[]);
            let (_, madt) = find(&tables, b"APIC");
            let found = structures(madt);
            let apics: Vec<_> = found.iter().filter(|(t, _)| *t == 0).collect();
            assert_eq!(apics.len(), cpus as usize);
            for (id, (_, body)) in (0..).zip(apics) {
                assert_eq!(*body, [id, id, 1, 0, 0, 0]);
            }
            assert_eq!(word(madt, 36), 0xFEE0_0000);
        }
    }

    #[test]
    fn every_virtio_device_is_described_where_it_is() {
        assert_eq!(places().len(), PLACES as usize);
        for count in [0, 1, PLACES as usize] {
            let tables = tables(1, ApStart::Sipi, &places()[..count]);
            let (_, dsdt) = find(&tables, b"DSDT");
            let at = |bytes: &[u8]| dsdt.windows(bytes.len()).filter(|window| *window == bytes).count();
            assert_eq!(at(b"LNRO0005"), count);
            for place in &places()[..count] {
                // 32-bit fixed memory: writable, base, length. Extended interrupt: consumer and edge, one, its number
                // (ACPI 6.5, 6.4.3.4 and 6.4.3.6).
                let memory = [&[0x86, 9, 0, 1][..], &(place.address as u32).to_le_bytes(), &[0, 0x10, 0, 0]].concat();
                let interrupt = [&[0x89, 6, 0, 0b0011, 1][..], &place.gsi.to_le_bytes()].concat();
                assert_eq!((at(&memory), at(&interrupt)), (1, 1), "{place:x?}");
            }
        }
    }

    #[test]
    fn the_mailbox_is_announced_only_when_it_is_used() {
        for (ap_start, count) in [(ApStart::Sipi, 0), (ApStart::Mailbox, 1)] {
            let tables = tables(2, ap_start, &[]);
            let (_, madt) = find(&tables, b"APIC");
            let wakeup: Vec<_> = structures(madt).into_iter().filter(|(t, _)| *t == 16).collect();
            assert_eq!(wakeup.len(), count);
            for (_, body) in wakeup {
                assert_eq!(body.len(), 14);
                assert_eq!(quad(&body, 6), layout::AP_MAILBOX);
            }
        }
    }

    #[test]
    fn the_fadt_names_the_registers_that_the_devices_have() {
        let tables = tables(1, ApStart::Sipi, &[]);
        let (_, fadt) = find(&tables, b"FACP");
        assert_eq!(word(fadt, 56), u32::from(pm::EVENT_PORT));
        assert_eq!(word(fadt, 64), u32::from(pm::CONTROL_PORT));
        assert_eq!(quad(fadt, 120), u64::from(reset::RESET_PORT));
        assert_eq!(fadt[128], reset::RESET_VALUE);
        assert_eq!(word(fadt, 112) & 1 << 20, 0, "not hardware-reduced");
    }
}
