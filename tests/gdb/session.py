"""What a kernel developer does with a guest kernel, typed by a script. Runs inside gdb (see run)."""

import os
import re
import signal
import threading
import time
import traceback

import gdb

PORT = os.environ["TRAPLINE_PORT"]
CONSOLE = os.environ["TRAPLINE_CONSOLE"]
CPUS = int(os.environ["TRAPLINE_CPUS"])
NAME = os.environ["TRAPLINE_TEST"]
BOOTED = "trapline-guest: ready"

tests = []
counts = {"passed": 0, "failed": 0}


def test(function):
    """Registers a test; they run in the order in which they stand here, on one guest."""
    tests.append(function)
    return function


def run(command):
    """Types a command and gives what gdb printed."""
    return gdb.execute(command, to_string=True)


def refused(command):
    """Types a command that must fail and gives the error text."""
    try:
        printed = run(command)
    except gdb.error as error:
        return str(error)
    raise AssertionError(f"'{command}' was not refused; gdb said: {printed}")


def value(expression):
    return int(gdb.parse_and_eval(expression))


def check(condition, what):
    if not condition:
        raise AssertionError(what)


def console():
    with open(CONSOLE, errors="replace") as file:
        return file.read()


def last_tick():
    ticks = re.findall(r"trapline-guest: tick (\d+)", console())
    return int(ticks[-1]) if ticks else 0


def threads():
    return sorted(thread.num for thread in gdb.selected_inferior().threads())


def interrupt_after(seconds):
    """Types Ctrl-C after a while; gives when it was typed."""
    typed = []

    def type_it():
        typed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(seconds, type_it)
    timer.daemon = True
    timer.start()
    return typed


def run_for(seconds):
    """Lets the guest run for a while; gives what gdb printed and how long Ctrl-C took."""
    typed = interrupt_after(seconds)
    printed = run("continue")
    return printed, time.monotonic() - typed[0]


def run_until(condition, what, most=240):
    """Lets the guest run until the condition holds."""
    end = time.monotonic() + most
    while not condition():
        check(time.monotonic() < end, f"{what}: not within {most} s")
        run_for(1.0)


@test
def stops_at_the_first_instruction():
    run(f"target remote {PORT}")
    check(threads() == list(range(1, CPUS + 1)), f"threads {threads()}")
    # Nothing has run: the console is empty, and the boot vCPU stands at an entry point.
    check(console() == "", f"console: {console()}")
    check(value("$pc") != 0, "no pc")


@test
def hbreak_start_kernel_and_bt():
    run("hbreak start_kernel")
    printed = run("continue")
    check("start_kernel" in printed, printed)
    backtrace = run("bt")
    check(re.search(r"^#0 .*start_kernel", backtrace), backtrace)
    check(re.search(r"^#\d+ .*secondary_startup_64", backtrace, re.M), backtrace)
    check(gdb.selected_thread().num == 1, "on the boot vCPU")
    run("delete")


@test
def boots_to_userspace():
    run_until(lambda: BOOTED in console(), "the guest's init")
    check(f"ready cpus={CPUS}" in console(), console()[-300:])


@test
def hbreak_is_hit_on_every_vcpu_200_times():
    run("hbreak vfs_read")
    seen = {}
    for _ in range(200):
        printed = run("continue")
        check("vfs_read" in printed, printed)
        check("SIG" not in printed, printed)
        number = gdb.selected_thread().num
        seen[number] = seen.get(number, 0) + 1
    check(set(seen) == set(threads()), f"hits per thread: {seen}")
    print(f"  200 hits, per thread: {seen}")
    hits = run("info breakpoints")
    check("already hit 200 times" in hits, hits)
    run("delete")


@test
def info_threads_and_bt_on_each():
    listing = run("info threads")
    for number in threads():
        check(re.search(rf"^[* ]+{number} +Thread", listing, re.M), listing)
        switched = run(f"thread {number}")
        check(f"Switching to thread {number}" in switched, switched)
        check(gdb.selected_thread().num == number, switched)
        backtrace = run("bt 20")
        check(re.search(r"^#0 ", backtrace), backtrace)
        # Names that are not "??": the symbols fit what runs.
        check(re.search(r"^#\d+ .* (in )?[a-z_]\w+ \(", backtrace, re.M) or "0x0000" in backtrace, backtrace)
    run("thread 1")


@test
def system_registers():
    run("hbreak vfs_read")
    run("continue")
    run("delete")
    cr3 = value("(unsigned long)$cr3")
    check(cr3 & 0xFFF < 0x1000 and cr3 != 0, f"cr3 {cr3:#x}")
    # Long mode, active, with SYSCALL and NX, as every 64-bit Linux has it.
    efer = value("(unsigned long)$efer")
    check(efer & 0xD01 == 0xD01, f"efer {efer:#x}")
    check("0x" in run("p/x $efer"), "p/x $efer")
    check(run("p $cr3").startswith("$"), "p $cr3")
    # The kernel keeps its per-CPU base in GS.
    check(value("(unsigned long)$gs_base") >> 47 != 0, "gs_base is a kernel address")
    check(value("(unsigned long)$fs_base") >> 47 == 0, "fs_base is a user address")
    check(value("(unsigned long)$k_gs_base") >> 47 == 0, "k_gs_base is a user address")
    cr0 = value("(unsigned long)$cr0")
    check(cr0 & 0x80000001 == 0x80000001, f"cr0 {cr0:#x}")
    check(value("(unsigned long)$cr4") & 0x20, "cr4.PAE")


