//! What can be wrong with files of symbols, and with a name that is looked up in them.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A file with symbols that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SymbolsError {
    /// It cannot be opened or mapped.
    #[error("{}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is damaged, or not what it should be.
    #[error("{}: {why}", path.display())]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It was made with another kernel than the one that is booted.
    #[error(
        "{}: made with another kernel: {theirs}, but {} has {ours}; give the file of the same build", path.display(), kernel.display()
    )]
    OtherKernel {
        /// The file given with `--symbols`.
        path: PathBuf,
        /// What identifies its kernel: a build-id or a version.
        theirs: String,
        /// The kernel that is booted.
        kernel: PathBuf,
        /// What identifies that one.
        ours: String,
    },
}

impl SymbolsError {
    pub(super) fn open(path: &Path, source: io::Error) -> Self {
        SymbolsError::Open { path: path.to_owned(), source }
    }

    pub(super) fn bad(path: &Path, why: impl Into<String>) -> Self {
        SymbolsError::Bad { path: path.to_owned(), why: why.into() }
    }
}

/// Why a name does not give an address that can be trapped. Each says what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LookupError {
    /// There are no symbols at all.
    NoSymbols {
        /// Why, if a kernel was looked into.
        why: Option<String>,
    },
    /// No symbol has this name.
    Missing {
        /// The name.
        name: String,
        /// Names that look like it, the nearest first.
        similar: Vec<String>,
    },
    /// No module of this name is known.
    NoSuchModule {
        /// The module's name.
        module: String,
        /// Those that are.
        known: Vec<String>,
    },
    /// The module is not loaded yet; when it is, the name will be there.
    NotLoaded {
        /// The module.
        module: String,
        /// The symbol in it.
        name: String,
    },
    /// The function has no code of its own: the compiler put a copy of it into each of its callers.
    Inlined {
        /// The function.
        name: String,
        /// Functions that contain a copy.
        into: Vec<String>,
    },
    /// Its memory is given back once the kernel has booted.
    Init {
        /// The symbol.
        name: String,
        /// Its section, such as `.init.text`.
        section: String,
    },
    /// Each CPU has its own.
    PerCpu {
        /// The variable.
        name: String,
    },
    /// Several variables have this name.
    Ambiguous {
        /// The name.
        name: String,
        /// Where they are: module if not the kernel's, and address.
        at: Vec<(Option<String>, u64)>,
    },
    /// It is not a function.
    NotAFunction {
        /// The symbol.
        name: String,
    },
    /// It is not a variable.
    NotAVariable {
        /// The symbol.
        name: String,
    },
    /// The type has no such member.
    NoSuchMember {
        /// Name of the type.
        of: String,
        /// The member.
        member: String,
        /// Members that look like it.
        similar: Vec<String>,
    },
    /// The path says `.member` or `[index]` of something that has none.
    NotAnAggregate {
        /// The path up to there.
        path: String,
        /// Its type.
        type_name: String,
        /// What was asked of it.
        asked: String,
    },
    /// The index is beyond the array.
    OutOfBounds {
        /// The path up to there.
        path: String,
        /// Number of elements.
        len: u64,
        /// What was asked.
        index: u64,
    },
    /// The member is narrower than its bytes, which have other members' bits, too.
    Bitfield {
        /// The path.
        path: String,
        /// Its width in bits.
        bits: u64,
    },
    /// The path is not written as `name`, `name.member` or `name[3].member`.
    BadPath {
        /// The path.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There are no types to find members with.
    NoTypes {
        /// The path.
        path: String,
    },
    /// The debug information is damaged.
    Damaged {
        /// What was looked for.
        name: String,
        /// What is wrong.
        why: String,
    },
}

impl std::error::Error for LookupError {}

