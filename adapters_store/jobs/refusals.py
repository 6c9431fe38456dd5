"""What is refused of a training job at the door: a value of the request, or lines of a data file.

Owns the two errors. Invariant: a message names the value, the limit and the way out, never a path; of a data file the
first ten bad lines are named, with their numbers.
"""

from typing import ClassVar

from adapters_store.errors import StoreError

MAX_NAMED_LINES = 10


class InvalidJob(StoreError):
    """400: a field of the job is unknown, of a wrong type or beyond its limit; `param` is the field's own name."""

    http_status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    default_code: ClassVar[str] = "invalid_value"

    def __init__(self, param: str, message: str, *, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)


class InvalidData(StoreError):
    """400 `invalid_file`: the first ten bad lines as (number from 1, what is wrong), and how many were bad in all."""

    http_status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    default_code: ClassVar[str] = "invalid_file"

    def __init__(self, errors: list[tuple[int, str]], total: int) -> None:
        self.errors = errors[:MAX_NAMED_LINES]
        self.total = total
        shown = "; ".join(f"line {number}: {reason}" for number, reason in self.errors)
        more = f"; and {total - len(self.errors)} more" if total > len(self.errors) else ""
        lines = "a bad line" if total == 1 else f"{total} bad lines"
        super().__init__(f"the data file has {lines}: {shown}{more}", param="file")
