"""What a person sees while a run lasts: a progress bar on a terminal, nothing where the output is a file.

Owns the drawing, by rich. Invariant: drawing happens at most four times a second, in a task of the event loop, so it
never runs while a piece of an answer waits to be stamped for long.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from loadtest.runner import Progress

_EVERY_S = 0.25


class Screen:
    """Draws on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def load(self, title: str, progress: Progress) -> Iterator[None]:
        """Show requests done, in flight and failed, and tokens, while the block runs."""
        with self._bars() as bars:
            bar = bars.add_task(title, total=progress.num_planned, note="")
            drawing = asyncio.ensure_future(_redraw(bars, bar, progress))
            try:
                yield
            finally:
                drawing.cancel()
                _draw(bars, bar, progress)

    @contextmanager
    def steps(self, title: str, count: int) -> Iterator[Callable[[], None]]:
        """Show `count` steps."""
        with self._bars() as bars:
            bar = bars.add_task(title, total=count, note="")

            def advance() -> None:
                bars.advance(bar)

            yield advance

    def _bars(self) -> Bars:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Bars(
            *columns,
            TextColumn("{task.fields[note]}"),
            console=self._console,
            auto_refresh=False,
            disable=not self._console.is_terminal,
        )


async def _redraw(bars: Bars, bar: TaskID, progress: Progress) -> None:
    while True:
        await asyncio.sleep(_EVERY_S)
        _draw(bars, bar, progress)


def _draw(bars: Bars, bar: TaskID, progress: Progress) -> None:
    in_flight = progress.num_sent - progress.num_done
    note = f"{in_flight} in flight, {progress.num_failed} failed, {progress.num_tokens} tokens"
    bars.update(bar, completed=progress.num_done, note=note)
    bars.refresh()
