//! Linux bzImage by the 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst).
//!
//! The header is checked here, field by field; linux-loader then only copies the protected-mode part.

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{ByteValued, GuestAddress};

use super::error::{BootError, CORRUPT, CUT_SHORT};
use super::image::Image;
use super::place::Placement;
use super::{BootRequest, CpuState, Entry, Format, layout, linux};
use super::{place_initrd, write_initrd};
use crate::memory::GuestRam;

/// Where the setup header begins in the file, and the furthest it can reach (its length byte is at 0x201).
const HEADER_START: usize = 0x1f1;
const LENGTH_AT: usize = 0x201;
const MAGIC_AT: usize = 0x202;
pub(super) const HEADER_END: usize = MAGIC_AT + 0xff;

const SECTOR: u64 = 512;
/// The 64-bit entry point is this far into the protected-mode part.
const ENTRY_64: u64 = 0x200;
/// The first protocol with xloadflags, and so the first that can promise a 64-bit entry (Linux 3.8).
const PROTOCOL_2_12: u16 = 0x020c;

/// A setup header that has been checked against the file.
#[derive(Clone, Debug)]
pub(super) struct Header {
    setup: setup_header,
    /// Offset of the protected-mode part in the file.
    payload: u64,
    /// Length of the protected-mode part.
    payload_len: u64,
}

/// Whether a file that begins with these bytes has the magic of a Linux setup header.
pub(super) fn is_bzimage(start: &[u8]) -> bool {
    start.get(MAGIC_AT..MAGIC_AT + 4) == Some(b"HdrS")
}

fn wrong(field: &'static str, problem: impl Into<String>, advice: &'static str) -> BootError {
    BootError::malformed(Format::BzImage, field, problem, advice)
}

impl Header {
    /// Reads the setup header and checks every field that loading relies on.
    pub(super) fn parse(image: Image<'_>) -> Result<Self, BootError> {
        let read = |source| BootError::Read { what: "kernel", source };
        let start = image.read_up_to(0, HEADER_END).map_err(read)?;
        let setup = setup_bytes(&start)?;
        let len = image.len().map_err(read)?;
        let version = setup.version;
        if version < PROTOCOL_2_12 {
            return Err(wrong(
                "version",
                format!("boot protocol {}.{:02} is older than 2.12", version >> 8, version & 0xff),
                "give a kernel of Linux 3.8 or newer",
            ));
        }
        if setup.loadflags & LOADED_HIGH == 0 {
            return Err(wrong("loadflags", "the image is a zImage", "give a bzImage"));
        }
        if setup.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(wrong("xloadflags", "there is no 64-bit entry point", "give a kernel built with CONFIG_64BIT"));
        }
        let sectors = match setup.setup_sects {
            0 => 4,
            n => u64::from(n),
        };
        let payload = (sectors + 1) * SECTOR;
        let payload_len = len.saturating_sub(payload);
        if payload_len <= ENTRY_64 {
            return Err(wrong(
                "setup_sects",
                format!("the kernel proper begins at {payload:#x}, the file has {len:#x} bytes"),
                CUT_SHORT,
            ));
        }
        // Counted in paragraphs of 16 bytes.
        let promised = u64::from(setup.syssize) * 16;
        if promised > payload_len {
            return Err(wrong(
                "syssize",
                format!("{promised:#x} bytes are promised after the setup code, the file has {payload_len:#x}"),
                CUT_SHORT,
            ));
        }
        let compressed_end = u64::from(setup.payload_offset) + u64::from(setup.payload_length);
        if compressed_end > payload_len {
            return Err(wrong(
                "payload_offset + payload_length",
                format!("{compressed_end:#x} is beyond the file's end at {payload_len:#x}"),
                CUT_SHORT,
            ));
        }
        let alignment = setup.kernel_alignment;
        if setup.relocatable_kernel != 0 && !alignment.is_power_of_two() {
            return Err(wrong("kernel_alignment", format!("{alignment:#x} is not a power of two"), CORRUPT));
        }
        Ok(Self { setup, payload, payload_len })
    }

    /// Where the kernel proper goes: where it was built for, or where it fits if it can be relocated.
    fn load_address(&self, placement: &mut Placement<'_>) -> Result<(u64, u64), BootError> {
        let preferred = self.setup.pref_address;
        // The decompressor needs init_size bytes from the load address on (protocol 2.10).
        let need = u64::from(self.setup.init_size).max(self.payload_len);
        let mut address = preferred;
        if self.setup.relocatable_kernel != 0 && !placement.is_free(preferred, need) {
            let alignment = u64::from(self.setup.kernel_alignment);
            let lowest = layout::HIGH_RAM_START.next_multiple_of(alignment);
            if placement.is_free(lowest, need) {
                address = lowest;
            }
        }
        placement.claim("the kernel (init_size)".to_owned(), address, need)?;
        Ok((address, need))
    }
}

/// The setup header, with fields beyond the header's own length zero (what follows it in the file is code).
fn setup_bytes(start: &[u8]) -> Result<setup_header, BootError> {
    let length = start.get(LENGTH_AT).copied().unwrap_or(0);
    let end = MAGIC_AT + usize::from(length);
    let present = start.get(HEADER_START..end).ok_or_else(|| {
        wrong("setup header", format!("it ends at {end:#x}, the file at {:#x}", start.len()), CUT_SHORT)
    })?;
    let mut setup = setup_header::default();
    let room = setup.as_mut_slice();
    let known = room.len().min(present.len());
    room[..known].copy_from_slice(&present[..known]);
    Ok(setup)
}

pub(super) fn load(ram: &GuestRam, request: &BootRequest<'_>, header: &Header) -> Result<Entry, BootError> {
    let format = Format::BzImage;
    let mut placement = Placement::new(ram, format);
    let (address, need) = header.load_address(&mut placement)?;
    let limit = u64::from(header.setup.initrd_addr_max);
    let initrd = place_initrd(request, |size| {
        let words = format!(" below the kernel's initrd_addr_max {limit:#x}");
        placement.initrd_high(size, limit.saturating_add(1), &words)
    })?;
    linux::write_boot_params(ram, request, format, header.setup, initrd.as_ref())?;
    copy(ram, request.kernel, header, address)?;
    write_initrd(ram, request, initrd.as_ref())?;
    Ok(Entry {
        format,
        bsp: CpuState::Long64 {
            cr3: layout::PAGE_TABLES,
            rip: address + ENTRY_64,
            rsp: layout::STACK_TOP,
            rdi: 0,
            rsi: layout::BOOT_INFO,
        },
        kernel: address..address + need,
        initrd,
    })
}

/// Lets linux-loader copy the protected-mode part; its own checks are weaker than those made above.
fn copy(ram: &GuestRam, image: Image<'_>, header: &Header, to: u64) -> Result<(), BootError> {
    let to = Some(GuestAddress(to));
    let loaded = match image {
        Image::Bytes(bytes) => BzImage::load(ram.mem(), to, &mut std::io::Cursor::new(bytes), None),
        Image::File(file) => BzImage::load(ram.mem(), to, &mut &*file, None),
    };
    loaded.map(|_| ()).map_err(|e| {
        wrong(
            "protected-mode part",
            format!("{:#x} bytes at {:#x}: {e}", header.payload_len, header.payload),
            CUT_SHORT,
        )
    })
}
