//! What is said about a run, and in which forms.

mod model;

pub use model::*;
