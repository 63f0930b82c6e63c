//! Call frame information, `.debug_frame` and `.eh_frame` (DWARF 5, 6.4): what compilers know of their own frames.

use gimli::{
    BaseAddresses, CfaRule, CieOrFde, DebugFrame, EhFrame, EndianSlice, EvaluationResult, LittleEndian, Reader,
    RegisterRule, UnwindContext, UnwindExpression, UnwindSection, Value,
};

use super::place::{COUNT, General, Place, R12, R15, RBP, RBX, RSP, word};
use super::{End, FrameKind, Memory, Tables};

type Bytes<'a> = EndianSlice<'a, LittleEndian>;

/// The return address's column.
const RETURN_ADDRESS: gimli::Register = gimli::Register(16);
/// Most operations of an expression that is evaluated.
const MOST_OPERATIONS: u32 = 1000;

/// Which section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    DebugFrame,
    EhFrame,
}

/// Where the description of a function's frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Description {
    /// As linked.
    start: u64,
    end: u64,
    kind: Kind,
    /// In the section.
    offset: usize,
}

/// Finds the descriptions of an image's functions.
#[derive(Debug, Default)]
pub(super) struct CallFrames {
    /// Sorted.
    descriptions: Vec<Description>,
}

/// A section of a kind, with where it was linked to.
enum Section<'a> {
    DebugFrame(DebugFrame<Bytes<'a>>),
    EhFrame(EhFrame<Bytes<'a>>, BaseAddresses),
}

impl<'a> Section<'a> {
    fn of(tables: &'a impl Tables, kind: Kind) -> Option<Self> {
        match kind {
            Kind::DebugFrame => {
                let (_, bytes) = tables.section(".debug_frame")?;
                Some(Self::DebugFrame(DebugFrame::new(bytes, LittleEndian)))
            }
            Kind::EhFrame => {
                let linked = |name| Some(tables.section(name)?.0.wrapping_sub(tables.slide()));
                let (_, bytes) = tables.section(".eh_frame")?;
                let mut bases = BaseAddresses::default().set_eh_frame(linked(".eh_frame")?);
                if let Some(text) = linked(".text") {
                    bases = bases.set_text(text);
                }
                Some(Self::EhFrame(EhFrame::new(bytes, LittleEndian), bases))
            }
        }
    }
}

impl CallFrames {
    /// Lists what an image has; what comes behind something unreadable is left out.
    pub(super) fn read(tables: &impl Tables) -> Self {
        let mut descriptions = Vec::new();
        if let Some(Section::DebugFrame(section)) = Section::of(tables, Kind::DebugFrame) {
            list(&section, &BaseAddresses::default(), Kind::DebugFrame, &mut descriptions);
        }
        if let Some(Section::EhFrame(section, bases)) = Section::of(tables, Kind::EhFrame) {
            list(&section, &bases, Kind::EhFrame, &mut descriptions);
        }
        descriptions.sort_unstable();
        Self { descriptions }
    }

    /// The next frame; `None` if nothing describes `addr`, by which `place` is looked up.
    pub(super) fn step(
        &self,
        tables: &impl Tables,
        addr: u64,
        place: &Place,
        memory: &dyn Memory,
    ) -> Option<Result<Place, End>> {
        let linked = addr.wrapping_sub(tables.slide());
        let behind = self.descriptions.partition_point(|description| description.start <= linked);
        let found = self.descriptions.get(behind.checked_sub(1)?).filter(|found| linked < found.end)?;
        Some(match Section::of(tables, found.kind)? {
            Section::DebugFrame(section) => {
                step_by(&section, &BaseAddresses::default(), found.offset, linked, place, memory)
            }
            Section::EhFrame(section, bases) => step_by(&section, &bases, found.offset, linked, place, memory),
        })
    }
}

fn list<'a, S>(section: &S, bases: &BaseAddresses, kind: Kind, into: &mut Vec<Description>)
where
    S: UnwindSection<Bytes<'a>>,
    S::Offset: gimli::UnwindOffset<usize>,
{
    let mut entries = section.entries(bases);
    while let Ok(Some(entry)) = entries.next() {
        let CieOrFde::Fde(partial) = entry else { continue };
        let Ok(description) = partial.parse(S::cie_from_offset) else { continue };
        let (start, end) = (description.initial_address(), description.end_address());
        // Functions that the linker has dropped begin at 0.
        if start != 0 && start < end {
            into.push(Description { start, end, kind, offset: description.offset() });
        }
    }
}

fn step_by<'a, S>(
    section: &S,
    bases: &BaseAddresses,
    offset: usize,
    linked: u64,
    place: &Place,
    memory: &dyn Memory,
) -> Result<Place, End>
where
    S: UnwindSection<Bytes<'a>>,
    S::Offset: gimli::UnwindOffset<usize>,
{
    let broken = End::Lost("the call frame information is broken here");
    let description =
        section.fde_from_offset(bases, S::Offset::from(offset), S::cie_from_offset).map_err(|_| broken)?;
    let mut context = UnwindContext::new();
    let row = description.unwind_info_for_address(section, bases, &mut context, linked).map_err(|_| broken)?;
    let encoding = description.cie().encoding();
    let evaluate = |expression: &UnwindExpression<usize>, cfa: Option<u64>| {
        let expression = expression.get(section).ok()?;
        evaluate(expression, encoding, cfa, place, memory)
    };

    let cfa = match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => {
            place.value(register.0.into()).map(|base| base.wrapping_add_signed(*offset))
        }
        CfaRule::Expression(expression) => evaluate(expression, None),
    };
    let cfa = cfa.ok_or(End::Lost("a register that the next frame depends on is not known here"))?;
    let apply = |rule: RegisterRule<usize>, register: usize| match rule {
        RegisterRule::SameValue => place.value(register),
        RegisterRule::Offset(offset) => word(memory, cfa.wrapping_add_signed(offset)),
        RegisterRule::ValOffset(offset) => Some(cfa.wrapping_add_signed(offset)),
        RegisterRule::Register(other) => place.value(other.0.into()),
        RegisterRule::Expression(expression) => word(memory, evaluate(&expression, Some(cfa))?),
        RegisterRule::ValExpression(expression) => evaluate(&expression, Some(cfa)),
        RegisterRule::Constant(value) => Some(value),
        RegisterRule::Undefined | RegisterRule::Architectural => None,
    };

    let pc = match row.register(RETURN_ADDRESS) {
        // So the first function of a stack is marked.
        Some(RegisterRule::Undefined) => return Err(End::Complete),
        Some(rule) => apply(rule, RETURN_ADDRESS.0.into()).ok_or(End::Lost("the stack cannot be read"))?,
        None => return Err(broken),
    };
    if pc == 0 {
        // What a loader leaves above the first function.
        return Err(End::Complete);
    }
    let mut general: General = [None; COUNT];
    for (register, value) in general.iter_mut().enumerate() {
        *value = match row.register(gimli::Register(register as u16)) {
            Some(rule) => apply(rule, register),
            // By the psABI a function keeps these as they are.
            None if matches!(register, RBX | RBP | R12..=R15) => place.value(register),
            None => None,
        };
    }
    let sp = match row.register(gimli::Register(RSP as u16)) {
        Some(rule) => apply(rule, RSP).ok_or(End::Lost("the stack cannot be read"))?,
        None => cfa,
    };
    let is_interrupted = description.is_signal_trampoline();
    if sp <= place.sp && !is_interrupted {
        return Err(End::Lost("the stack pointer goes the wrong way"));
    }
    let kind = if is_interrupted { FrameKind::Exact } else { FrameKind::Call };
    Ok(Place { pc, sp, kind, general })
}

