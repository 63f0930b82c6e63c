//! One law test: a name, what it needs of this host's KVM, and what it does.

use libtest_mimic::Trial;

use crate::lane::{Need, missing_everywhere};

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
        let trial = Trial::test(name, move || {
            run(of);
            Ok(())
        });
        match missing {
            Some(what) => trial.with_kind(what).with_ignored_flag(true),
            None => trial,
        }
    }
}

/// `law!(l01_name, [needs])` for a function of that name in scope.
macro_rules! law {
    ($name:ident $(, $need:expr)* $(,)?) => {
        $crate::law::Law::new(stringify!($name), &[$($need),*], |_| $name())
    };
}
pub(crate) use law;
