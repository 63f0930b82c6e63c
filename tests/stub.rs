//! The stub over a real VM: what other stubs lose, and what hostile clients try.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod common;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use common::{Client, Stub, symbol, wait_until};
use trapline_guests::demo;
use trapline_vmm::debug::VcpuId;

fn z(client: &mut Client, insert: bool, addr: u64) -> String {
    client.ask(&format!("{}1,{addr:x},1", if insert { 'Z' } else { 'z' }))
}

/// Continues until both vCPUs of the guest are up and counting.
fn until_both_run(client: &mut Client) {
    let publish = symbol("publish");
    let mut seen = [false; 2];
    assert_eq!(z(client, true, publish), "OK");
    for _ in 0..200 {
        let stop = client.ask("vCont;c");
        seen[Client::thread_of(&stop) as usize] = true;
        if seen == [true; 2] {
            break;
        }
    }
    assert_eq!(seen, [true; 2], "both vCPUs publish");
    assert_eq!(z(client, false, publish), "OK");
}

#[test]
fn two_vcpus_that_stop_in_one_window_are_both_told() {
    let stub = Stub::start(2, None);
    let mut client = Client::attach(&stub);
    until_both_run(&mut client);
    let here = symbol("count_up_here");
    assert_eq!(z(&mut client, true, here), "OK");
    let (mut hits, mut in_one_window) = ([0u64; 2], 0);
    let counts = |client: &mut Client| [0, 1].map(|cpu| client.read_u64(demo::count_address(cpu).unwrap()));
    let start = counts(&mut client);
    let mut before = start;
    for _ in 0..60 {
        let stop = client.ask("vCont;c");
        assert!(stop.starts_with("T05") && stop.contains("hwbreak"), "{stop}");
        let vcpu = Client::thread_of(&stop) as usize;
        hits[vcpu] += 1;
        let now = counts(&mut client);
        // Nothing ran between two reports of one window.
        in_one_window += u32::from(now == before);
        before = now;
        for n in 0..2 {
            // A vCPU that was told stands before its count; one that was not has counted it all.
            let done = now[n] - start[n];
            assert!(done == hits[n] || done + 1 == hits[n], "vCPU {n}: counted {done}, told {}", hits[n]);
        }
    }
    assert!(hits.iter().all(|&n| n > 0), "{hits:?}");
    assert!(in_one_window > 0, "the two never stopped in one window, so nothing was shown: {hits:?}");
    assert_eq!(client.ask("D;1"), "OK");
}

#[test]
fn a_step_that_another_vcpu_interrupts_is_not_left_behind() {
    let stub = Stub::start(2, None);
    let mut client = Client::attach(&stub);
    until_both_run(&mut client);
    let here = symbol("count_up_here");
    assert_eq!(z(&mut client, true, here), "OK");
    let mut interrupted = 0;
    for _ in 0..60 {
        // vCPU 1 stands or runs anywhere; vCPU 2 hits the breakpoint soon.
        let stop = client.ask("vCont;s:p1.1;c:p1.2");
        interrupted += u32::from(Client::thread_of(&stop) == 1);
        // From now on only breakpoints: a step-done here would be the old step.
        for _ in 0..2 {
            let stop = client.ask("vCont;c");
            assert!(stop.contains("hwbreak"), "a step was left behind: {stop}");
        }
    }
    assert!(interrupted > 0, "vCPU 2 never stopped first, so nothing was shown");
    assert_eq!(z(&mut client, false, here), "OK");
    // And nothing of all that reached the guest.
    assert_eq!(client.read_u64(symbol("debug_exceptions_seen")), 0);
    assert_eq!(client.read_u64(symbol("breakpoint_exceptions_seen")), 0);
    assert_eq!(client.ask("D;1"), "OK");
}

#[test]
fn scheduler_locking_runs_one_vcpu_only() {
    let stub = Stub::start(2, None);
    let mut client = Client::attach(&stub);
    until_both_run(&mut client);
    let other = demo::count_address(1).unwrap();
    let before = client.read_u64(other);
    let here = symbol("count_up_here");
    assert_eq!(z(&mut client, true, here), "OK");
    for _ in 0..20 {
        let stop = client.ask("vCont;c:p1.1");
        assert_eq!(Client::thread_of(&stop), 0, "{stop}");
    }
    assert_eq!(client.read_u64(other), before, "vCPU 2 ran");
    assert_eq!(client.ask("D;1"), "OK");
}

