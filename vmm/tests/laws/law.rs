//! One law test: a name, what it needs of this host's KVM, and what it does.

use std::any::Any;
use std::panic;

use libtest_mimic::Trial;

use crate::lane::{Need, lane, missing_everywhere};

#[derive(Clone)]
pub(crate) struct Law {
    name: String,
    needs: Vec<Need>,
    run: fn(&str),
    of: &'static str,
}

impl Law {
    pub(crate) fn new(name: &str, needs: &[Need], run: fn(&str)) -> Self {
        Law { name: name.to_owned(), needs: needs.to_vec(), run, of: "" }
    }

    /// One of several laws of the same form: `run` is given `of`, which ends the name.
    pub(crate) fn of(name: &str, of: &'static str, needs: &[Need], run: fn(&str)) -> Self {
        Law { name: format!("{name}{of}"), needs: needs.to_vec(), run, of }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Ignored, with the reason as its kind, if something is missing.
    pub(crate) fn trial(self) -> Trial {
        let Law { name, needs, run, of } = self;
        let missing = missing_everywhere().or_else(|| needs.iter().find_map(|need| need.missing()));
        let trial = Trial::test(name.clone(), move || {
            match panic::catch_unwind(|| run(of)) {
                // Not the law has failed but the processor under it, and that is told.
                Err(why) if lane() == "svm" && is_a_lost_guest(&*why) => {
                    println!("{name}: the emulated processor has lost its guest; once more");
                    run(of);
                }
                Err(why) => panic::resume_unwind(why),
                Ok(()) => {}
            }
            Ok(())
        });
        match missing {
            Some(what) => trial.with_kind(what).with_ignored_flag(true),
            None => trial,
        }
    }
}

/// Whether a test was stopped by a triple fault that its guest has not made: the processor that the svm lane emulates
/// does that now and then (tests/lanes/README.md).
fn is_a_lost_guest(why: &(dyn Any + Send)) -> bool {
    let words = why.downcast_ref::<String>().map(String::as_str).or(why.downcast_ref::<&str>().copied());
    words.is_some_and(|words| words.contains("TripleFault { state_lost: true }"))
}

/// `law!(l01_name, [needs])` for a function of that name in scope.
macro_rules! law {
    ($name:ident $(, $need:expr)* $(,)?) => {
        $crate::law::Law::new(stringify!($name), &[$($need),*], |_| $name())
    };
}
pub(crate) use law;
