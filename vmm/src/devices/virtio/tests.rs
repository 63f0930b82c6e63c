//! A driver against the devices: what the specification promises, and what no guest may bring about.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO};

use super::driver::*;
use super::*;
use crate::devices::bus::Device as _;
use crate::limits::MIB;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPPORTED: u8 = 2;

#[test]
fn the_registers_say_what_it_is() {
    let (file, _) = image(9);
    let mut driver = Driver::new(disk(&file, false));
    let words = [0x00, 0x04, 0x08, 0x34, 0x44, 0x60, 0x70, 0xfc].map(|register| driver.get(register));
    assert_eq!(words, [0x7472_6976, 2, 2, 256, 0, 0, 0, 0]);
    assert_eq!([driver.get(0x100), driver.get(0x104)], [9, 0], "capacity");
    assert_eq!(driver.get(0x10c), 254, "seg_max");
    assert_eq!([driver.get(0x110), driver.get(0xffc)], [0, 0], "no more configuration");
    assert_eq!([driver.get(0xb0), driver.get(0xb4)], [u32::MAX; 2], "no shared memory");
    driver.set(0x30, 1);
    assert_eq!([driver.get(0x34), driver.get(0x44)], [0, 0], "there is no second queue");
    driver.set(0x14, 2);
    assert_eq!(driver.get(0x10), 0, "no features beyond 64");
    let mut byte = [0xff];
    driver.registers().read(0x101, &mut byte);
    assert_eq!(byte, [0], "the configuration can be read in bytes");
    driver.registers().read(0x01, &mut byte);
    assert_eq!(byte, [0], "the registers cannot");
}

#[test]
fn features_are_taken_only_if_they_were_offered_and_with_version_1() {
    let (file, _) = image(1);
    let mut driver = Driver::new(disk(&file, true));
    let offered = driver.features();
    assert_eq!(offered >> VIRTIO_BLK_F_RO & 1, 1);
    for (features, status) in [(0, 3), (1 << 32, 11), (1 << 32 | 1 << 63, 3), (offered, 11), (offered & !(1 << 32), 3)]
    {
        driver.negotiate(features);
        assert_eq!(driver.get(0x70), status, "{features:#x}");
        driver.set(0x70, ALL_OK);
        assert_eq!(driver.get(0x70), if status == 11 { 15 } else { 3 }, "no DRIVER_OK without FEATURES_OK");
    }
    // Too late.
    driver.negotiate(1 << 32);
    driver.set(0x20, u32::MAX);
    driver.set(0x70, ALL_OK);
    assert_eq!(driver.devices.save()[0].1.driver_features, 1 << 32);
}

#[test]
fn a_disk_is_read_in_any_pieces() {
    let (file, content) = image(1000);
    let mut driver = Driver::started(disk(&file, false));
    // More than goes at once, in pieces that are no sectors, one of them empty.
    let pieces = [(DATA + 1, 511), (DATA + 0x1000, 0), (DATA + 0x2000, 513), (DATA + 0x3000, 299 * 512)];
    let len = 301 * 512;
    assert_eq!(driver.request(IN, 600, &pieces, true), (OK, len + 1));
    let got: Vec<u8> = pieces.iter().flat_map(|&(gpa, len)| driver.bytes(gpa, len as usize)).collect();
    assert!(got == content[600 * 512..901 * 512]);
    assert_eq!((driver.edges(), driver.get(0x60)), (1, 1));
    driver.set(0x64, 1);
    assert_eq!(driver.get(0x60), 0);
}

#[test]
fn what_is_written_is_in_the_file_when_it_is_answered() {
    let (file, mut expected) = image(700);
    let mut driver = Driver::started(disk(&file, false));
    let data: Vec<u8> = (0..400 * 512u32).map(|n| (n % 241) as u8).collect();
    driver.put(DATA, &data);
    let pieces = [(DATA, 100), (DATA + 100, 400 * 512 - 100)];
    assert_eq!(driver.request(OUT, 300, &pieces, false), (OK, 1));
    expected[300 * 512..].copy_from_slice(&data);
    assert!(super::driver::content(&file) == expected);
    assert_eq!(driver.request(FLUSH, 0, &[], false), (OK, 1));
}

