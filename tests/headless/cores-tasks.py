"""Run by drgn, whose `prog` is the core: what it sees of the kernel, as JSON."""

import json

from drgn.helpers.linux.cpumask import for_each_online_cpu
from drgn.helpers.linux.printk import get_dmesg
from drgn.helpers.linux.sched import cpu_curr


def stack(task):
    return prog.stack_trace(task)


def cpu(number):
    task = cpu_curr(prog, number)
    trace = stack(task)
    return {"pid": task.pid.value_(), "pc": trace[0].pc, "stack": [frame.name for frame in trace]}


seen = {
    "release": prog["init_uts_ns"].name.release.string_().decode(),
    "tasks": {thread.tid: thread.name for thread in prog.threads()},
}
if prog["vmcoreinfo_size"]:
    seen["cpus"] = [cpu(number) for number in for_each_online_cpu(prog)]
    seen["log"] = get_dmesg(prog).decode(errors="replace")
else:
    # Nothing but the first task, which initialises the kernel.
    seen["init"] = [frame.name for frame in stack(prog["init_task"].address_of_())]
print(json.dumps(seen))
