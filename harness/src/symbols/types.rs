//! C types, whichever debug information they come from, and the way from a variable to its member.

use super::error::LookupError;
use super::table;

/// Types refer to each other no deeper than this; what does is damaged, or goes in circles.
const DEPTH: u32 = 64;

/// What a type is.
#[derive(Debug, Clone)]
pub(super) enum Node<Id> {
    /// A number, or an enumeration.
    Scalar {
        name: String,
        size: u64,
    },
    /// A structure or union; `struct {...}` if it has no name.
    Aggregate {
        name: String,
        size: u64,
    },
    Pointer {
        to: Option<Id>,
        size: u64,
    },
    /// One count for each dimension, the outermost first; 0 if it is not known.
    Array {
        element: Id,
        counts: Vec<u64>,
    },
    Function {
        returns: Option<Id>,
    },
    /// A typedef (a name), or a qualifier such as `const`.
    Alias {
        name: Option<String>,
        qualifier: &'static str,
        of: Option<Id>,
    },
}

/// A member of a structure or union.
#[derive(Debug, Clone)]
pub(super) struct Member<Id> {
    /// None if it is a structure or union without a name, whose members are reached as if they were here.
    pub(super) name: Option<String>,
    /// Bytes.
    pub(super) offset: u64,
    /// Width, if it is a bit-field.
    pub(super) bits: Option<u64>,
    pub(super) of: Id,
}

/// Debug information that has types. A type that cannot be read is none.
pub(super) trait Types {
    type Id: Copy;

    fn node(&self, id: Self::Id) -> Option<Node<Self::Id>>;

    fn members(&self, id: Self::Id) -> Vec<Member<Self::Id>>;
}

/// One step of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Member(String),
    Index(u64),
}

/// Splits `name.member[3].member` into the name and the steps from there.
pub(super) fn parse_path(path: &str) -> Result<(&str, Vec<Step>), LookupError> {
    let bad = |why| LookupError::BadPath { path: path.to_owned(), why };
    if path.contains("->") {
        return Err(bad("pointers are not followed, where they point to is not known before the run"));
    }
    // A dot within a symbol's name is the compiler's, such as `count.5`: the member's name begins with a letter.
    let end = path.char_indices().find(|&(at, c)| c == '[' || c == '.' && starts_member(path, at));
    let (name, mut rest) = path.split_at(end.map_or(path.len(), |(at, _)| at));
    if name.is_empty() || !name.chars().all(|c| is_word(c) || c == '.' || c == ':') {
        return Err(bad("the variable's name is missing or has a character that no name has"));
    }
    let mut steps = Vec::new();
    while !rest.is_empty() {
        if let Some(member) = rest.strip_prefix('.') {
            let len = member.find(|c| !is_word(c)).unwrap_or(member.len());
            let (member, after) = member.split_at(len);
            if member.is_empty() {
                return Err(bad("a member's name is missing after `.`"));
            }
            steps.push(Step::Member(member.to_owned()));
            rest = after;
        } else if let Some(index) = rest.strip_prefix('[') {
            let (index, after) = index.split_once(']').ok_or_else(|| bad("`]` is missing"))?;
            steps.push(Step::Index(number(index).ok_or_else(|| bad("an index is a number"))?));
            rest = after;
        } else {
            return Err(bad("after a name comes `.`, `[` or nothing"));
        }
    }
    Ok((name, steps))
}

fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn starts_member(path: &str, dot: usize) -> bool {
    path.get(dot + 1..).and_then(|rest| rest.chars().next()).is_none_or(|c| !c.is_ascii_digit())
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '$'
}

/// A place inside of a variable.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// Bytes from the variable's start.
    pub(super) offset: u64,
    pub(super) size: u64,
    pub(super) type_name: String,
    /// Number of elements, if it is an array.
    pub(super) elements: Option<u64>,
}

/// A type, or what is left of an array after some indices.
#[derive(Clone, Copy)]
struct At<Id> {
    id: Id,
    /// So many dimensions of the array are behind us.
    skipped: usize,
}

/// Goes `steps` from something of type `id`, which is called `name`.
pub(super) fn walk<T: Types>(types: &T, id: T::Id, name: &str, steps: &[Step]) -> Result<Place, LookupError> {
    let damaged = |why: &str| LookupError::Damaged { name: name.to_owned(), why: why.to_owned() };
    let mut at = At { id, skipped: 0 };
    let mut offset = 0u64;
    let mut path = name.to_owned();
    let mut bits = None;
    for step in steps {
        let (node, plain) = plain(types, at.id).ok_or_else(|| damaged("a type is missing"))?;
        if plain_changed(at, &node) {
            at.skipped = 0;
        }
        let not_one = |asked: String| LookupError::NotAnAggregate {
            path: path.clone(),
            type_name: type_name(types, at.id, at.skipped),
            asked,
        };
        match (step, node) {
            (Step::Member(member), Node::Aggregate { name: of, .. }) => {
                let Some(found) = member_of(types, plain, member, DEPTH) else {
                    let mut names = Vec::new();
                    member_names(types, plain, &mut names, DEPTH);
                    let similar = table::similar(member, names.iter().map(String::as_str), 5);
                    return Err(LookupError::NoSuchMember { of, member: member.clone(), similar });
                };
                offset = offset.checked_add(found.offset).ok_or_else(|| damaged("an offset is too large"))?;
                at = At { id: found.of, skipped: 0 };
                bits = found.bits;
                path = format!("{path}.{member}");
            }
            (Step::Index(index), Node::Array { element, counts }) => {
                let len = counts.get(at.skipped).copied().unwrap_or_default();
                if *index >= len {
                    return Err(LookupError::OutOfBounds { path, len, index: *index });
                }
                let next = At { id: plain, skipped: at.skipped + 1 };
                at = if next.skipped < counts.len() { next } else { At { id: element, skipped: 0 } };
                let size = size(types, at.id, at.skipped, DEPTH).ok_or_else(|| damaged("an element has no size"))?;
                offset = size
                    .checked_mul(*index)
                    .and_then(|distance| offset.checked_add(distance))
                    .ok_or_else(|| damaged("an offset is too large"))?;
                bits = None;
                path = format!("{path}[{index}]");
            }
            (Step::Member(member), _) => return Err(not_one(format!(".{member}"))),
            (Step::Index(index), _) => return Err(not_one(format!("[{index}]"))),
        }
    }
    if let Some(bits) = bits {
        return Err(LookupError::Bitfield { path, bits });
    }
    let elements = match plain(types, at.id) {
        Some((Node::Array { counts, .. }, _)) => counts.get(at.skipped).copied(),
        _ => None,
    };
    Ok(Place {
        offset,
        size: size(types, at.id, at.skipped, DEPTH).ok_or_else(|| damaged("a type has no size"))?,
        type_name: type_name(types, at.id, at.skipped),
        elements,
    })
}