#[test]
fn requests_beyond_the_disk_change_nothing() {
    let (file, before) = image(8);
    let mut driver = Driver::started(disk(&file, false));
    driver.put(DATA, &[0x55; 4096]);
    for (sector, len) in [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512 + 1, 512), (0, 511), (0, 4096 + 512)] {
        for (kind, to_guest) in [(IN, true), (OUT, false)] {
            let (status, written) = driver.request(kind, sector, &[(DATA, len)], to_guest);
            assert_eq!((status, written), (IOERR, u32::from(!to_guest)), "{kind} {sector} {len}");
        }
    }
    assert!(driver.bytes(DATA, 4096) == [0x55; 4096]);
    assert!(super::driver::content(&file) == before);
    assert_eq!(driver.request(IN, 7, &[(DATA, 512)], true), (OK, 513), "the last sector is there");
    assert_eq!(driver.request(IN, 8, &[], true), (OK, 1), "nothing, at the end");
}

#[test]
fn a_read_only_disk_refuses_writes_and_says_so_before() {
    let (file, before) = image(8);
    std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o444)).unwrap();
    let mut driver = Driver::started(disk(&file, true));
    assert_eq!(driver.request(OUT, 0, &[(DATA, 512)], false), (IOERR, 1));
    assert_eq!(driver.request(IN, 0, &[(DATA, 512)], true), (OK, 513));
    assert!(super::driver::content(&file) == before);
    assert_eq!(driver.get(0x70), ALL_OK, "that is no reason for a reset");
}

#[test]
fn other_requests() {
    let file = tempfile::Builder::new().prefix("a disk whose name is rather long").tempfile().unwrap();
    file.as_file().set_len(512).unwrap();
    let mut driver = Driver::started(disk(&file, false));
    assert_eq!(driver.request(GET_ID, 0, &[(DATA, 20)], true), (OK, 21));
    assert_eq!(driver.bytes(DATA, 20), b"adiskwhosenameisrath");
    assert_eq!(driver.request(GET_ID, 0, &[(DATA, 19)], true), (UNSUPPORTED, 0), "too little room");
    for kind in [2, 3, 5, 11, 13, 99, u32::MAX] {
        assert_eq!(driver.request(kind, 0, &[(DATA, 16)], false), (UNSUPPORTED, 1), "{kind}");
    }
}

#[test]
fn a_shrunken_image_is_an_error_of_the_disk_and_no_more() {
    let (file, _) = image(8);
    let mut driver = Driver::started(disk(&file, false));
    file.as_file().set_len(512).unwrap();
    assert_eq!(driver.request(IN, 0, &[(DATA, 1024)], true), (IOERR, 0));
    assert_eq!(driver.request(IN, 0, &[(DATA, 512)], true), (OK, 513));
}

#[test]
fn indirect_descriptors() {
    let (file, content) = image(8);
    let mut driver = Driver::started(disk(&file, false));
    let table = DATA + 0x8000;
    driver.put(HEADER, &[&IN.to_le_bytes()[..], &[0; 4], &3u64.to_le_bytes()].concat());
    driver.chain(table, &[(HEADER, 16, false), (DATA, 1024, true), (STATUS, 1, true)]);
    driver.describe(DESCRIPTORS, 5, table, 48, INDIRECT, 0);
    driver.offer(5);
    assert_eq!(driver.answer(), (5, 1025));
    assert!(driver.bytes(DATA, 1024) == content[3 * 512..5 * 512]);
}

#[test]
fn the_rings_go_round() {
    let (file, content) = image(8);
    let mut driver = Driver::started(disk(&file, false));
    for n in 0..70_000u32 {
        let sector = n % 8;
        assert_eq!(driver.request(IN, sector.into(), &[(DATA, 512)], true), (OK, 513));
        if n % 1000 == 0 {
            assert!(driver.bytes(DATA, 512) == content[sector as usize * 512..][..512]);
        }
    }
}

