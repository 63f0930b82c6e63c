//! From a name to an address.

use std::sync::Arc;

use super::error::LookupError;
use super::modules::Module;
use super::table::{Class, Entry, Kind, Table};
use super::types::{Place, Types, parse_path, walk};
use super::{Field, Match, Symbol, Symbols, Variable};

/// So many similar names are told.
const SIMILAR: usize = 5;

/// A symbol that was found, and what its table says of it.
struct Found<'a> {
    symbol: Symbol,
    entry: &'a Entry,
}

impl Found<'_> {
    fn is_function(&self) -> bool {
        self.entry.is_function()
    }
}

impl Symbols {
    /// The functions of this name: several if several files have a static one of the name, or the compiler made
    /// clones. Sorted by address, each address once. The kernel's own are given if there are any, else those of all
    /// loaded modules; `MODULE:NAME` looks in that module only.
    ///
    /// # Errors
    ///
    /// There is none, or none that can be trapped: the error says which and what to do.
    pub fn functions(&self, name: &str) -> Result<Vec<Symbol>, LookupError> {
        let found = self.found(name)?;
        let mut functions = found.into_iter().filter(Found::is_function).map(|found| found.symbol).peekable();
        let Some(first) = functions.peek().cloned() else {
            return Err(LookupError::NotAFunction { name: name.to_owned() });
        };
        let lasting: Vec<Symbol> = functions.filter(|symbol| !discarded(symbol)).collect();
        if lasting.is_empty() { Err(self.init(name, &first)) } else { Ok(lasting) }
    }

    /// A variable, or what `.member` and `[3]` lead to in one: `jiffies_64`, `init_task.flags`, `a[3].b`,
    /// `MODULE:NAME`. Pointers are not followed.
    ///
    /// # Errors
    ///
    /// There is none, or none that can be watched: the error says which and what to do.
    pub fn variable(&self, path: &str) -> Result<Variable, LookupError> {
        let (name, steps) = parse_path(path)?;
        let (symbol, of) = self.one_variable(name)?;
        let place = match self.typed(&symbol, name, &steps) {
            Some(place) => place?,
            None if steps.is_empty() => {
                Place { offset: 0, size: symbol.size, type_name: String::new(), elements: None }
            }
            None => return Err(LookupError::NoTypes { path: path.to_owned() }),
        };
        Ok(Variable {
            path: path.to_owned(),
            module: symbol.module,
            address: symbol.address.wrapping_add(place.offset),
            // A type without a size is one that is declared only.
            size: if place.size == 0 && steps.is_empty() { of } else { place.size },
            type_name: (!place.type_name.is_empty()).then_some(place.type_name),
            class: symbol.class,
        })
    }

    /// All symbols of this name, whatever they are.
    pub fn find(&self, name: &str) -> Vec<Symbol> {
        self.found(name).unwrap_or_default().into_iter().map(|found| found.symbol).collect()
    }

    /// The address of a symbol of any kind, discarded ones too; of several the lowest. None for numbers and per-cpu variables,
    /// which have none.
    pub fn address(&self, name: &str) -> Option<u64> {
        let (module, name) = split(name);
        let has_address = |entry: &&Entry| !matches!(entry.class, Class::Absolute | Class::PerCpu);
        if module.is_none()
            && let Some(entry) = self.kernel.table.named(name).find(has_address)
        {
            return Some(self.to_run_time(entry.address));
        }
        let mut modules = self.modules.iter().filter(|candidate| module.is_none_or(|name| candidate.is_called(name)));
        modules.find_map(|module| module.table.named(name).find(has_address)).map(|entry| entry.address)
    }

    /// A member of a structure, union or typedef, by the type's name without `struct`: `("task_struct", "se.vruntime")`. An empty
    /// path is the type itself. For walking the guest's data; types come from BTF, else from DWARF.
    pub fn field(&self, type_name: &str, member_path: &str) -> Option<Field> {
        let member_path = if member_path.is_empty() { String::new() } else { format!(".{member_path}") };
        let path = format!("{type_name}{member_path}");
        let (_, steps) = parse_path(&path).ok()?;
        let place = self.kernel.field(type_name, &steps)?;
        let Place { offset, size, type_name, elements } = place;
        Some(Field { offset, size, type_name, elements })
    }

