//! What is said about a run, and in which forms.
//!
//! All of them are made from one [`Report`]: `report.json` is the report itself, the others are views of it.

mod json;
mod junit;
mod model;
mod words;

pub use json::ReadError;
pub use model::*;

#[cfg(test)]
mod tests;