#[test]
fn a_driver_that_polls_gets_no_interrupts() {
    let (file, _) = image(8);
    let mut driver = Driver::started(disk(&file, false));
    driver.put(AVAILABLE, &1u16.to_le_bytes());
    assert_eq!(driver.request(IN, 0, &[(DATA, 512)], true), (OK, 513));
    // The answer is there before the interrupt would be: what is next to be done comes after it.
    driver.put(AVAILABLE, &0u16.to_le_bytes());
    assert_eq!(driver.request(IN, 0, &[(DATA, 512)], true), (OK, 513));
    driver.wait_for("an interrupt", |driver| driver.get(0x60) == 1);
    driver.devices.bus().hold(true);
    assert_eq!(driver.edges(), 1);
}

#[test]
fn random_bytes_are_random_and_bounded() {
    let mut driver = Driver::started(Entropy);
    let get = |driver: &mut Driver, len: u32| {
        driver.chain(DESCRIPTORS, &[(DATA, len, true)]);
        driver.offer(0);
        let (_, written) = driver.answer();
        driver.bytes(DATA, written as usize)
    };
    let (one, two) = (get(&mut driver, 64), get(&mut driver, 64));
    assert_eq!((one.len(), two.len()), (64, 64));
    assert_ne!(one, two);
    assert_eq!(get(&mut driver, 1 << 20).len(), 4096);
    driver.describe(DESCRIPTORS, 0, DATA, 16, 0, 0);
    driver.offer(0);
    assert_eq!(driver.answer(), (0, 0), "nothing to write to");
}

#[test]
fn nothing_is_served_before_driver_ok_and_what_is_there_then_is() {
    let (file, _) = image(8);
    let mut driver = Driver::new(disk(&file, false));
    driver.negotiate(1 << 32);
    driver.set_queue(16, DESCRIPTORS, AVAILABLE, USED);
    driver.begin(IN, 0, &[(DATA, 512)], true);
    // The worker has looked by the time that it answers the second device of this test.
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(driver.answers(), 0);
    driver.set(0x70, ALL_OK);
    assert_eq!(driver.answer(), (0, 513));
}