    /// The only variable of this name, and its size in the symbol table.
    fn one_variable(&self, name: &str) -> Result<(Symbol, u64), LookupError> {
        let found = self.found(name)?;
        let mut variables: Vec<Symbol> =
            found.into_iter().filter(|found| !found.is_function()).map(|found| found.symbol).collect();
        let numbers = variables.iter().filter(|symbol| symbol.class == Class::Absolute).count();
        if numbers < variables.len() {
            variables.retain(|symbol| symbol.class != Class::Absolute);
        }
        let [symbol] = variables.as_slice() else {
            let at = variables.iter().map(|symbol| (symbol.module.as_deref().map(str::to_owned), symbol.address));
            return Err(match variables.first() {
                None => LookupError::NotAVariable { name: name.to_owned() },
                Some(_) => LookupError::Ambiguous { name: name.to_owned(), at: at.collect() },
            });
        };
        match symbol.class {
            Class::PerCpu => Err(LookupError::PerCpu { name: name.to_owned() }),
            Class::Absolute => Err(LookupError::NotAVariable { name: name.to_owned() }),
            _ if discarded(symbol) => Err(self.init(name, symbol)),
            _ => Ok((symbol.clone(), symbol.size)),
        }
    }

    /// Goes `steps` from a variable; none if its type is not known.
    fn typed(&self, symbol: &Symbol, name: &str, steps: &[super::types::Step]) -> Option<Result<Place, LookupError>> {
        fn go<T: Types>(
            types: &T,
            of: T::Id,
            name: &str,
            steps: &[super::types::Step],
        ) -> Option<Result<Place, LookupError>> {
            Some(walk(types, of, name, steps))
        }
        let (dwarf, address) = match &symbol.module {
            None => (self.kernel.dwarf.as_ref(), self.to_linked(symbol.address)?),
            Some(module) => {
                let module = self.modules.iter().find(|candidate| candidate.is_called(module))?;
                (module.dwarf.as_ref(), symbol.address)
            }
        };
        if let Some(dwarf) = dwarf {
            let reader = dwarf.reader();
            if let Some(of) = reader.variable(&symbol.name, address) {
                return go(&reader, of, name, steps);
            }
        }
        let btf = self.kernel.btf().filter(|_| symbol.module.is_none())?;
        go(&btf, btf.variable(&symbol.name)?, name, steps)
    }

