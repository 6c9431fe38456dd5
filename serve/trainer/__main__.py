"""The training process: `python -m serve.trainer REQUEST PARENT`, commands on stdin, messages on stdout.

Owns nothing but the start; see `walled_run`. Invariant: it ends when its worker does.
"""

import os
import sys

from serve.trainer.walled_run import die_with, train_inside
from serve.trainer.wire import RunRequest


def main(arguments: list[str]) -> int:
    """Train one job."""
    die_with(int(arguments[1]))
    commands, messages = 0, os.dup(1)
    # what a library prints belongs to the log
    os.dup2(2, 1)
    train_inside(RunRequest.from_json(arguments[0]), commands, messages)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