/// Each of these costs the device until it is reset, and then it works.
#[test]
fn who_breaks_the_rules_needs_a_reset() {
    type Crime = (&'static str, fn(&mut Driver));
    let crimes: [Crime; 16] = [
        ("a loop", |driver| {
            driver.describe(DESCRIPTORS, 0, HEADER, 16, NEXT, 1);
            driver.describe(DESCRIPTORS, 1, DATA, 16, NEXT, 0);
            driver.offer(0);
        }),
        ("a descriptor beyond the table", |driver| {
            driver.describe(DESCRIPTORS, 0, HEADER, 16, NEXT, 16);
            driver.offer(0);
        }),
        ("a head beyond the table", |driver| driver.offer(16)),
        ("not RAM", |driver| driver.chain_and_offer(&[(HEADER, 16, false), (0xd000_0000, 512, true)])),
        ("across the end of RAM", |driver| driver.chain_and_offer(&[(HEADER, 16, false), (4 * MIB - 1, 2, true)])),
        ("around the end of all", |driver| driver.chain_and_offer(&[(HEADER, 16, false), (u64::MAX - 1, 16, true)])),
        ("readable after writable", |driver| driver.chain_and_offer(&[(STATUS, 1, true), (HEADER, 16, false)])),
        ("no status", |driver| driver.chain_and_offer(&[(HEADER, 16, false)])),
        ("half a header", |driver| driver.chain_and_offer(&[(HEADER, 15, false), (STATUS, 1, true)])),
        ("too many at once", |driver| {
            driver.put(AVAILABLE + 2, &17u16.to_le_bytes());
            driver.set(0x50, 0);
        }),
        ("more than 4 GiB", |driver| {
            for n in 0..16 {
                driver.describe(DESCRIPTORS, n, 0, 0x3f_ffff, NEXT | WRITE, (n + 1) % 16);
            }
            driver.offer(0);
        }),
        ("indirect in indirect", |driver| {
            driver.describe(DESCRIPTORS, 0, DATA, 16, INDIRECT, 0);
            driver.describe(DATA, 0, DATA, 16, INDIRECT, 0);
            driver.offer(0);
        }),
        ("an indirect table that is none", |driver| {
            driver.describe(DESCRIPTORS, 0, DATA, 17, INDIRECT, 0);
            driver.offer(0);
        }),
        ("an empty indirect table", |driver| {
            driver.describe(DESCRIPTORS, 0, DATA, 0, INDIRECT, 0);
            driver.offer(0);
        }),
        ("an indirect table longer than the queue", |driver| {
            // A request that would be served if it were shorter.
            driver.put(HEADER, &[0; 16]);
            let header = (0..16).map(|n| (HEADER + n, 1, false));
            driver.chain(DATA, &header.chain([(STATUS, 1, true)]).collect::<Vec<_>>());
            driver.describe(DESCRIPTORS, 0, DATA, 17 * 16, INDIRECT, 0);
            driver.offer(0);
        }),
        ("an indirect table that is not RAM", |driver| {
            driver.describe(DESCRIPTORS, 0, 0xd000_0000, 48, INDIRECT, 0);
            driver.offer(0);
        }),
    ];
    let (file, before) = image(8);
    let mut driver = Driver::new(disk(&file, false));
    for (what, commit) in crimes {
        driver.start();
        driver.edges();
        commit(&mut driver);
        driver.wait_for(what, |driver| driver.get(0x70) & NEEDS_RESET != 0);
        driver.wait_for("a configuration interrupt", |driver| driver.get(0x60) & 2 != 0);
        assert_eq!(driver.answers(), 0, "{what}");
        // It does not listen any more.
        driver.set(0x50, 0);
        driver.set(0x70, ALL_OK);
        assert_ne!(driver.get(0x70) & NEEDS_RESET, 0, "{what}");
        driver.start();
        assert_eq!(driver.request(IN, 0, &[(DATA, 512)], true), (OK, 513), "after {what}");
    }
    assert!(super::driver::content(&file) == before);
}

#[test]
fn queues_that_are_none_are_refused() {
    let (file, _) = image(8);
    let mut driver = Driver::new(disk(&file, false));
    for (size, descriptors, available, used) in [
        (0, DESCRIPTORS, AVAILABLE, USED),
        (3, DESCRIPTORS, AVAILABLE, USED),
        (512, DESCRIPTORS, AVAILABLE, USED),
        (65536, DESCRIPTORS, AVAILABLE, USED),
        (u32::MAX, DESCRIPTORS, AVAILABLE, USED),
        (16, DESCRIPTORS + 8, AVAILABLE, USED),
        (16, DESCRIPTORS, AVAILABLE + 1, USED),
        (16, DESCRIPTORS, AVAILABLE, USED + 2),
        (16, 4 * MIB - 16, AVAILABLE, USED),
        (16, DESCRIPTORS, 4 * MIB - 2, USED),
        (16, DESCRIPTORS, AVAILABLE, 4 * MIB - 4),
        (16, DESCRIPTORS, AVAILABLE, u64::MAX - 3),
        (16, u64::MAX - 15, AVAILABLE, USED),
        (16, DESCRIPTORS, 0, USED),
    ] {
        driver.negotiate(1 << 32);
        driver.set_queue(size, descriptors, available, used);
        assert_eq!((driver.get(0x44), driver.get(0x70)), (0, 11 | NEEDS_RESET), "{size} {used:#x}");
        driver.set(0x50, 0);
    }
    driver.start();
    assert_eq!(driver.request(IN, 0, &[(DATA, 512)], true), (OK, 513));
}

#[test]
fn nothing_of_a_request_that_was_under_way_comes_after_a_reset() {
    let (inside, reset) = (Step::default(), Step::default());
    let (report, result) = std::sync::mpsc::channel();
    let (in_it, go) = (inside.clone(), reset.clone());
    let mut driver = Driver::started(Scripted(move |request: &Request<'_>| {
        in_it.done();
        go.wait();
        let result = request.write(0, &[0x77; 16]);
        report.send(result).unwrap();
        result.map(|()| 16)
    }));
    driver.chain_and_offer(&[(DATA, 16, true)]);
    inside.wait();
    driver.set(0x70, 0);
    assert_eq!(driver.get(0x70), 0);
    driver.put(DATA, &[0; 16]);
    // It is in use again before the old request comes to its end.
    driver.start();
    reset.done();
    assert_eq!(result.recv().unwrap(), Err(Fault::Gone));
    assert_eq!((driver.bytes(DATA, 16), driver.answers()), (vec![0; 16], 0));
    driver.offer(0);
    assert_eq!(driver.answer(), (0, 16));
}

