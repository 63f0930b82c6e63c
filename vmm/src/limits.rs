//! Every limit of the machine in one place, with its unit.

use std::time::Duration;

/// How long a vCPU thread may take to answer before the operation fails and names it.
pub const ACK_DEADLINE: Duration = Duration::from_secs(10);

/// How long to wait for an answer before the vCPU is kicked again.
pub const KICK_INTERVAL: Duration = Duration::from_millis(2);
