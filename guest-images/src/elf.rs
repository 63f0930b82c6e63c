//! Looking things up in an image.

use object::{Object, ObjectSymbol};

/// The address of a symbol (its value, as the linker wrote it); `None` when the
/// image has no such symbol or is no object file.
pub fn symbol(image: &[u8], name: &str) -> Option<u64> {
    let file = object::File::parse(image).ok()?;
    file.symbol_by_name(name).map(|symbol| symbol.address())
}

/// All named symbols of an image with their addresses, in the order of its symbol
/// table; empty when the image is no object file.
pub fn symbols(image: &[u8]) -> Vec<(&str, u64)> {
    let Ok(file) = object::File::parse(image) else {
        return Vec::new();
    };
    file.symbols()
        .filter(|symbol| symbol.is_definition() || symbol.is_global())
        .filter_map(|symbol| Some((symbol.name().ok()?, symbol.address())))
        .filter(|(name, _)| !name.is_empty())
        .collect()
}

/// The entry point in the ELF header; `None` when the image is no object file.
pub fn entry(image: &[u8]) -> Option<u64> {
    Some(object::File::parse(image).ok()?.entry())
}