/// Dimensions are counted within one array type only.
fn plain_changed<Id>(at: At<Id>, node: &Node<Id>) -> bool {
    at.skipped > 0 && !matches!(node, Node::Array { .. })
}

/// The type behind typedefs and qualifiers, and its id.
fn plain<T: Types>(types: &T, mut id: T::Id) -> Option<(Node<T::Id>, T::Id)> {
    for _ in 0..DEPTH {
        match types.node(id)? {
            Node::Alias { of, .. } => id = of?,
            node => return Some((node, id)),
        }
    }
    None
}

/// The member of this name, through members without a name.
fn member_of<T: Types>(types: &T, id: T::Id, name: &str, depth: u32) -> Option<Member<T::Id>> {
    let depth = depth.checked_sub(1)?;
    for member in types.members(id) {
        match &member.name {
            Some(found) if found == name => return Some(member),
            Some(_) => {}
            None => {
                let (_, inner) = plain(types, member.of)?;
                if let Some(found) = member_of(types, inner, name, depth) {
                    return Some(Member { offset: member.offset.checked_add(found.offset)?, ..found });
                }
            }
        }
    }
    None
}

fn member_names<T: Types>(types: &T, id: T::Id, names: &mut Vec<String>, depth: u32) {
    let Some(depth) = depth.checked_sub(1) else { return };
    for member in types.members(id) {
        match (member.name, plain(types, member.of)) {
            (Some(name), _) => names.push(name),
            (None, Some((_, inner))) => member_names(types, inner, names, depth),
            (None, None) => {}
        }
    }
}

/// Bytes of a type; of an array without its first `skipped` dimensions.
fn size<T: Types>(types: &T, id: T::Id, skipped: usize, depth: u32) -> Option<u64> {
    let depth = depth.checked_sub(1)?;
    match plain(types, id)?.0 {
        Node::Scalar { size, .. } | Node::Aggregate { size, .. } | Node::Pointer { size, .. } => Some(size),
        Node::Array { element, counts } => {
            let element = size(types, element, 0, depth)?;
            counts.get(skipped..)?.iter().try_fold(element, |size, count| size.checked_mul(*count))
        }
        Node::Function { .. } | Node::Alias { .. } => Some(1),
    }
}

/// A type as C writes it.
fn type_name<T: Types>(types: &T, id: T::Id, skipped: usize) -> String {
    let (before, after) = declarator(types, Some(id), skipped, DEPTH);
    format!("{before}{after}")
}

/// A type as C writes it, in front of a name and behind it.
fn declarator<T: Types>(types: &T, id: Option<T::Id>, skipped: usize, depth: u32) -> (String, String) {
    let void = || ("void".to_owned(), String::new());
    let (Some(id), Some(depth)) = (id, depth.checked_sub(1)) else { return void() };
    let Some(node) = types.node(id) else { return void() };
    match node {
        Node::Scalar { name, .. } | Node::Aggregate { name, .. } | Node::Alias { name: Some(name), .. } => {
            (name, String::new())
        }
        Node::Pointer { to, .. } => {
            let (before, after) = declarator(types, to, 0, depth);
            let space = if before.ends_with('*') { "" } else { " " };
            // What is pointed to binds its brackets closer than the star.
            if after.is_empty() {
                (format!("{before}{space}*"), after)
            } else {
                (format!("{before}{space}(*"), format!("){after}"))
            }
        }
        Node::Array { element, counts } => {
            let (before, after) = declarator(types, Some(element), 0, depth);
            let space = if before.ends_with(['*', ' ']) { "" } else { " " };
            let brackets: String =
                counts.get(skipped..).unwrap_or_default().iter().map(|count| format!("[{count}]")).collect();
            let space = if after.is_empty() { space } else { "" };
            (format!("{before}{space}"), format!("{brackets}{after}"))
        }
        Node::Function { returns } => {
            let (before, after) = declarator(types, returns, 0, depth);
            (before, format!("(){after}"))
        }
        Node::Alias { name: None, qualifier, of } => {
            let pointer = of.is_some_and(|of| matches!(types.node(of), Some(Node::Pointer { .. })));
            let (before, after) = declarator(types, of, skipped, depth);
            // An array of const elements is const itself.
            if qualifier.is_empty() || before.starts_with(&format!("{qualifier} ")) {
                (before, after)
            } else if pointer {
                (format!("{before} {qualifier}"), after)
            } else {
                (format!("{qualifier} {before}"), after)
            }
        }
    }
}
