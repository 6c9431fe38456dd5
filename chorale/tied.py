"""`python -m chorale.tied PID ARGUMENTS`: the `chorale` command, ended when the process PID is gone.

A Ray replica that is killed cannot end its server; nobody else would. Owns one watching thread. Invariant: SIGTERM is
sent once, within `PERIOD_S` of the other's end.
"""

import os
import signal
import sys
import threading
import time

from serve.cli.app import app

PERIOD_S = 0.5


def watch(pid: int) -> None:
    """End this process when its parent is not `pid` any more."""
    while os.getppid() == pid:
        time.sleep(PERIOD_S)
    # whoever asked is gone: nothing is worth finishing
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PERIOD_S)


def main() -> None:
    """Watch, and run the command."""
    threading.Thread(target=watch, args=(int(sys.argv[1]),), daemon=True).start()
    app(sys.argv[2:])


if __name__ == "__main__":
    main()