/// The value of an expression over the registers of `place`; `initial` is on its stack.
fn evaluate<'a, R: Reader<Offset = usize> + 'a>(
    expression: gimli::Expression<R>,
    encoding: gimli::Encoding,
    initial: Option<u64>,
    place: &Place,
    memory: &dyn Memory,
) -> Option<u64> {
    let mut evaluation = expression.evaluation(encoding);
    evaluation.set_max_iterations(MOST_OPERATIONS);
    if let Some(initial) = initial {
        evaluation.set_initial_value(initial);
    }
    let mut result = evaluation.evaluate().ok()?;
    loop {
        result = match result {
            EvaluationResult::Complete => break,
            EvaluationResult::RequiresRegister { register, .. } => {
                let value = place.value(register.0.into())?;
                evaluation.resume_with_register(Value::Generic(value)).ok()?
            }
            EvaluationResult::RequiresMemory { address, size, .. } => {
                let mut bytes = [0; 8];
                let wanted = bytes.get_mut(..size.into())?;
                if memory.read(address, wanted) < wanted.len() {
                    return None;
                }
                evaluation.resume_with_memory(Value::Generic(u64::from_le_bytes(bytes))).ok()?
            }
            _ => return None,
        };
    }
    match evaluation.value_result()? {
        Value::Generic(value) => Some(value),
        _ => None,
    }
}
