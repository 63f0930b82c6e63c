//! The stub over a machine made of plain memory: four vCPUs that run round a loop.
//!
//! `cargo run -p trapline-gdbstub-glue --example fake_guest -- [ADDR] [VCPUS]`

#[path = "../tests/support/mod.rs"]
mod support;

use support::event_loop::serve;
use support::fake::Fake;
use trapline_gdbstub_glue::{Address, Server, Target};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let mut arguments = std::env::args().skip(1);
    let address: Address = arguments.next().as_deref().unwrap_or(":0").parse()?;
    let vcpus = arguments.next().as_deref().unwrap_or("4").parse()?;
    let mut server = Server::listen(&address, false)?;
    let mut target = Target::new(Fake::new(vcpus));
    println!("{}", server.listening());
    let outcome = serve(&mut server, &mut target, |_, _| false)?;
    println!("{outcome:?}");
    Ok(())
}
