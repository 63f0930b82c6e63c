//! BTF: the types of a kernel in a compact form, which is part of its image even where there is no DWARF.
//!
//! The format is that of the kernel's Documentation/bpf/btf.rst. Everything is checked as it is read.

use super::types::{Member, Node, Types};

const MAGIC: u16 = 0xeb9f;

/// No kernel has more types.
const MOST: usize = 1 << 22;

/// Where things are in the section. The section's bytes are given along with each question.
#[derive(Debug)]
pub(super) struct Btf {
    /// Offset of each type; type 0 is void and has none.
    types: Vec<u32>,
    strings: usize,
}

/// A type's kind, as the format numbers them.
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const PTR: u32 = 2;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const FWD: u32 = 7;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const FLOAT: u32 = 16;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// The common part of each type.
struct Header {
    name: u32,
    kind: u32,
    count: usize,
    /// Members' offsets carry their width.
    flag: bool,
    /// Size, or the type referred to.
    size_or_type: u32,
    /// Where the kind's own part begins.
    body: usize,
}

impl Btf {
    /// Finds where each type is; none if this is not BTF or is damaged.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        if u16::from_le_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let header = word(bytes, 4)? as usize;
        let start = header.checked_add(word(bytes, 8)? as usize)?;
        let end = start.checked_add(word(bytes, 12)? as usize)?;
        let strings = header.checked_add(word(bytes, 16)? as usize)?;
        bytes.get(strings..)?;
        bytes.get(start..end)?;
        let mut types = vec![0];
        let mut at = start;
        while at < end && types.len() < MOST {
            let header = header_at(bytes, at)?;
            types.push(u32::try_from(at).ok()?);
            at = header.body.checked_add(body_size(&header)?)?;
        }
        Some(Btf { types, strings })
    }

    /// This, with the section's bytes.
    pub(super) fn on<'a>(&'a self, bytes: &'a [u8]) -> View<'a> {
        View { btf: self, bytes }
    }
}

/// Bytes of a type behind its header.
fn body_size(header: &Header) -> Option<usize> {
    let each = match header.kind {
        kind::INT | kind::VAR | kind::DECL_TAG => return Some(4),
        kind::ARRAY => return Some(12),
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12,
        kind::ENUM | kind::FUNC_PROTO => 8,
        kind::PTR
        | kind::FWD
        | kind::TYPEDEF
        | kind::VOLATILE
        | kind::CONST
        | kind::RESTRICT
        | kind::FUNC
        | kind::FLOAT
        | kind::TYPE_TAG => 0,
        // How long it is nobody knows, and so where the next one begins.
        _ => return None,
    };
    header.count.checked_mul(each)
}

fn header_at(bytes: &[u8], at: usize) -> Option<Header> {
    let info = word(bytes, at.checked_add(4)?)?;
    Some(Header {
        name: word(bytes, at)?,
        kind: info >> 24 & 0x1f,
        count: (info & 0xffff) as usize,
        flag: info >> 31 == 1,
        size_or_type: word(bytes, at.checked_add(8)?)?,
        body: at.checked_add(12)?,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// BTF and its bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a> {
    btf: &'a Btf,
    bytes: &'a [u8],
}

impl<'a> View<'a> {
    /// The structure or union of this name that has members, else the typedef.
    pub(super) fn named(self, name: &str) -> Option<u32> {
        self.first(|header| {
            matches!(header.kind, kind::STRUCT | kind::UNION) && self.string(header.name) == name.as_bytes()
        })
        .or_else(|| self.first(|header| header.kind == kind::TYPEDEF && self.string(header.name) == name.as_bytes()))
    }

    /// The type of the variable of this name.
    pub(super) fn variable(self, name: &str) -> Option<u32> {
        let id = self.first(|header| header.kind == kind::VAR && self.string(header.name) == name.as_bytes())?;
        Some(self.header(id)?.size_or_type)
    }

    fn first(self, wanted: impl Fn(&Header) -> bool) -> Option<u32> {
        (1..u32::try_from(self.btf.types.len()).ok()?).find(|&id| self.header(id).is_some_and(|header| wanted(&header)))
    }

    fn header(self, id: u32) -> Option<Header> {
        let at = *self.btf.types.get(id as usize).filter(|_| id != 0)?;
        header_at(self.bytes, at as usize)
    }

    fn string(self, offset: u32) -> &'a [u8] {
        let from = self.btf.strings.saturating_add(offset as usize);
        self.bytes.get(from..).and_then(|bytes| bytes.split(|&byte| byte == 0).next()).unwrap_or_default()
    }

    fn name(self, offset: u32) -> Option<String> {
        let name = self.string(offset);
        (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned())
    }
}

impl Types for View<'_> {
    type Id = u32;

    fn node(&self, id: u32) -> Option<Node<u32>> {
        let header = self.header(id)?;
        let name = self.name(header.name);
        let tagged = |tag: &str| match &name {
            Some(name) => format!("{tag} {name}"),
            None => format!("{tag} {{...}}"),
        };
        let size = u64::from(header.size_or_type);
        let of = Some(header.size_or_type).filter(|&of| of != 0);
        let alias = |qualifier| Node::Alias { name: None, qualifier, of };
        Some(match header.kind {
            kind::INT | kind::FLOAT => Node::Scalar { name: name.unwrap_or_default(), size },
            kind::ENUM | kind::ENUM64 => Node::Scalar { name: tagged("enum"), size },
            kind::PTR => Node::Pointer { to: of, size: 8 },
            kind::ARRAY => Node::Array {
                element: word(self.bytes, header.body)?,
                counts: vec![u64::from(word(self.bytes, header.body.checked_add(8)?)?)],
            },
            kind::STRUCT => Node::Aggregate { name: tagged("struct"), size },
            kind::UNION => Node::Aggregate { name: tagged("union"), size },
            kind::FWD => Node::Aggregate { name: tagged(if header.flag { "union" } else { "struct" }), size: 0 },
            kind::TYPEDEF => Node::Alias { name, qualifier: "", of },
            kind::CONST => alias("const"),
            kind::VOLATILE => alias("volatile"),
            kind::RESTRICT => alias("restrict"),
            kind::TYPE_TAG | kind::VAR => alias(""),
            kind::FUNC_PROTO => Node::Function { returns: of },
            _ => return None,
        })
    }

    fn members(&self, id: u32) -> Vec<Member<u32>> {
        let Some(header) = self.header(id).filter(|header| matches!(header.kind, kind::STRUCT | kind::UNION)) else {
            return Vec::new();
        };
        let member = |index: usize| {
            let at = header.body.checked_add(index.checked_mul(12)?)?;
            let offset = word(self.bytes, at.checked_add(8)?)?;
            let (offset, bits) = if header.flag { (offset & 0xff_ffff, offset >> 24) } else { (offset, 0) };
            Some(Member {
                name: self.name(word(self.bytes, at)?),
                offset: u64::from(offset / 8),
                bits: (bits != 0).then_some(u64::from(bits)),
                of: word(self.bytes, at.checked_add(4)?)?,
            })
        };
        (0..header.count).map_while(member).collect()
    }
}
