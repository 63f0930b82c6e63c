//! Names for what goes wrong in a kernel.

use std::fmt;

/// A kind of failure that the kernel itself detects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alias {
    /// The kernel gives up.
    Panic,
    /// A fault or BUG() in kernel mode.
    Oops,
    /// WARN() and its kin.
    Warn,
    /// KASAN found a bad access.
    Kasan,
    /// UBSAN found undefined behaviour.
    Ubsan,
    /// lockdep found a locking mistake.
    Lockdep,
    /// RCU found a CPU or task that stalls its grace periods.
    RcuStall,
    /// A task is blocked for too long.
    HungTask,
    /// A linked list is corrupt.
    ListCorruption,
    /// A function's stack canary is overwritten.
    StackProtector,
    /// A reference count overflowed or was used after free.
    Refcount,
}

impl Alias {
    /// Every alias.
    pub const ALL: [Alias; 11] = [
        Alias::Panic,
        Alias::Oops,
        Alias::Warn,
        Alias::Kasan,
        Alias::Ubsan,
        Alias::Lockdep,
        Alias::RcuStall,
        Alias::HungTask,
        Alias::ListCorruption,
        Alias::StackProtector,
        Alias::Refcount,
    ];

    /// As rules write it.
    pub fn word(self) -> &'static str {
        match self {
            Alias::Panic => "panic",
            Alias::Oops => "oops",
            Alias::Warn => "warn",
            Alias::Kasan => "kasan",
            Alias::Ubsan => "ubsan",
            Alias::Lockdep => "lockdep",
            Alias::RcuStall => "rcu-stall",
            Alias::HungTask => "hung-task",
            Alias::ListCorruption => "list-corruption",
            Alias::StackProtector => "stack-protector",
            Alias::Refcount => "refcount",
        }
    }

    pub(super) fn named(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|alias| alias.word() == word)
    }

    /// The exit code of a run that it ends: 4 for what kills a kernel, otherwise 3.
    pub fn exit_code(self) -> u8 {
        match self {
            Alias::Panic | Alias::Oops | Alias::StackProtector => 4,
            Alias::Warn
            | Alias::Kasan
            | Alias::Ubsan
            | Alias::Lockdep
            | Alias::RcuStall
            | Alias::HungTask
            | Alias::ListCorruption
            | Alias::Refcount => 3,
        }
    }

    /// What it means in a kernel, Linux 4.19 to 6.17. Each event is one that the others do not lead to.
    pub fn events(self) -> &'static [Event] {
        match self {
            // kernel/panic.c: panic() has become a shell around vpanic() in 6.16; nmi_panic() ends in either.
            Alias::Panic => const { &[of("a panic", &["vpanic", "panic"])] },
            // arch/x86/kernel/dumpstack.c: die(), die_addr() and page_fault_oops() all begin with it.
            Alias::Oops => const { &[of("an oops", &["oops_begin"])] },
            // kernel/panic.c: report_bug() and warn_slowpath_fmt() come to it once for each warning.
            Alias::Warn => const { &[of("a warning", &["__warn"])] },
            // mm/kasan/report.c: called for bad accesses only.
            Alias::Kasan => {
                const {
                    &[
                        of("a bad access", &["kasan_report"]),
                        of("a bad free", &["kasan_report_invalid_free"]),
                        of("a bad access found late", &["kasan_report_async"]),
                    ]
                }
            }
            // lib/ubsan.c: every report ends with it, unless it is inlined into all of them.
            Alias::Ubsan => UBSAN,
            // kernel/locking/lockdep.c, and lockdep_rcu_suspicious() for RCU; what is inlined is not among a kernel's symbols.
            Alias::Lockdep => {
                const {
                    &[
                        of("a circular dependency", &["print_circular_bug"]),
                        of("an interrupt dependency", &["print_bad_irq_dependency"]),
                        of("an interrupt inversion", &["print_irq_inversion_bug"]),
                        of("an inconsistent state", &["print_usage_bug"]),
                        of("a recursive lock", &["print_deadlock_bug"]),
                        of("an unlock too many", &["print_unlock_imbalance_bug"]),
                        of("a lock freed while held", &["print_freed_lock_bug"]),
                        of("a lock held at exit", &["print_held_locks_bug"]),
                        of("a wrong wait context", &["print_lock_invalid_wait_context"]),
                        of("a suspicious use of RCU", &["lockdep_rcu_suspicious"]),
                    ]
                }
            }
            // kernel/rcu/tree_stall.h; where both are inlined, what prints each stalled CPU.
            Alias::RcuStall => {
                const {
                    &[
                        of("a stalled CPU", &["print_other_cpu_stall", "print_cpu_stall_info"]),
                        of("a CPU's own stall", &["print_cpu_stall", "print_cpu_stall_info"]),
                    ]
                }
            }
            // kernel/hung_task.c has no function that a hung task alone comes to.
            Alias::HungTask => {
                const { &[says("a hung task", r"INFO: task .{1,64}:\d+ blocked (in I/O wait )?for more than \d+ seconds")] }
            }
            // lib/list_debug.c: with CONFIG_DEBUG_LIST its functions see every list, not only corrupt ones.
            Alias::ListCorruption => const { &[says("a corrupt list", r"\blist_(add|del) (corruption|double add)")] },
            Alias::StackProtector => const { &[of("an overwritten stack canary", &["__stack_chk_fail"])] },
            // lib/refcount.c, since 5.6.
            Alias::Refcount => const { &[of("a saturated reference count", &["refcount_warn_saturate"])] },
        }
    }

    /// The option without which a kernel has nothing of it, if there is one.
    pub fn option(self) -> Option<&'static str> {
        match self {
            Alias::Kasan => Some("CONFIG_KASAN"),
            Alias::Ubsan => Some("CONFIG_UBSAN"),
            Alias::Lockdep => Some("CONFIG_PROVE_LOCKING"),
            Alias::StackProtector => Some("CONFIG_STACKPROTECTOR"),
            Alias::Warn | Alias::Oops => Some("CONFIG_BUG"),
            Alias::Panic | Alias::RcuStall | Alias::HungTask | Alias::ListCorruption | Alias::Refcount => None,
        }
    }
}