@test
def memory_of_kernel_user_and_nobody():
    kernel = run("x/8gx &init_task")
    check(kernel.count("0x") >= 8, kernel)
    banner = gdb.parse_and_eval("(char*)linux_banner").string()
    check(banner.startswith("Linux version"), banner)
    # A system call's first argument is the frame with the user's registers.
    run("hbreak __x64_sys_read")
    run("continue")
    run("delete")
    regs = gdb.parse_and_eval("(struct pt_regs *)$rdi")
    user_ip = int(regs["ip"])
    check(user_ip >> 47 == 0 and user_ip != 0, f"user ip {user_ip:#x}")
    user = run(f"x/8gx {user_ip:#x}")
    check(user.count("0x") >= 8, user)
    # SYSCALL is what stands before the return address.
    before = gdb.selected_inferior().read_memory(user_ip - 2, 2).tobytes()
    check(before == b"\x0f\x05", before.hex())
    for nobody in ("0x10", "0xffff800000000000", "0xdeadbeef00000000"):
        message = refused(f"x/8gx {nobody}")
        check("Cannot access memory" in message, message)


@test
def watch_shows_old_and_new():
    run("watch -l jiffies_64")
    before = value("jiffies_64")
    for _ in range(3):
        printed = run("continue")
        check("Hardware watchpoint" in printed, printed)
        old, new = (int(found) for found in re.search(r"Old value = (\d+)\s+New value = (\d+)", printed).groups())
        check(old == before and new > old, printed)
        before = new
    run("delete")


@test
def rwatch_and_awatch():
    run("rwatch -l jiffies_64")
    printed = run("continue")
    check("Hardware read watchpoint" in printed and "Value =" in printed, printed)
    run("delete")
    run("awatch -l jiffies_64")
    kinds = set()
    for _ in range(6):
        printed = run("continue")
        check("Hardware access (read/write) watchpoint" in printed, printed)
        kinds.add("write" if "New value" in printed else "read")
    print(f"  awatch saw: {sorted(kinds)}")
    run("delete")


@test
def a_thousand_steps():
    run("hbreak vfs_read")
    run("continue")
    run("delete")
    thread = gdb.selected_thread().num
    run("set scheduler-locking on")
    seen = set()
    for _ in range(10):
        run("stepi 100")
        check(gdb.selected_thread().num == thread, "stepi changed the thread")
        seen.add(value("$pc"))
    check(len(seen) > 1, "the steps go nowhere")
    run("set scheduler-locking off")
    # Stepping with the others running stays on its thread too.
    run("stepi 20")
    check(gdb.selected_thread().num == thread, "stepi changed the thread")
    # What stepping leaves in a guest shows up as debug exceptions that nobody asked for.
    run_for(2.0)
    check("exc_debug" not in console() and "traps: PANIC" not in console(), console()[-500:])


@test
def a_fifth_hardware_breakpoint_is_refused_clearly():
    for function in ("vfs_read", "vfs_write", "do_sys_openat2", "kernel_clone"):
        run(f"hbreak {function}")
    run("hbreak do_exit")
    message = refused("continue")
    check("hardware breakpoint 5" in message or "slots" in message, message)
    print(f"  gdb says: {message.strip().splitlines()[-1]}")
    run("delete 5" if "breakpoint 5" in message else f"delete {gdb.breakpoints()[-1].number}")
    seen = set()
    for _ in range(40):
        printed = run("continue")
        seen.update(re.findall(r"vfs_read|vfs_write|do_sys_openat2|kernel_clone", printed))
        if len(seen) == 4:
            break
    check(len(seen) >= 2, f"of the four others only {seen} were hit")
    run("delete")


@test
def ctrl_c_stops_within_a_second():
    fastest = min(run_for(1.0)[1] for _ in range(3))
    print(f"  from Ctrl-C to the prompt: {fastest * 1000:.0f} ms")
    check(fastest < 1.0, f"the fastest of three took {fastest:.2f} s")
    printed, _ = run_for(0.5)
    check("SIGINT" in printed, printed)


@test
def detach_lets_the_guest_go_on_and_gdb_comes_back():
    run("hbreak vfs_read")
    run("continue")
    before = last_tick()
    run("detach")
    end = time.monotonic() + 60
    while last_tick() < before + 3 and time.monotonic() < end:
        time.sleep(0.2)
    check(last_tick() >= before + 3, f"the guest's console stands at tick {last_tick()}")
    run("delete")
    run(f"target remote {PORT}")
    check(threads() == list(range(1, CPUS + 1)), f"threads {threads()}")
    run("hbreak vfs_read")
    check("vfs_read" in run("continue"), "breakpoints work after coming back")
    run("delete")


def kill():
    run("kill")


def main():
    run("set pagination off")
    run("set confirm off")
    run("set width 0")
    for function in tests:
        started = time.monotonic()
        try:
            function()
            verdict = "ok"
            counts["passed"] += 1
        except Exception:  # whatever it is, the next test may still say something
            traceback.print_exc()
            verdict = "FAILED"
            counts["failed"] += 1
            run("delete")
        print(f"test {NAME}::{function.__name__} ... {verdict} ({time.monotonic() - started:.1f} s)", flush=True)
    kill()
    with open(os.environ["TRAPLINE_RESULTS"], "w") as file:
        file.write(f"{counts['passed']} {counts['failed']}")


main()
