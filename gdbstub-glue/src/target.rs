//! What the owner of the event loop holds: the debuggee, as the server wants it.

use std::ops::{Deref, DerefMut};

use crate::adapter::Adapter;
use crate::debuggee::Debuggee;

/// The debuggee, with what a gdb session remembers about it.
///
/// It derefs to the debuggee: its owner uses the debuggee through it as if the stub were not
/// there, with a debugger attached or without.
pub struct Target<D>(pub(crate) Adapter<D>);

impl<D: Debuggee> Target<D> {
    /// Wraps a debuggee.
    pub fn new(debuggee: D) -> Self {
        Self(Adapter::new(debuggee))
    }

    /// Unwraps it. A session that goes on with another `Target` begins with what that one knows,
    /// so [`disconnect`](crate::Server::disconnect) first.
    pub fn into_inner(self) -> D {
        self.0.into_inner()
    }
}

impl<D> Deref for Target<D> {
    type Target = D;

    fn deref(&self) -> &D {
        &self.0
    }
}

impl<D> DerefMut for Target<D> {
    fn deref_mut(&mut self) -> &mut D {
        &mut self.0
    }
}
