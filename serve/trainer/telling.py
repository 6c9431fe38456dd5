"""What a worker tells of a job: steps as events, thinned and batched, and how far the job is.

Owns the words and the rates. Invariant: the first and the last step are always told, and no job has many more than
`MAX_STEP_EVENTS` of them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from adapters_store.jobs.job import NewEvent, Progress
from adapters_store.strict_json import Json
from serve.trainer.progress import StepDone, Validated
from serve.trainer.wire import Begun

MAX_STEP_EVENTS = 2000


@dataclass(slots=True)
class _Since:
    step: int
    at: float


class Telling:
    """The events of one run that were not written yet."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._events: list[NewEvent] = []
        self._progress: Progress | None = None
        self._total_steps = 0
        self._since: _Since | None = None

    def begun(self, begun: Begun) -> None:
        """Note that the loop has loaded everything."""
        self._total_steps = begun.total_steps
        self._since = _Since(begun.resumed_step, self._clock())
        where = f" from step {begun.resumed_step}" if begun.resumed_step else ""
        self._events.append(NewEvent(f"Training {begun.num_trainable} parameters in {begun.total_steps} steps{where}"))
        if begun.cut and not begun.resumed_step:
            self.warn(begun.cut)

    def stepped(self, done: StepDone) -> None:
        """Note one step."""
        now = self._clock()
        since = self._since or _Since(done.step - 1, now)
        elapsed_s = max(now - since.at, 1e-9)
        rate = (done.step - since.step) / elapsed_s if done.step > since.step else 0.0
        self._progress = Progress(done.step, done.total_steps, done.train_loss, since.at, now, rate)
        every = -(-done.total_steps // MAX_STEP_EVENTS)
        if done.step % every and done.step != done.total_steps and done.step != 1:
            return
        data: dict[str, Json] = {
            "step": done.step,
            "total_steps": done.total_steps,
            "train_loss": done.train_loss,
            "train_mean_token_accuracy": done.train_mean_token_accuracy,
            "learning_rate": done.lr,
            **done.extra,
        }
        message = f"Step {done.step}/{done.total_steps}: training loss={done.train_loss:.4g}"
        self._events.append(NewEvent(message, data=data, series="train", step=done.step))

    def validated(self, result: Validated) -> None:
        """Note one validation."""
        data: dict[str, Json] = {
            "step": result.step,
            "total_steps": self._total_steps,
            "valid_loss": result.valid_loss,
            "valid_mean_token_accuracy": result.valid_mean_token_accuracy,
        }
        message = f"Step {result.step}/{self._total_steps}: validation loss={result.valid_loss:.4g}"
        self._events.append(NewEvent(message, data=data, series="valid", step=result.step))

    def warn(self, message: str) -> None:
        """Note something that is no step."""
        self._events.append(NewEvent(message, level="warn"))

    def take(self) -> tuple[list[NewEvent], Progress | None]:
        """Return what was noted since the last call."""
        events, progress = self._events, self._progress
        self._events, self._progress = [], None
        return events, progress
