//! C types in DWARF. A type is known by where its entry is in `.debug_info`.

use std::rc::Rc;

use gimli::AttributeValue;

use super::entries::{Found, Reader};
use crate::symbols::types::{Member, Node, Types};

impl<'a> Reader<'a> {
    fn size(&self, found: &Found<'_>) -> u64 {
        found.number(gimli::DW_AT_byte_size).unwrap_or_default()
    }

    /// Elements in each dimension.
    fn counts(&self, array: &Found<'a>) -> Vec<u64> {
        let ranges = self.children(array).into_iter().filter(|child| child.entry.tag() == gimli::DW_TAG_subrange_type);
        ranges
            .map(|range| {
                let count = range.number(gimli::DW_AT_count);
                let bound = || range.number(gimli::DW_AT_upper_bound)?.checked_add(1);
                count.or_else(bound).unwrap_or_default()
            })
            .collect()
    }

    /// The children of an entry, without theirs.
    fn children(&self, parent: &Found<'a>) -> Vec<Found<'a>> {
        let mut children = Vec::new();
        let Ok(mut entries) = parent.unit.entries_at_offset(parent.offset()) else { return children };
        // The first is the parent itself.
        if !matches!(entries.next_entry(), Ok(true)) || !parent.entry.has_children() {
            return children;
        }
        let mut more = matches!(entries.next_entry(), Ok(true));
        while let (true, Some(entry)) = (more, entries.current()) {
            children.push(Found { unit: Rc::clone(&parent.unit), entry: entry.clone() });
            more = matches!(entries.next_sibling(), Ok(Some(_)));
        }
        children
    }
}

impl Types for Reader<'_> {
    type Id = usize;

    fn node(&self, id: usize) -> Option<Node<usize>> {
        let found = self.entry_at(id)?;
        let of = self.target(&found, gimli::DW_AT_type);
        let name = self.string(&found, gimli::DW_AT_name);
        let tagged = |tag: &str| match &name {
            Some(name) => format!("{tag} {name}"),
            None => format!("{tag} {{...}}"),
        };
        let alias = |qualifier| Node::Alias { name: None, qualifier, of };
        Some(match found.entry.tag() {
            gimli::DW_TAG_base_type => Node::Scalar { name: name.unwrap_or_default(), size: self.size(&found) },
            gimli::DW_TAG_enumeration_type => Node::Scalar { name: tagged("enum"), size: self.size(&found) },
            gimli::DW_TAG_structure_type | gimli::DW_TAG_class_type => {
                Node::Aggregate { name: tagged("struct"), size: self.size(&found) }
            }
            gimli::DW_TAG_union_type => Node::Aggregate { name: tagged("union"), size: self.size(&found) },
            gimli::DW_TAG_pointer_type => {
                let size = found.number(gimli::DW_AT_byte_size);
                Node::Pointer { to: of, size: size.unwrap_or(u64::from(found.unit.encoding().address_size)) }
            }
            gimli::DW_TAG_array_type => Node::Array { element: of?, counts: self.counts(&found) },
            gimli::DW_TAG_subroutine_type => Node::Function { returns: of },
            gimli::DW_TAG_typedef => Node::Alias { name, qualifier: "", of },
            gimli::DW_TAG_const_type => alias("const"),
            gimli::DW_TAG_volatile_type => alias("volatile"),
            gimli::DW_TAG_restrict_type => alias("restrict"),
            gimli::DW_TAG_atomic_type => alias("_Atomic"),
            _ => return None,
        })
    }

    fn members(&self, id: usize) -> Vec<Member<usize>> {
        let Some(parent) = self.entry_at(id) else { return Vec::new() };
        let mut members = Vec::new();
        for child in &self.children(&parent) {
            if child.entry.tag() != gimli::DW_TAG_member {
                continue;
            }
            let Some(of) = self.target(child, gimli::DW_AT_type) else { continue };
            let bits = child.number(gimli::DW_AT_bit_size);
            let offset = match child.entry.attr(gimli::DW_AT_data_member_location).map(|attr| attr.value()) {
                None => child.number(gimli::DW_AT_data_bit_offset).unwrap_or_default() / 8,
                Some(AttributeValue::Exprloc(expression)) => match plus_uconst(expression) {
                    Some(offset) => offset,
                    None => continue,
                },
                Some(_) => match child.number(gimli::DW_AT_data_member_location) {
                    Some(offset) => offset,
                    None => continue,
                },
            };
            members.push(Member { name: self.string(child, gimli::DW_AT_name), offset, bits, of });
        }
        members
    }
}

/// The form in which old compilers give a member's offset.
fn plus_uconst(expression: gimli::Expression<super::Slice<'_>>) -> Option<u64> {
    let mut operations =
        expression.operations(gimli::Encoding { address_size: 8, format: gimli::Format::Dwarf32, version: 4 });
    match operations.next().ok()?? {
        gimli::Operation::PlusConstant { value } => Some(value),
        _ => None,
    }
}