#[test]
fn while_the_world_stands_guest_memory_does_too() {
    let (inside, stopped) = (Step::default(), Step::default());
    let (in_it, go) = (inside.clone(), stopped.clone());
    let mut driver = Driver::started(Scripted(move |request: &Request<'_>| {
        in_it.done();
        go.wait();
        request.write(0, &[0x77; 16]).map(|()| 16)
    }));
    driver.chain_and_offer(&[(DATA, 16, true)]);
    inside.wait();
    driver.devices.bus().hold(true);
    let before = driver.bytes(0, 4 << 20);
    let saved = driver.devices.save();
    stopped.done();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(driver.bytes(0, 4 << 20) == before);
    assert_eq!((driver.edges(), driver.devices.save() == saved), (0, true));
    driver.devices.bus().hold(false);
    assert_eq!(driver.answer(), (0, 16));
    assert_eq!(driver.bytes(DATA, 16), [0x77; 16]);
}

#[test]
fn a_machine_that_is_taken_apart_waits_for_no_held_request() {
    let mut driver = Driver::started(Entropy);
    driver.devices.bus().hold(true);
    driver.chain_and_offer(&[(DATA, 16, true)]);
    drop(driver);
}

#[test]
fn a_saved_device_goes_on_elsewhere_with_what_it_had_not_done() {
    let (file, content) = image(8);
    let mut first = Driver::started(disk(&file, true));
    assert_eq!(first.request(IN, 1, &[(DATA, 512)], true), (OK, 513));
    first.devices.bus().hold(true);
    first.begin(IN, 2, &[(DATA, 512)], true);
    first.edges();
    let text = serde_json::to_string(&first.devices.save()).unwrap();
    let memory = first.bytes(0, 4 << 20);
    drop(first);

    let mut second = Driver::new(disk(&file, true));
    second.devices.bus().hold(true);
    second.put(0, &memory);
    let saved: Vec<(u32, VirtioState)> = serde_json::from_str(&text).unwrap();
    second.devices.restore(&saved).unwrap();
    assert_eq!(second.devices.save(), saved);
    assert_eq!(second.edges(), 1, "the interrupt that was not acknowledged is raised again");
    second.devices.bus().hold(false);
    second.wait_for("the answer", |driver| driver.answers() == 2);
    assert!(second.bytes(DATA, 512) == content[1024..1536]);
    assert_eq!(second.get(0x70), ALL_OK);
}

#[test]
fn states_that_do_not_fit_are_refused() {
    let (file, _) = image(8);
    let driver = Driver::started(disk(&file, true));
    driver.devices.bus().hold(true);
    let saved = driver.devices.save();
    let (slot, state) = saved[0];
    let writable = 1 << VIRTIO_BLK_F_FLUSH << 1;
    let mut queue = state.queue;
    queue.size = 3;
    let cases = [
        (vec![], "no virtio device in place 0"),
        (vec![(slot, state), (3, state)], "in place 3 and this one has none"),
        (vec![(slot, VirtioState { device_id: 4, ..state })], "is of type 4"),
        (vec![(slot, VirtioState { driver_features: 1 << 32 | writable, ..state })], "all of its features"),
        (vec![(slot, VirtioState { queue, ..state })], "power of two"),
    ];
    for (states, words) in cases {
        let error = driver.devices.restore(&states).unwrap_err().to_string();
        assert!(error.contains(words) && !error.contains('\n'), "{error}");
        assert_eq!(driver.devices.save(), saved);
    }
}

