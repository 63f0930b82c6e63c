//! What is inside of a bzImage: an ELF file without a symbol table, compressed.
//!
//! Where it is says the setup header (Documentation/arch/x86/boot.rst, from protocol 2.08 on); how it is packed say
//! its first bytes.

use std::io::{self, Read};

/// A kernel is not larger when it is unpacked.
const MOST: u64 = 1 << 30;

/// zstd is told to use up to so much when the kernel packs itself.
const ZSTD_WINDOW: u64 = 256 << 20;

/// Memory for xz and lzma, in KiB; the kernel's own dictionary is 128 MiB at most.
const XZ_MEMORY: u32 = 512 << 10;

/// A bzImage, not yet unpacked.
#[derive(Debug)]
pub(super) struct BzImage<'a> {
    /// What the kernel calls itself: `RELEASE (BUILDER@HOST) #1 SMP ..`.
    pub(super) version: Option<String>,
    payload: &'a [u8],
}

impl<'a> BzImage<'a> {
    /// None if these bytes are no bzImage.
    ///
    /// # Errors
    ///
    /// They are one, but have no payload where they say it is.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Result<Self, String>> {
        if bytes.get(0x1fe..0x200)? != [0x55, 0xaa] || bytes.get(0x202..0x206)? != b"HdrS" {
            return None;
        }
        Some(Self::with_header(bytes))
    }

    fn with_header(bytes: &'a [u8]) -> Result<Self, String> {
        let cut = || "the bzImage is cut short".to_owned();
        let half = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        if half(0x206).ok_or_else(cut)? < 0x208 {
            return Err(
                "the bzImage is of a kernel older than 2.6.26 and does not say where its contents are".to_owned()
            );
        }
        let sectors = match bytes.get(0x1f1).ok_or_else(cut)? {
            0 => 4,
            some => usize::from(*some),
        };
        let (offset, length) = (word(0x248).ok_or_else(cut)?, word(0x24c).ok_or_else(cut)?);
        let start = (sectors + 1) * 512 + offset as usize;
        let payload = start.checked_add(length as usize).and_then(|end| bytes.get(start..end)).ok_or_else(cut)?;
        let version = half(0x20e).filter(|&at| at != 0).and_then(|at| bytes.get(usize::from(at) + 0x200..));
        let version = version.and_then(|text| text.split(|&byte| byte == 0).next()).filter(|text| text.len() < 1024);
        Ok(BzImage { version: version.map(|text| String::from_utf8_lossy(text).into_owned()), payload })
    }

    /// The kernel's release, as `uname -r` has it.
    pub(super) fn release(&self) -> Option<&str> {
        self.version.as_deref()?.split(' ').next().filter(|release| !release.is_empty())
    }

    /// Whether `banner` (`Linux version RELEASE (BUILDER) (COMPILER) #1 SMP ..`) is of the same build. True if that cannot be told.
    pub(super) fn is_of(&self, banner: &str) -> bool {
        let Some((start, end)) = self.version.as_deref().and_then(|version| version.split_once(") ")) else {
            return true;
        };
        let Some(banner) = banner.trim_end().strip_prefix("Linux version ") else { return true };
        banner.starts_with(&format!("{start}) ")) && banner.ends_with(end.trim_end())
    }

    /// Unpacks it.
    ///
    /// # Errors
    ///
    /// It is packed in a way that is not known here, or damaged.
    pub(super) fn unpack(&self) -> Result<Vec<u8>, String> {
        let damaged =
            |how: &str, error: &dyn std::fmt::Display| format!("cannot unpack the bzImage's {how} contents: {error}");
        let payload = self.payload;
        let unknown = |how: &str| {
            Err(format!("the bzImage is packed with {how}, which is not known here; give its vmlinux with --symbols"))
        };
        let (how, unpacked) = match payload {
            [0x1f, 0x8b, ..] => ("gzip", read(flate2::read::GzDecoder::new(payload))),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
                ("xz", read(lzma_rust2::XzReader::new_mem_limit(payload, false, XZ_MEMORY)))
            }
            [0x5d, 0, 0, ..] => {
                ("lzma", lzma_rust2::LzmaReader::new_mem_limit(payload, XZ_MEMORY, None).and_then(read))
            }
            [0x28, 0xb5, 0x2f, 0xfd, ..] => (
                "zstd",
                ruzstd::decoding::StreamingDecoder::new_with_max_window_size(payload, ZSTD_WINDOW)
                    .map_err(|error| io::Error::other(error.to_string()))
                    .and_then(read),
            ),
            [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", lz4(payload)),
            [0x7f, b'E', b'L', b'F', ..] => ("plain", Ok(payload.to_vec())),
            [b'B', b'Z', b'h', ..] => return unknown("bzip2"),
            [0x89, b'L', b'Z', b'O', ..] => return unknown("lzo"),
            _ => return unknown("something"),
        };
        unpacked.map_err(|error| damaged(how, &error))
    }
}

/// All of it, up to [`MOST`].
fn read(reader: impl Read) -> io::Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    let read = reader.take(MOST + 1).read_to_end(&mut unpacked);
    if unpacked.len() as u64 > MOST {
        return Err(io::Error::other("it is larger than any kernel"));
    }
    // After the end there may be the unpacked size, which some readers take for more to unpack.
    match read {
        Err(error) if !unpacked.starts_with(b"\x7fELF") => Err(error),
        _ => Ok(unpacked),
    }
}

/// The framing that `lz4 -l` writes: blocks of at most 8 MiB, each with its packed size in front.
fn lz4(payload: &[u8]) -> io::Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let mut unpacked = Vec::new();
    let mut rest = payload.get(4..).unwrap_or_default();
    let mut block = vec![0; BLOCK];
    while let Some((size, after)) = rest.split_first_chunk::<4>() {
        // What is left at the end is the unpacked size.
        let Some(packed) = after.get(..u32::from_le_bytes(*size) as usize).filter(|packed| !packed.is_empty()) else {
            break;
        };
        let len = lz4_flex::block::decompress_into(packed, &mut block).map_err(io::Error::other)?;
        unpacked.extend_from_slice(block.get(..len).unwrap_or_default());
        if unpacked.len() as u64 > MOST {
            return Err(io::Error::other("it is larger than any kernel"));
        }
        rest = after.get(packed.len()..).unwrap_or_default();
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests;