#[test]
fn one_vcpus_failing_ioctl_leaves_all_with_the_old_set_and_gdb_with_an_error() {
    let failing = Arc::new(AtomicI64::new(-1));
    let which = failing.clone();
    let hook = Arc::new(move |vcpu: VcpuId| {
        // Once: what puts the old set back must go through.
        let fails = which.compare_exchange(i64::from(vcpu.0), -1, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if fails { Err(io::Error::from_raw_os_error(libc::EBUSY)) } else { Ok(()) }
    });
    let stub = Stub::start(4, Some(hook));
    let mut client = Client::attach(&stub);
    let (old, refused) = (symbol("publish"), symbol("count_up_here"));
    assert_eq!(z(&mut client, true, old), "OK");
    for vcpu in [0, 2, 3] {
        failing.store(vcpu, Ordering::SeqCst);
        let error = z(&mut client, true, refused);
        assert!(error.starts_with('E'), "{error}");
        assert!(error.contains(&format!("vCPU {vcpu}")), "the error names the vCPU: {error}");
    }
    // A removal is carried out when the guest is to go on: it does not, and gdb hears why.
    assert_eq!(z(&mut client, false, old), "OK");
    failing.store(1, Ordering::SeqCst);
    let error = client.ask("vCont;c");
    assert!(error.starts_with('E') && error.contains("vCPU 1"), "{error}");
    assert_eq!(z(&mut client, true, old), "OK");
    failing.store(-1, Ordering::SeqCst);
    let mut seen = [false; 4];
    for _ in 0..400 {
        let stop = client.ask("vCont;c");
        let vcpu = Client::thread_of(&stop);
        let pc = client.ask(&format!("Hgp1.{:x}", vcpu + 1));
        assert_eq!(pc, "OK");
        let rip = client.ask("p10");
        let expected: String = old.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(rip, expected, "stopped for something else than the old set");
        seen[vcpu as usize] = true;
        if seen == [true; 4] {
            break;
        }
    }
    assert_eq!(seen, [true; 4], "every vCPU still has the old set");
    assert_eq!(client.ask("D;1"), "OK");
}

#[test]
fn a_fifth_breakpoint_is_an_int3_that_nobody_sees_or_is_refused_in_words() {
    let stub = Stub::start(2, None);
    let mut client = Client::attach(&stub);
    // Four that are seldom or never met take the slots.
    let four = ["guest_main", "count_up_traced", "publish", "tick"].map(symbol);
    for addr in four {
        assert_eq!(z(&mut client, true, addr), "OK");
    }
    let place = symbol("count_up_here");
    let code = client.ask(&format!("m{place:x},10"));
    let fifth = client.ask(&format!("Z0,{place:x},1"));
    if trapline_vmm::probe::capabilities().unwrap().can_patch() {
        assert_eq!(fifth, "OK");
        assert_eq!(client.ask(&format!("m{place:x},10")), code, "gdb sees the patch");
        let count = demo::count_address(0).unwrap();
        let before = client.read_u64(count);
        let mut told = 0;
        while told < 20 {
            let stop = client.ask("vCont;c");
            told += u64::from(stop.contains("swbreak") && Client::thread_of(&stop) == 0);
        }
        let counted = client.read_u64(count) - before;
        assert!(counted == told || counted + 1 == told, "{told} stops, {counted} counts");
    } else {
        assert!(fifth.starts_with("E.") && fifth.contains("delete a breakpoint"), "{fifth}");
        let stop = client.ask("vCont;c");
        assert!(stop.contains("hwbreak"), "{stop}");
    }
    assert_eq!(client.ask("D;1"), "OK");
    let mut client = Client::attach(&stub);
    assert_eq!(client.ask(&format!("m{place:x},10")), code);
    assert_eq!(client.read_u64(symbol("breakpoint_exceptions_seen")), 0);
    assert_eq!(client.ask("D;1"), "OK");
}

#[test]
fn a_client_that_vanishes_leaves_a_running_guest() {
    let stub = Stub::start(2, None);
    let count = demo::count_address(0).unwrap();
    for running in [false, true, false, true] {
        let mut client = Client::attach(&stub);
        assert_eq!(z(&mut client, true, symbol("count_up_here")), "OK");
        if running {
            client.send("vCont;c");
        }
        drop(client);
        // The next one finds a guest that has gone on, with nothing armed.
        let mut client = Client::attach(&stub);
        let before = client.read_u64(count);
        assert_eq!(client.ask("D;1"), "OK");
        wait_until("the guest counts on", || {
            let mut client = Client::attach(&stub);
            let now = client.read_u64(count);
            assert_eq!(client.ask("D;1"), "OK");
            now > before + 100
        });
        let mut client = Client::attach(&stub);
        assert_eq!(client.read_u64(symbol("debug_exceptions_seen")), 0);
        assert_eq!(client.ask("D;1"), "OK");
    }
}

#[test]
fn garbage_and_half_packets_harm_nobody() {
    let stub = Stub::start(2, None);
    let noise: Vec<u8> = (0..20_000u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..],
        b"$",
        b"$m0,",
        b"$m0,8#",
        b"$m0,8#zz",
        b"\x03\x03\x03",
        &noise,
    ] {
        let mut client = Client::connect(&stub);
        client.raw(garbage);
        drop(client);
        // In the middle of a session, too.
        let mut client = Client::attach(&stub);
        client.raw(garbage);
        drop(client);
    }
    let mut client = Client::attach(&stub);
    assert_eq!(client.ask("m0,zz").chars().next(), Some('E'));
    assert_eq!(client.ask("Z1,zz,1").chars().next(), Some('E'));
    assert_eq!(client.ask("vCont;x").chars().next(), Some('E'));
    assert_eq!(z(&mut client, true, symbol("count_up_here")), "OK");
    let stop = client.ask("vCont;c");
    assert!(stop.contains("hwbreak"), "{stop}");
    assert_eq!(client.ask("D;1"), "OK");
}

#[test]
fn a_second_client_is_turned_away_and_the_first_stays() {
    let stub = Stub::start(2, None);
    let mut first = Client::attach(&stub);
    let mut second = Client::connect(&stub);
    second.send("qSupported");
    let refusal = second.receive();
    assert!(refusal.contains("another debugger"), "{refusal}");
    assert_eq!(z(&mut first, true, symbol("count_up_here")), "OK");
    assert!(first.ask("vCont;c").contains("hwbreak"));
    assert_eq!(first.ask("D;1"), "OK");
}

#[test]
fn ctrl_c_stops_a_running_guest() {
    let stub = Stub::start(4, None);
    let mut client = Client::attach(&stub);
    for _ in 0..50 {
        client.send("vCont;c");
        client.raw(b"\x03");
        let stop = client.receive();
        assert!(stop.starts_with("T02"), "{stop}");
    }
    assert_eq!(client.ask("D;1"), "OK");
}

#[test]
fn kill_ends_the_guest() {
    let stub = Stub::start(2, None);
    let mut client = Client::attach(&stub);
    assert_eq!(client.ask("vKill;1"), "OK");
}
