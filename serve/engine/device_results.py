"""What a step gives back, read from the one run of words that came from the device; numpy only.

Owns the order of those words and their meaning as `RowResult`s. Invariant: made while the step is submitted, it holds
all it needs: nothing of the plan is read when the results are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.engine.packed_words import Field, Int32s, Words
from serve.engine.plan import Row, RowResult
from serve.engine.sampling_plan import DrawGroup
from serve.engine.step_packing import PackedStep
from serve.messages import TokenLogprobs


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The prompt positions of a step whose log-probabilities are wanted, all rows end to end."""

    # [P] int32: rows of the hidden states, and the prompt tokens behind them
    rows: Field
    targets: Field
    num_positions: int
    # most likely tokens of each position: the largest number that any row wants
    num_top: int
    # per row of the step that asked: request id, its targets, how many of `num_top` it wants
    shares: tuple[tuple[str, tuple[int, ...], int], ...]


def plan_prompt_logprobs(packed: PackedStep, words: Words) -> PromptLogprobs:
    """Gather the positions; their arrays go into `words`."""
    asking = [
        (row, begin)
        for row, begin in zip(packed.rows, packed.begins[:-1], strict=True)
        if row.num_prompt_logprobs is not None and row.prompt_targets is not None
    ]
    rows = [begin + i for row, begin in asking for i in range(len(row.prompt_targets or ()))]
    targets = [target for row, _ in asking for target in row.prompt_targets or ()]
    return PromptLogprobs(
        rows=words.put(rows, np.int32),
        targets=words.put(targets, np.int32),
        num_positions=len(rows),
        num_top=max((row.num_prompt_logprobs or 0 for row, _ in asking), default=0),
        shares=tuple(
            (row.request_id, tuple(row.prompt_targets or ()), row.num_prompt_logprobs or 0) for row, _ in asking
        ),
    )


@dataclass(frozen=True, slots=True)
class ResultLayout:
    """The words of one step's results, in order: tokens and finite flags of the logits' rows (`max_rows` each); with
    chunks the non-finite rows of each sequence; embeddings; log-probabilities of draw groups, then of the prompt."""

    max_rows: int
    hidden_size: int
    # request ids in the plan's order
    plan_order: tuple[str, ...]
    # request id and, if it samples, how many log-probabilities it wants, per row of the logits
    owners: tuple[tuple[str, bool, int | None], ...]
    # request ids in the device's order; empty without chunks
    checked: tuple[str, ...]
    embedded: tuple[str, ...]
    groups: tuple[DrawGroup, ...]
    prompt: PromptLogprobs

    @classmethod
    def of(
        cls,
        plan_rows: Sequence[Row],
        packed: PackedStep,
        groups: list[DrawGroup],
        prompt: PromptLogprobs,
        *,
        max_rows: int,
        hidden_size: int,
    ) -> "ResultLayout":
        """Describe the results of a packed step."""
        return cls(
            max_rows=max_rows,
            hidden_size=hidden_size,
            plan_order=tuple(row.request_id for row in plan_rows),
            owners=tuple(
                (row.request_id, row.sample is not None, None if row.sample is None else row.sample.params.num_logprobs)
                for row in packed.owners
            ),
            checked=tuple(row.request_id for row in packed.rows) if packed.num_chunks else (),
            embedded=tuple(row.request_id for row in packed.rows if row.embed is not None),
            groups=tuple(groups),
            prompt=prompt,
        )

    def read(self, words: Int32s) -> list[RowResult]:
        """Return the results in the plan's order."""
        reader = _Reader(words)
        tokens = reader.ints(self.max_rows).tolist()
        flags = reader.ints(self.max_rows).tolist()
        num_bad = dict(zip(self.checked, reader.ints(len(self.checked)).tolist(), strict=True))
        hidden = {request_id: reader.floats(self.hidden_size).tolist() for request_id in self.embedded}
        logprobs = self._read_logprobs(reader, tokens)
        prompt = self._read_prompt(reader)
        chosen: dict[str, int] = {}
        lost = {request_id for request_id, count in num_bad.items() if count}
        for (request_id, does_sample, _), token, is_finite in zip(self.owners, tokens, flags, strict=False):
            if not is_finite:
                lost.add(request_id)
            elif does_sample:
                chosen[request_id] = token
        return [
            RowResult(
                request_id=request_id,
                token_id=None if request_id in lost else chosen.get(request_id),
                logprobs=None if request_id in lost else logprobs.get(request_id),
                prompt_logprobs=prompt.get(request_id),
                hidden_sum=hidden.get(request_id),
                is_finite=request_id not in lost,
            )
            for request_id in self.plan_order
        ]

    def _read_logprobs(self, reader: "_Reader", tokens: list[int]) -> dict[str, TokenLogprobs]:
        found: dict[str, TokenLogprobs] = {}
        for group in self.groups:
            table = reader.logprobs(len(group.logprob_owners), group.num_top)
            for place, owner in enumerate(group.logprob_owners):
                request_id, _, count = self.owners[owner]
                found[request_id] = table.row(place, tokens[owner], count or 0)
        return found

    def _read_prompt(self, reader: "_Reader") -> dict[str, list[TokenLogprobs]]:
        table = reader.logprobs(self.prompt.num_positions, self.prompt.num_top)
        found: dict[str, list[TokenLogprobs]] = {}
        place = 0
        for request_id, targets, count in self.prompt.shares:
            found[request_id] = [table.row(place + i, target, count) for i, target in enumerate(targets)]
            place += len(targets)
        return found


@dataclass(frozen=True, slots=True)
class _LogprobTable:
    chosen: list[float]
    top_ids: list[list[int]]
    top_values: list[list[float]]

    def row(self, place: int, token_id: int, count: int) -> TokenLogprobs:
        return TokenLogprobs(token_id, self.chosen[place], self.top_ids[place][:count], self.top_values[place][:count])


class _Reader:
    """Words taken one array after the other."""

    def __init__(self, words: Int32s) -> None:
        self._words = words
        self._begin = 0

    def ints(self, count: int) -> Int32s:
        begin, self._begin = self._begin, self._begin + count
        return self._words[begin : self._begin]

    def floats(self, count: int) -> NDArray[np.float32]:
        return self.ints(count).view(np.float32)

    def logprobs(self, num_rows: int, num_top: int) -> _LogprobTable:
        chosen = self.floats(num_rows).tolist()
        top_ids = self.ints(num_rows * num_top).reshape(num_rows, num_top).tolist()
        return _LogprobTable(chosen, top_ids, self.floats(num_rows * num_top).reshape(num_rows, num_top).tolist())