#[test]
fn l65_what_a_disk_stores_to_a_watched_page_is_told() {
    let (file, content) = image(8);
    let mut driver = Driver::started(disk(&file, false));
    driver.ram.watch(&BTreeSet::from([DATA, USED]));
    assert_eq!(driver.request(IN, 0, &[(DATA - 512, 512), (DATA, 512)], true), (OK, 1025));
    driver.devices.bus().hold(true);
    let stores = driver.ram.take_device_stores();
    let told: Vec<(u64, Vec<u8>)> = stores.iter().map(|store| (store.gpa, store.new.clone())).collect();
    // The used element is written before the index that makes it count, and both are told.
    let expected = [
        (DATA, content[512..1024].to_vec()),
        (USED + 2, vec![1, 0]),
        (USED + 4, [&0u32.to_le_bytes()[..], &1025u32.to_le_bytes()].concat()),
    ];
    assert_eq!(told, expected);
    assert_eq!(stores[0].old, [0; 512]);
}

#[test]
fn l55_no_patch_goes_to_a_disk() {
    use crate::ground::{Ground, RamGround};
    let (file, mut expected) = image(8);
    let mut driver = Driver::started(disk(&file, false));
    driver.put(DATA, &[0x90; 512]);
    assert!(RamGround(driver.ram.clone()).replace(DATA + 7, 0x90, crate::debug::INT3).unwrap());
    assert_eq!(driver.request(OUT, 0, &[(DATA, 512)], false), (OK, 1));
    expected[..512].fill(0x90);
    assert!(super::driver::content(&file) == expected);
    assert_eq!(driver.bytes(DATA + 7, 1), [crate::debug::INT3]);
}

#[test]
fn images_that_are_none_are_one_line_that_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("empty"), b"").unwrap();
    std::fs::write(path("odd"), [0; 513]).unwrap();
    std::fs::write(path("good"), [0; 512]).unwrap();
    for (name, words) in [
        ("missing", "check the path"),
        ("", "a directory"),
        ("../../dev/null", "device"),
        ("empty", "truncate -s 512"),
        ("odd", "truncate -s 1024"),
    ] {
        for read_only in [false, true] {
            let path = if name.contains("null") { "/dev/null".into() } else { path(name) };
            let text = Disk::open(&DiskConfig { path, read_only }).unwrap_err().to_string();
            assert!(text.contains(words) && !text.contains('\n'), "{text}");
        }
    }
    let good = |read_only| DiskConfig { path: path("good"), read_only };
    let error = Disk::open_all(&vec![good(true); MAX_DISKS + 1]).unwrap_err();
    assert!(matches!(error, DiskError::TooMany { count: 8 }), "{error}");
}

#[test]
fn an_image_has_one_writer_or_readers() {
    let (file, _) = image(1);
    let open = |read_only| Disk::open(&DiskConfig { path: file.path().into(), read_only });
    let readers = (open(true).unwrap(), open(true).unwrap());
    assert!(matches!(open(false), Err(DiskError::InUse { .. })));
    drop(readers);
    let writer = open(false).unwrap();
    for read_only in [true, false] {
        let text = open(read_only).unwrap_err().to_string();
        assert!(text.contains("in use") && !text.contains('\n'), "{text}");
    }
    drop(writer);
    open(true).unwrap();
}

impl Driver {
    fn chain_and_offer(&mut self, pieces: &[(u64, u32, bool)]) {
        self.chain(DESCRIPTORS, pieces);
        self.offer(0);
    }
}

/// What a hostile guest does.
#[derive(Debug, Clone)]
enum Act {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Set(u64, u32),
    /// A descriptor that may look like one.
    Describe {
        n: u16,
        page: u64,
        offset: u64,
        len: u32,
        flags: u16,
        next: u16,
    },
    Scribble(u64, Vec<u8>),
    Offer(u16),
    /// A request in good form, as far as its pieces and its header are.
    Request {
        kind: u32,
        sector: u64,
        pieces: Vec<(u64, u32, bool)>,
    },
    Start,
    Kick,
}

/// The pages that any descriptor names, and that the rings are in: nothing else may change.
const SCRATCH: u64 = 0x20_0000;
const SCRATCH_PAGES: u64 = 8;