impl fmt::Display for LookupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LookupError::NoSymbols { why } => {
                f.write_str("there are no symbols")?;
                if let Some(why) = why {
                    write!(f, " ({why})")?;
                }
                f.write_str("; give the kernel's vmlinux or System.map with --symbols")
            }
            LookupError::Missing { name, similar } => {
                write!(f, "no symbol is called `{name}`")?;
                match similar.as_slice() {
                    [] => f.write_str("; is it configured into this kernel? A module's is written MODULE:NAME"),
                    some => write!(f, "; similar: {}", listed(some)),
                }
            }
            LookupError::NoSuchModule { module, known } => {
                write!(f, "no module `{module}` is loaded or given")?;
                match known.as_slice() {
                    [] => f.write_str("; give its .ko with --symbols"),
                    some => write!(f, "; there are {}", listed(some)),
                }
            }
            LookupError::NotLoaded { module, name } => {
                write!(f, "`{name}` is in the module `{module}`, which is not loaded; load it before this is looked up")
            }
            LookupError::Inlined { name, into } => {
                write!(f, "`{name}` has no code of its own, the compiler has inlined it")?;
                match into.as_slice() {
                    [] => f.write_str("; trap a function that calls it"),
                    some => write!(f, " into {}; trap that instead", listed(some)),
                }
            }
            LookupError::Init { name, section } => write!(
                f,
                "`{name}` is in {section}, which the kernel discards after boot, and its memory is then used for other \
                 things; trap something that lasts"
            ),
            LookupError::PerCpu { name } => {
                write!(
                    f,
                    "`{name}` is per-cpu: it has no single address; watch what it points to, or trap the code that uses it"
                )
            }
            LookupError::Ambiguous { name, at } => {
                write!(f, "{} variables are called `{name}`:", at.len())?;
                for (index, (module, address)) in at.iter().take(LISTED).enumerate() {
                    let comma = if index == 0 { "" } else { "," };
                    match module {
                        Some(module) => write!(f, "{comma} {module}:{name} at {address:#x}")?,
                        None => write!(f, "{comma} {address:#x}")?,
                    }
                }
                f.write_str("; give the address of the one you mean")
            }
            LookupError::NotAFunction { name } => {
                write!(f, "`{name}` is not a function; to watch a variable use write: or access:")
            }
            LookupError::NotAVariable { name } => {
                write!(f, "`{name}` is a function, not a variable; to trap it use exec:")
            }
            LookupError::NoSuchMember { of, member, similar } => {
                write!(f, "`{of}` has no member `{member}`")?;
                if !similar.is_empty() {
                    write!(f, "; similar: {}", listed(similar))?;
                }
                Ok(())
            }
            LookupError::NotAnAggregate { path, type_name, asked } => {
                write!(f, "`{path}` is of type `{type_name}`, which has no `{asked}`")?;
                if type_name.ends_with('*') {
                    f.write_str("; pointers are not followed, where they point to is not known before the run")?;
                }
                Ok(())
            }
            LookupError::OutOfBounds { path, len, index } => {
                write!(f, "`{path}` has {len} elements, there is no [{index}]")
            }
            LookupError::Bitfield { path, bits } => write!(
                f,
                "`{path}` is a bit-field of {bits} bit{}, and only whole bytes can be watched; watch the variable around it, \
                 or give an address",
                if *bits == 1 { "" } else { "s" }
            ),
            LookupError::BadPath { path, why } => {
                write!(f, "`{path}`: {why}; a variable is written name, name.member or name[3].member")
            }
            LookupError::NoTypes { path } => write!(
                f,
                "`{path}` needs types, and these symbols have none for it; give a vmlinux with debug information \
                 (CONFIG_DEBUG_INFO) with --symbols"
            ),
            LookupError::Damaged { name, why } => {
                write!(f, "the debug information for `{name}` cannot be read: {why}; give another file with --symbols")
            }
        }
    }
}

/// So many names are listed, and the rest counted.
const LISTED: usize = 5;

fn listed(names: &[String]) -> String {
    let mut text = names.iter().take(LISTED).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > LISTED {
        text.push_str(&format!(" and {} more", names.len() - LISTED));
    }
    text
}
