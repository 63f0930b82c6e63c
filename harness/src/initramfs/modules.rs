//! Kernel modules as distributions ship them.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use object::{Architecture, Object, ObjectKind};

use super::InitramfsError;

/// More than the largest module that there is, and less than what exhausts a host: compressed files are hostile.
const MAX_MODULE: u64 = 512 << 20;

/// A module's file name in the guest, and its contents, uncompressed.
pub(super) fn read(path: &Path) -> Result<(Vec<u8>, Vec<u8>), InitramfsError> {
    let failed = |source| InitramfsError::Read { path: path.into(), source };
    let bad = |problem: &str| InitramfsError::NotAModule { path: path.into(), problem: problem.to_owned() };
    let file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(InitramfsError::NotAFile { path: path.into() });
    }
    let name = path.file_name().unwrap_or_default().as_bytes();
    let plain = |suffix: &[u8]| name.strip_suffix(suffix).unwrap_or(name).to_vec();
    let mut bytes = Vec::new();
    let unpacked = |from: &mut dyn Read, bytes: &mut Vec<u8>| from.take(MAX_MODULE + 1).read_to_end(bytes);
    let damaged = |error: io::Error| bad(&format!("damaged compression ({error})"));
    let mut file = io::BufReader::new(file);
    let name = match io::BufRead::fill_buf(&mut file).map_err(failed)? {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            unpacked(&mut lzma_rust2::XzReader::new(file, true), &mut bytes).map_err(damaged)?;
            plain(b".xz")
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = ruzstd::decoding::StreamingDecoder::new(file)
                .map_err(|error| bad(&format!("damaged compression ({error})")))?;
            unpacked(&mut decoder, &mut bytes).map_err(damaged)?;
            plain(b".zst")
        }
        [0x1f, 0x8b, ..] => {
            unpacked(&mut flate2::read::MultiGzDecoder::new(file), &mut bytes).map_err(damaged)?;
            plain(b".gz")
        }
        _ => {
            unpacked(&mut file, &mut bytes).map_err(failed)?;
            name.to_vec()
        }
    };
    if bytes.len() as u64 > MAX_MODULE {
        return Err(bad("it is larger than 512 MiB"));
    }
    match object::File::parse(bytes.as_slice()) {
        Ok(elf) if elf.kind() != ObjectKind::Relocatable => Err(bad("it is no relocatable ELF")),
        Ok(elf) if elf.architecture() != Architecture::X86_64 => Err(bad("it is for another machine")),
        Ok(elf) if elf.section_by_name(".modinfo").is_none() => Err(bad("it has no .modinfo")),
        Ok(_) => Ok((name, bytes)),
        Err(_) => Err(bad("it is no ELF")),
    }
}