    /// Every symbol that is called so.
    fn found(&self, asked: &str) -> Result<Vec<Found<'_>>, LookupError> {
        let (module, name) = split(asked);
        let kernel = &self.kernel;
        let mut found = Vec::new();
        if let Some(module) = module {
            let Some(module) = self.modules.iter().find(|candidate| candidate.is_called(module)) else {
                return Err(self.not_loaded(module, name));
            };
            found.extend(self.in_module(module, name));
            if found.is_empty() {
                return Err(LookupError::Missing {
                    name: asked.to_owned(),
                    similar: module.table.similar(name, SIMILAR),
                });
            }
        } else {
            found.extend(named(&kernel.table, name, |entry, matched| self.symbol(&kernel.table, entry, matched, None)));
            if found.is_empty() {
                for module in self.modules.iter() {
                    found.extend(self.in_module(module, name));
                }
            }
        }
        if found.is_empty() && kernel.table.is_empty() {
            return Err(LookupError::NoSymbols { why: kernel.nothing.clone() });
        }
        if found.is_empty() {
            if let Some(into) = kernel.dwarf.as_ref().and_then(|dwarf| dwarf.reader().inlined_into(name)) {
                return Err(LookupError::Inlined { name: name.to_owned(), into });
            }
            return Err(LookupError::Missing { name: name.to_owned(), similar: kernel.table.similar(name, SIMILAR) });
        }
        found.sort_by_key(|found| found.symbol.address);
        found.dedup_by_key(|found| found.symbol.address);
        Ok(found)
    }

    fn in_module<'a>(&'a self, module: &'a Module, name: &str) -> Vec<Found<'a>> {
        named(&module.table, name, |entry, matched| self.symbol(&module.table, entry, matched, Some(&module.name)))
    }

    fn not_loaded(&self, module: &str, name: &str) -> LookupError {
        match self.kernel.module_file(module).map(|file| file.table()) {
            None => LookupError::NoSuchModule {
                module: module.to_owned(),
                known: self.modules.iter().map(|module| module.name.to_string()).collect(),
            },
            Some(table) if named(&table, name, |_, _| ()).is_empty() => {
                LookupError::Missing { name: format!("{module}:{name}"), similar: table.similar(name, SIMILAR) }
            }
            Some(_) => LookupError::NotLoaded { module: module.to_owned(), name: name.to_owned() },
        }
    }

    fn symbol<'a>(&self, table: &'a Table, entry: &'a Entry, matched: Match, module: Option<&Arc<str>>) -> Found<'a> {
        let address = match entry.class {
            Class::PerCpu | Class::Absolute => entry.address,
            _ if module.is_some() => entry.address,
            _ => self.to_run_time(entry.address),
        };
        let symbol = Symbol {
            name: table.name(entry).to_owned(),
            module: module.cloned(),
            address,
            size: entry.size,
            class: entry.class,
            matched,
        };
        Found { symbol, entry }
    }

    fn init(&self, name: &str, symbol: &Symbol) -> LookupError {
        let linked = self.to_linked(symbol.address).filter(|_| symbol.module.is_none());
        let section = linked.and_then(|address| self.kernel.image.as_ref()?.section_at(address));
        let section = section.map(|section| section.name.as_str()).unwrap_or(match symbol.class {
            Class::InitText => ".init.text",
            Class::ExitText => ".exit.text",
            _ => ".init.data",
        });
        LookupError::Init { name: name.to_owned(), section: section.to_owned() }
    }
}

/// `MODULE:NAME`.
fn split(name: &str) -> (Option<&str>, &str) {
    match name.split_once(':') {
        Some((module, name)) => (Some(module), name),
        None => (None, name),
    }
}

/// Whether the symbol's memory is given back after boot.
fn discarded(symbol: &Symbol) -> bool {
    match symbol.class {
        Class::InitText | Class::InitData => true,
        // A module keeps it until it is unloaded.
        Class::ExitText => symbol.module.is_none(),
        _ => false,
    }
}

/// The symbols of a table that `name` may mean.
fn named<'a, T>(table: &'a Table, name: &str, with: impl Fn(&'a Entry, Match) -> T) -> Vec<T> {
    let mut found: Vec<T> = table.named(name).map(|entry| with(entry, Match::Exact)).collect();
    let suffixed = table.suffixed(name);
    for wanted in [Match::Clone, Match::Part] {
        // A part stands for the function only where nothing else does; a function's static variable, likewise.
        let meant = |entry: &Entry, suffix: &str| match suffix_means(suffix) {
            Some(Match::Clone) if entry.kind == Kind::Variable => wanted == Match::Clone && found.is_empty(),
            meaning => meaning == Some(wanted),
        };
        if wanted == Match::Part && !found.is_empty() {
            break;
        }
        let more: Vec<T> = suffixed
            .iter()
            .filter(|(entry, suffix)| meant(entry, suffix))
            .map(|(entry, _)| with(entry, wanted))
            .collect();
        found.extend(more);
    }
    found
}

/// What a suffix that the compiler put behind a name says; none if it is not the function or variable itself.
fn suffix_means(suffix: &str) -> Option<Match> {
    let mut meaning = Match::Clone;
    for part in suffix.split('.').filter(|part| !part.is_empty()) {
        match part {
            "part" => meaning = Match::Part,
            "isra" | "constprop" | "lto_priv" | "llvm" | "localalias" => {}
            // Not entered by a call: the unlikely half of the function, split off.
            "cold" => return None,
            number if number.bytes().all(|byte| byte.is_ascii_digit()) => {}
            _ => return None,
        }
    }
    Some(meaning)
}
