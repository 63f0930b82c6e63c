//! report.json: the model as it is.

use std::io::{self, Write};

use super::Report;

impl Report {
    /// Writes report.json. `docs/report-schema.json` describes it.
    pub fn write_json(&self, out: &mut dyn Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *out, self)?;
        out.write_all(b"\n")
    }

    /// Reads a report.json. A schema that is newer than this program is refused.
    pub fn read_json(text: &str) -> Result<Self, ReadError> {
        #[derive(serde::Deserialize)]
        struct Version {
            schema: u32,
        }
        let Version { schema } = serde_json::from_str(text)?;
        if schema > super::SCHEMA {
            return Err(ReadError::Newer { schema });
        }
        Ok(serde_json::from_str(text)?)
    }
}

/// A report.json could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It is none.
    #[error("this is no report of trapline's: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A newer Trapline has written it.
    #[error("this report has schema {schema}, and this trapline knows those up to {}: use a newer one", super::SCHEMA)]
    Newer {
        /// The report's.
        schema: u32,
    },
}
