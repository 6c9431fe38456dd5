"""What the engine answered to a probe's prompts, in the form that crosses to the reference process.

Owns the two value types and their JSON. Invariant: position t of a prompt is the distribution of the token after its
token t, on both sides.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from serve.probe.prompts import Prompt

# the file, in a folder of the upload's, by which it crosses
OBSERVED_NAME = "observed.json"


@dataclass(frozen=True, slots=True)
class Position:
    """The most likely tokens in falling order, and their natural log-probabilities."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


# by prompt, by position
Answers = tuple[tuple[Position, ...], ...]


@dataclass(frozen=True, slots=True)
class Observed:
    """Both sides of the engine's answer, and what it ran with."""

    prompts: tuple[Prompt, ...]
    base: Answers
    adapter: Answers
    # the engine's: "float32", "bfloat16" or "float16"
    dtype: str
    max_model_len: int

    def write(self, path: Path) -> None:
        """Write a new file."""
        with path.open("x", encoding="utf-8") as file:
            json.dump(asdict(self), file)

    @classmethod
    def read(cls, path: Path) -> "Observed":
        """Read `write`'s file; it comes from our own server."""
        value = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            prompts=tuple(tuple(prompt) for prompt in value["prompts"]),
            base=_answers(value["base"]),
            adapter=_answers(value["adapter"]),
            dtype=value["dtype"],
            max_model_len=value["max_model_len"],
        )


def _answers(value: list[list[dict[str, list[float]]]]) -> Answers:
    return tuple(
        tuple(
            Position(tuple(int(token) for token in position["token_ids"]), tuple(position["logprobs"]))
            for position in prompt
        )
        for prompt in value
    )
