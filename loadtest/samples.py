"""What became of one request: its moments, its tokens, its end; and the JSON lines they are kept in.

Owns the record. Invariant: every planned request has exactly one sample, and a sample without `failure` has an answer
that ended as it should.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from loadtest.errors import LoadtestError

# ends that are neither an answer nor the server's fault: the adapter was being exchanged by the plan itself
ABSENT = "absent"


@dataclass(slots=True)
class Sample:
    """One request's outcome. All moments are seconds since the run's start, by the tester's clock.

    scheduled_s: when it was due. sent_s: when the tester began to send it. token_at_s: arrival of each piece of the
    answer that carried a token. end_s: when the answer was complete, or the failure known.
    num_output_tokens: by the server's usage; where it sends none, the number of pieces (`is_counted` false).
    """

    index: int
    model: str
    adapter: int | None
    tenant: int | None
    prompt_tokens: int
    output_tokens: int
    scheduled_s: float
    sent_s: float = 0.0
    end_s: float = 0.0
    token_at_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int | None = None
    num_output_tokens: int = 0
    is_counted: bool = False
    status: int | None = None
    failure: str | None = None
    detail: str = ""
    finish_reason: str | None = None
    fingerprint: str | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        """Tell whether the whole answer came."""
        return self.failure is None

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the scheduled moment to the first token."""
        return self.token_at_s[0] - self.scheduled_s if self.is_ok and self.token_at_s else None

    @property
    def ttft_sent_s(self) -> float | None:
        """Seconds from the sent moment to the first token, as most tools count."""
        return self.token_at_s[0] - self.sent_s if self.is_ok and self.token_at_s else None

    @property
    def e2e_s(self) -> float | None:
        """Seconds from the scheduled moment to the last token."""
        return self.token_at_s[-1] - self.scheduled_s if self.is_ok and self.token_at_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; None with fewer than two tokens."""
        if not self.is_ok or not self.token_at_s or self.num_output_tokens < 2:
            return None
        return (self.token_at_s[-1] - self.token_at_s[0]) / (self.num_output_tokens - 1)

    def gaps_s(self) -> list[float]:
        """Return the seconds between one piece of the answer and the next."""
        times = self.token_at_s if self.is_ok else []
        return [after - before for before, after in pairwise(times)]


def write_samples(path: Path, run: str, samples: Iterable[Sample]) -> None:
    """Append a run's samples, one JSON object per line, each with its run's name."""
    with path.open("a", encoding="utf-8") as lines:
        for sample in samples:
            lines.write(json.dumps({"run": run, **asdict(sample)}, ensure_ascii=False) + "\n")


def read_samples(path: Path) -> dict[str, list[Sample]]:
    """Read what `write_samples` wrote, by run."""
    runs: dict[str, list[Sample]] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                fields = json.loads(line)
                runs.setdefault(str(fields.pop("run")), []).append(Sample(**fields))
            except (KeyError, TypeError, ValueError) as error:
                raise LoadtestError(f"{path}:{number}: not a sample: {error}") from error
    return runs