/// Something that a kernel does when it has found a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// In words.
    pub what: &'static str,
    /// How it is seen.
    pub seen: Seen,
}

/// How an event is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// The first of these functions that the kernel has is about to run.
    Function(&'static [&'static str]),
    /// A line of the console matches.
    Console(&'static str),
}

const fn of(what: &'static str, names: &'static [&'static str]) -> Event {
    Event { what, seen: Seen::Function(names) }
}

const fn says(what: &'static str, regex: &'static str) -> Event {
    Event { what, seen: Seen::Console(regex) }
}

/// The handlers are the compiler's names (clang's UndefinedBehaviorSanitizer, which GCC shares).
const UBSAN: &[Event] = &[
    of("an overflow in an addition", &["ubsan_epilogue", "__ubsan_handle_add_overflow"]),
    of("an overflow in a subtraction", &["ubsan_epilogue", "__ubsan_handle_sub_overflow"]),
    of("an overflow in a multiplication", &["ubsan_epilogue", "__ubsan_handle_mul_overflow"]),
    of("an overflow in a negation", &["ubsan_epilogue", "__ubsan_handle_negate_overflow"]),
    of("a division", &["ubsan_epilogue", "__ubsan_handle_divrem_overflow"]),
    of("a type mismatch", &["ubsan_epilogue", "__ubsan_handle_type_mismatch_v1", "__ubsan_handle_type_mismatch"]),
    of("an index out of bounds", &["ubsan_epilogue", "__ubsan_handle_out_of_bounds"]),
    of("a shift out of bounds", &["ubsan_epilogue", "__ubsan_handle_shift_out_of_bounds"]),
    of("unreachable code", &["ubsan_epilogue", "__ubsan_handle_builtin_unreachable"]),
    of("an invalid value", &["ubsan_epilogue", "__ubsan_handle_load_invalid_value"]),
    of("an alignment", &["ubsan_epilogue", "__ubsan_handle_alignment_assumption"]),
];

impl fmt::Display for Alias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}
