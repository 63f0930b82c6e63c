//! What the libraries have to say, on stderr.

use std::fmt;

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The variable that asks for more: a level, or `TARGET=LEVEL,...`.
const VARIABLE: &str = "TRAPLINE_LOG";

/// Warnings come by default: gdb has no place for some of what it must be told, such as why a
/// watchpoint cannot be set.
pub(crate) fn to_stderr() {
    let filter =
        EnvFilter::builder().with_env_var(VARIABLE).with_default_directive(LevelFilter::WARN.into()).from_env_lossy();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).event_format(Line).init();
}

/// Warnings look like the other lines that a user sees; what was asked for says where it is from.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        match *metadata.level() {
            Level::ERROR | Level::WARN => write!(out, "trapline: ")?,
            level => write!(out, "trapline: {level} {}: ", metadata.target())?,
        }
        context.field_format().format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}
