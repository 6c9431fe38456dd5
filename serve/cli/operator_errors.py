"""How a command that failed speaks to its operator: one line on stderr, a status that is not 0, no traceback.

Owns the list of errors that an operator can act on; anything else is our bug and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import typer

from adapters_store.errors import StoreError
from serve.errors import ServeError, StartError


@contextmanager
def one_line_errors(*, exit_status: int) -> Iterator[None]:
    """End the command with one clear line if the body raises something that the operator can mend."""
    try:
        yield
    except (StartError, StoreError, ServeError) as error:
        _fail(str(error), exit_status)
    except httpx.HTTPError as error:
        _fail(f"{type(error).__name__}: {error}", exit_status)


def _fail(message: str, exit_status: int) -> None:
    typer.echo(f"chorale: {' '.join(message.split())}", err=True)
    raise typer.Exit(exit_status)
