//! What is said about a run, and in which forms.
//!
//! All of them are made from one [`Report`]: `report.json` is the report itself, the others are views of it.

mod annotations;
mod events;
mod json;
mod junit;
mod model;
mod page;
mod progress;
mod summary;
mod words;

pub use annotations::SourcePaths;
pub use events::{Event, Events};
pub use json::ReadError;
pub use model::*;
pub use progress::{Progress, State as ProgressState};
pub use summary::Style;

#[cfg(test)]
mod tests;
