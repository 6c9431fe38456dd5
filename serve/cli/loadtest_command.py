"""`chorale loadtest`: hands over to `python -m loadtest`, which is a program of its own and imports nothing of ours.

Owns the hand-over only. Invariant: every argument goes through unchanged, `--help` included.
"""

import os
import sys
from importlib.util import find_spec

import typer

NEEDED = ("aiohttp", "matplotlib")


def loadtest(context: typer.Context) -> None:
    """Put a planned load on an OpenAI-compatible server and report (see `chorale loadtest --help`)."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        typer.echo(f"chorale loadtest needs {' and '.join(missing)}: pip install 'chorale[loadtest]'", err=True)
        raise typer.Exit(2)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "loadtest", *context.args])
