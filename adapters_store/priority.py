"""How a process steps back for the server beside it: its niceness, and that of its session.

Owns the processor's priority of helpers in processes of their own. Linux may weigh whole sessions against each other
(autogroup, sched(7)): a niceness then counts inside a session alone, and a process that was started in one of its own
steps back for nobody unless the session does. Invariant: a session that others share is left as it is.
"""

import os
from contextlib import suppress
from pathlib import Path

_AUTOGROUP = Path("/proc/self/autogroup")


def step_back(niceness: int) -> None:
    """Raise this process's niceness by `niceness` (0 to 19), and its session's if it leads one; what fails is left out.

    Args:
        niceness: nothing at 0; at 19 the process hardly runs beside busy cores.
    """
    with suppress(OSError, AttributeError):
        os.nice(niceness)
    if not hasattr(os, "getsid") or os.getsid(0) != os.getpid():
        return
    # absent where the kernel has no autogroup; harmless where control groups weigh instead
    with suppress(OSError):
        _AUTOGROUP.write_text(f"{niceness}\n", encoding="ascii")
