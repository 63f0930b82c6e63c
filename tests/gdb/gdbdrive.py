"""A gdb that is typed to, and `trapline run` beside it. Shared by the sessions in this directory."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", REPO / "target"))
CACHE = Path(os.environ.get("TRAPLINE_CACHE_DIR", REPO / "target"))
# Bounds against hanging, not expectations: CI's machines may be several times slower than a developer's.
START_TIMEOUT = 120
COMMAND_TIMEOUT = 300
GUEST_TIMEOUT = 300
# What a slow machine may take to answer one packet. gdb's own two seconds lead to packets sent twice.
REMOTE_TIMEOUT = 60
# How long the threads are watched when a wait was in vain.
WATCHED = 2.0


class Guest:
    """`trapline run`, or another verb, with the console in a file and its own lines in a list."""

    def __init__(self, console, arguments, verb="run"):
        self.console_file = Path(console)
        command = [str(TARGET / "debug" / "trapline"), verb, "--gdb", ":0", "--console", f"file:{console}", *arguments]
        self.lines = []
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            print(f"  [trapline] {line}", end="", flush=True)

    def _said(self, pattern):
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found.group(1)
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"trapline never said '{pattern}': {self.lines}")

    def remote(self):
        """What gdb's `target remote` takes, from the line that trapline prints for pasting."""
        return self._said(r"target remote ([^']+)'")

    def symbols(self):
        return self._said(r"trapline: gdb (\S+) -ex")

    def console(self):
        return self.console_file.read_text(errors="replace") if self.console_file.exists() else ""

    def wait_for(self, condition, what, most=GUEST_TIMEOUT):
        """Waits for something that the guest does, and not longer than it can still do it."""
        end = time.monotonic() + most
        while not condition():
            self.check_alive(what)
            check(time.monotonic() < end, f"{what}: not within {most} s")
            time.sleep(0.1)

    def check_alive(self, what):
        """Fails if the guest has ended or its kernel has given up."""
        panic = re.search(r"Kernel panic.*", self.console())
        check(not panic, f"{what}: the guest's kernel panicked: {panic and panic.group()}")
        status = self.process.poll()
        check(status is None, f"{what}: trapline has ended with status {status}: {self.lines[-3:]}")

    def threads(self):
        """What each thread of trapline did in two seconds: tells one that is stuck from one that is starved."""
        before = self._tasks()
        time.sleep(WATCHED)
        text = f"machine: load {Path('/proc/loadavg').read_text().strip()}; in {WATCHED} s:"
        for task, (name, state, inside, ran, waited, turns) in self._tasks().items():
            then = before.get(task, (None, None, None, 0, 0, 0))
            text += (f"\n  thread {name}: state {state}, in {inside}; ran {(ran - then[3]) / 1e6:.0f} ms, "
                     f"waited for a CPU {(waited - then[4]) / 1e6:.0f} ms, {turns - then[5]} turns")
        return text

    def _tasks(self):
        tasks = {}
        for task in sorted(Path(f"/proc/{self.process.pid}/task").glob("*"), key=lambda path: int(path.name)):
            try:
                stat, inside = (task / "stat").read_text(), (task / "wchan").read_text()
                name, state = re.fullmatch(r"\d+ \((.*)\) (\S) .*", stat, re.S).groups()
                tasks[task.name] = (name, state, inside, *map(int, (task / "schedstat").read_text().split()))
            except OSError:
                pass  # it has ended meanwhile
        return tasks

    def end(self):
        """Ends it, if it has not ended by itself."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def ended(self, most=60):
        """Waits for it to end by itself; its exit status, or None if it had to be killed."""
        try:
            return self.process.wait(timeout=most)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return None


class Gdb:
    """A gdb at its prompt. `run` types a command and gives all that a person would see."""

    MARK = "@@trapline-mark@@"

    def __init__(self, symbols, transcript=None):
        self.transcript = transcript
        command = ["gdb", "-nx", "-q", "-iex", "set auto-load off", "-iex", "set style enabled off", str(symbols)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, bufsize=0)
        self.output = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        for setting in ("pagination off", "confirm off", "width 0", "prompt", "debuginfod enabled off",
                        f"remotetimeout {REMOTE_TIMEOUT}"):
            self.run(f"set {setting}")

    def _read(self):
        while chunk := self.process.stdout.read(65536):
            self.output.put(chunk.decode(errors="replace"))
        self.output.put(None)

    def type(self, command):
        """Types without waiting for anything."""
        try:
            self.process.stdin.write(f"{command}\necho \\n{self.MARK}\\n\n".encode())
        except BrokenPipeError:
            raise AssertionError(f"gdb has ended before '{command}'") from None

    def read(self, command, most=COMMAND_TIMEOUT):
        """Everything up to the next prompt after a command that was typed."""
        printed, end = "", time.monotonic() + most
        while self.MARK not in printed:
            try:
                chunk = self.output.get(timeout=max(0.1, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"gdb did not answer '{command}' within {most} s: {printed[-2000:]}") from None
            if chunk is None:
                raise AssertionError(f"gdb ended at '{command}': {printed[-2000:]}")
            printed += chunk
        printed = printed.split(self.MARK)[0].strip("\n")
        if self.transcript is not None:
            self.transcript.append(f"(gdb) {command}\n{printed}\n")
        return printed

    def run(self, command, most=COMMAND_TIMEOUT):
        self.type(command)
        return self.read(command, most)

    def value(self, expression):
        """An integer expression, as unsigned."""
        printed = self.run(f"output/x {expression}")
        found = re.search(r"0x[0-9a-f]+", printed)
        check(found, f"{expression}: {printed}")
        return int(found.group(), 16)

    def thread(self):
        return int(self.run("output $_thread"))

    def threads(self):
        return sorted(int(n) for n in re.findall(r"^[* ] +(\d+) +Thread", self.run("info threads"), re.M))

    def interrupt(self):
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def run_until(self, condition, guest, what):
        """Continues until the guest has done something, and then types Ctrl-C; what was printed."""
        self.type("continue")
        guest.wait_for(condition, what)
        self.interrupt()
        return self.read("continue")

    def run_for(self, seconds):
        """Continues, and types Ctrl-C after a while; what was printed, and how long Ctrl-C took."""
        self.type("continue")
        time.sleep(seconds)
        typed = time.monotonic()
        self.interrupt()
        return self.read("continue"), time.monotonic() - typed

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def check(condition, what):
    if not condition:
        raise AssertionError(what)


def wait_until(condition, what, most=60):
    end = time.monotonic() + most
    while not condition():
        check(time.monotonic() < end, f"{what}: not within {most} s")
        time.sleep(0.1)


class Tally:
    """Runs tests and says how they went, in libtest's words."""

    def __init__(self, name):
        self.name, self.passed, self.failed, self.ignored = name, 0, 0, 0

    def test(self, function, *arguments):
        started = time.monotonic()
        try:
            function(*arguments)
            self.passed += 1
            verdict = "ok"
        except Exception:  # whatever it is, the next test may still say something
            traceback.print_exc(file=sys.stdout)
            self.failed += 1
            verdict = "FAILED"
        print(f"test {self.name}::{function.__name__} ... {verdict} ({time.monotonic() - started:.1f} s)", flush=True)
        return verdict == "ok"

    def ignore(self, name, reason):
        self.ignored += 1
        print(f"test {self.name}::{name} ... ignored, {reason}", flush=True)

    def close(self):
        word = "ok" if self.failed == 0 else "FAILED"
        print(f"test result: {word}. {self.passed} passed; {self.failed} failed; {self.ignored} ignored; 0 measured; "
              "0 filtered out", flush=True)
        sys.exit(self.failed != 0)
