"""What gdb says of one vCPU's stack, as JSON: for each frame its kind, address, function and line."""

import json

import gdb


class Frames(gdb.Command):
    """trapline-frames THREAD MOST: the frames of a thread, MOST of those that are on the stack."""

    KINDS = {gdb.NORMAL_FRAME: "normal", gdb.INLINE_FRAME: "inline", gdb.TAILCALL_FRAME: "tailcall"}

    def __init__(self):
        super().__init__("trapline-frames", gdb.COMMAND_USER)

    def invoke(self, argument, from_tty):
        thread, most = map(int, argument.split())
        # The registers may have been changed behind gdb's back.
        gdb.execute("maint flush register-cache", to_string=True)
        gdb.execute(f"thread {thread}", to_string=True)
        frames, ended = [], None
        frame, whole = gdb.newest_frame(), 0
        while frame is not None and whole < most:
            place = frame.find_sal()
            kind = self.KINDS.get(frame.type(), "other")
            frames.append({"kind": kind, "pc": frame.pc(), "name": frame.name(),
                           "line": place.line})
            whole += kind not in ("inline", "tailcall")
            try:
                older = frame.older()
            except gdb.error as error:
                ended = str(error)
                break
            if older is None:
                ended = gdb.frame_stop_reason_string(frame.unwind_stop_reason())
            frame = older
        print(json.dumps({"frames": frames, "ended": ended}))


Frames()