fn act() -> impl Strategy<Value = Act> {
    let register = prop_oneof![
        Just(0x14),
        Just(0x20),
        Just(0x24),
        Just(0x30),
        Just(0x38),
        Just(0x44),
        Just(0x50),
        Just(0x64),
        Just(0x70),
        Just(0x80),
        Just(0x84),
        Just(0x90),
        Just(0x94),
        Just(0xa0),
        Just(0xa4),
        0u64..0x1000
    ];
    let value = prop_oneof![0u32..20, Just(DESCRIPTORS as u32), Just(AVAILABLE as u32), any::<u32>()];
    prop_oneof![
        1 => (0u64..0xff8, 0usize..9).prop_map(|(offset, len)| Act::Read(offset, len)),
        1 => (0u64..0xff8, prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(offset, data)| Act::Write(offset, data)),
        2 => (register, value).prop_map(|(register, value)| Act::Set(register, value)),
        8 => (0u16..20, 0..SCRATCH_PAGES + 1, 0u64..0x1010, prop_oneof![0u32..1025, Just(1), Just(16), any::<u32>()],
              0u16..8, 0u16..20)
            .prop_map(|(n, page, offset, len, flags, next)| Act::Describe { n, page, offset, len, flags, next }),
        2 => (0u64..0x800, prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Act::Scribble(at, bytes)),
        4 => (0u16..20).prop_map(Act::Offer),
        8 => (
            prop_oneof![0u32..14, any::<u32>()],
            prop_oneof![0u64..10, any::<u64>(), Just(u64::MAX / 512), Just(u64::MAX / 512 + 1)],
            prop::collection::vec((SCRATCH..SCRATCH + SCRATCH_PAGES * 0x1000, 0u32..4097, any::<bool>()), 0..6),
        )
            .prop_map(|(kind, sector, pieces)| Act::Request { kind, sector, pieces }),
        4 => Just(Act::Start),
        1 => Just(Act::Kick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the guest does to registers, rings and descriptors: no panic, no hang, and only the RAM that it has
    /// given to the device changes, and the image only within its size.
    #[test]
    fn no_guest_gets_more_than_its_device(acts in prop::collection::vec(act(), 1..60)) {
        let (file, before) = image(8);
        let mut driver = Driver::new(disk(&file, false));
        for act in acts {
            match act {
                Act::Read(offset, len) => driver.registers().read(offset, &mut vec![0; len]),
                Act::Write(offset, data) => _ = driver.registers().write(offset, &data),
                Act::Set(register, value) => driver.set(register, value),
                Act::Describe { n, page, offset, len, flags, next } => {
                    // Now and then a page that is not RAM.
                    let gpa = if page == SCRATCH_PAGES { 4 * MIB + offset } else { SCRATCH + page * 0x1000 + offset };
                    // What is RAM ends within the scratch pages or is none.
                    let len = if len > 1024 && page < SCRATCH_PAGES { len | 0x8000_0000 } else { len };
                    driver.describe(DESCRIPTORS, n, gpa, len, flags, next);
                }
                Act::Scribble(at, bytes) => driver.put(SCRATCH + at, &bytes),
                Act::Offer(head) => driver.offer(head),
                Act::Request { kind, sector, mut pieces } => {
                    driver.put(HEADER, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
                    pieces.sort_by_key(|piece| piece.2);
                    let chain = [&[(HEADER, 16, false)][..], &pieces, &[(STATUS, 1, true)]].concat();
                    driver.chain(DESCRIPTORS, &chain);
                    driver.offer(0);
                }
                Act::Start => driver.start(),
                Act::Kick => driver.set(0x50, 0),
            }
        }
        // It is alive, and a reset makes it as good as new.
        driver.start();
        prop_assert_eq!(driver.request(FLUSH, 0, &[], false), (OK, 1));
        driver.devices.bus().hold(true);
        let given = DESCRIPTORS..STATUS + 0x1000;
        let scratch = SCRATCH..SCRATCH + (SCRATCH_PAGES + 2) * 0x1000;
        let memory = driver.bytes(0, 4 << 20);
        let changed = memory.iter().zip(0u64..).find(|(byte, at)| **byte != 0 && !given.contains(at) && !scratch.contains(at));
        prop_assert_eq!(changed, None);
        prop_assert_eq!(super::driver::content(&file).len(), before.len());
    }
}
