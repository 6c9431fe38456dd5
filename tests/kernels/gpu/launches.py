"""What was launched: kernel names and grids, recorded where the interpreter would start them.

Owns the one hook into the interpreter. Invariant: the hook is gone when the `with` ends, and programs compute what they
would have computed, unless the caller asked for none to run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from triton.runtime import interpreter


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch."""

    kernel: str
    grid: tuple[int, ...]
    # what was passed by name: constexpr flags and tiles, warps, stages
    options: dict[str, object]

    @property
    def num_programs(self) -> int:
        """Programs of the grid."""
        count = 1
        for extent in self.grid:
            count *= extent
        return count


@contextmanager
def record_launches(*, executed: bool = True) -> Iterator[list[Launch]]:
    """Yield the list that every launch inside the `with` is appended to, in order.

    Args:
        executed: False runs no program, so outputs stay as they were: for counting launches of large grids.
    """
    launches: list[Launch] = []

    class RecordingExecutor(interpreter.GridExecutor):  # type: ignore[misc]
        def __call__(self, *args: object, **kwargs: object) -> None:
            assert not isinstance(self.grid, Callable), "launchers of this package pass plain grids"  # type: ignore[arg-type]
            launches.append(Launch(self.fn.__name__, tuple(self.grid), dict(kwargs)))
            if executed:
                super().__call__(*args, **kwargs)

    with mock.patch.object(interpreter, "GridExecutor", RecordingExecutor):
        yield launches
