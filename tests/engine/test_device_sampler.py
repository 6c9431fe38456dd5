"""The batched sampler against the per-row one: the same tokens and log-probabilities from the same fp32 logits.

All on CPU tensors; the invariant of both is that a row does not see its neighbours.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from serve.engine.device_sampler import DeviceLogprobs, DeviceWords, Outcome, draw, falling, take_argmax
from serve.engine.packed_words import Words
from serve.engine.plan import Row, SampleSpec
from serve.engine.sampler import Sampled, sample
from serve.engine.sampling_plan import MAX_GROUP_ROWS, BitMask, plan_draws
from serve.engine.token_history import TokenHistories
from serve.messages import Grammar, SamplingParams, TokenLogprobs

VOCAB = 1300
EOS = [2]
GRAMMAR = Grammar("regex", "a*")
# what clients ask for, alone and together
WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.7, "min_p": 0.05},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 7, "top_p": 0.6},
    {"top_p": 0.9},
    {"top_p": 0.2, "temperature": 2.0},
    {"top_p": 0.999, "min_p": 0.01},
    {"top_k": 5000, "top_p": 0.5},
    {"temperature": 0.0, "num_logprobs": 0},
    {"top_p": 0.8, "num_logprobs": 5},
    {"temperature": 0.0, "repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "top_k": 20},
    {"presence_penalty": 1.5, "frequency_penalty": 0.25},
    {"presence_penalty": -0.5, "temperature": 0.0, "num_logprobs": 20},
    {"logit_bias": ((11, 4.0), (700, -100.0), (11, 1.5))},
    {"logit_bias": ((2, 30.0),), "min_tokens": 90, "stop_token_ids": (7, 11), "temperature": 0.0},
    {"grammar": GRAMMAR, "temperature": 0.0},
    {"grammar": GRAMMAR, "top_p": 0.7, "min_tokens": 90},
]


def random_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def tied_logits(num_rows: int) -> torch.Tensor:
    """Few different values, as a bf16 model has, and some rows that are flat."""
    logits = (random_logits(num_rows, seed=5) * 2).round() / 2
    logits[::5] = 0.25
    return logits


def rows_of(wishes: list[dict[str, Any]], salt: int = 0) -> list[Row]:
    generator = np.random.default_rng(salt)
    rows = []
    for i, wish in enumerate(wishes):
        params = SamplingParams(**{"max_tokens": 99, "seed": 100 * salt + i, **wish})
        prompt, output = (generator.integers(0, 40, size=size).tolist() for size in (30, 25))
        rows.append(Row(f"r{salt}-{i}", [1], 54, [0], None, SampleSpec(params, prompt, output)))
    return rows


def grammar_mask(row: Row) -> BitMask | None:
    if row.sample is None or row.sample.params.grammar is None:
        return None
    bits = np.zeros(VOCAB + 12, dtype=np.uint8)
    bits[[3, 11, 40, 700, 1299]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def expected(logits: torch.Tensor, rows: list[Row]) -> list[Sampled]:
    specs = [row.sample for row in rows if row.sample is not None]
    return sample(logits, specs, EOS, lambda i: grammar_mask(rows[i]))


def on_device(
    logits: torch.Tensor,
    rows: list[Row],
    mask: Callable[[Row], BitMask | None] = grammar_mask,
    histories: TokenHistories | None = None,
) -> list[Sampled]:
    words = Words()
    groups = plan_draws(rows, VOCAB, EOS, mask, histories or TokenHistories(), words)
    packed = np.full(words.size, -1, dtype=np.int32)
    words.write(packed)
    outcome = Outcome.build(len(rows) + 3, logits.device)
    outcome.words.fill_(-7)
    take_argmax(logits, outcome)
    logprobs: dict[int, TokenLogprobs] = {}
    tokens = outcome.tokens
    for group in groups:
        found = draw(logits, group, DeviceWords(torch.from_numpy(packed)), outcome)
        assert (found is None) == (not group.logprob_owners)
        if found is not None:
            logprobs |= _by_owner(found, group.logprob_owners, rows, tokens)
    assert outcome.words[:, len(rows) :].eq(-7).all(), "memory of other rows was written"
    return [
        Sampled(int(tokens[i]), logprobs.get(i)) if outcome.finite[i] == 1 else Sampled(None, None)
        for i in range(len(rows))
    ]


def _by_owner(
    found: DeviceLogprobs, owners: tuple[int, ...], rows: list[Row], tokens: torch.Tensor
) -> dict[int, TokenLogprobs]:
    result = {}
    for place, owner in enumerate(owners):
        spec = rows[owner].sample
        count = spec.params.num_logprobs if spec is not None else None
        ids, values = found.top_ids[place].tolist()[:count], found.top_values[place].tolist()[:count]
        result[owner] = TokenLogprobs(int(tokens[owner]), float(found.chosen[place]), ids, values)
    return result


@pytest.mark.parametrize("make_logits", [random_logits, tied_logits])
def test_the_tokens_are_those_of_the_per_row_sampler(make_logits: Callable[[int], torch.Tensor]) -> None:
    for salt in range(6):
        rows = rows_of(WISHES, salt)
        logits = make_logits(len(rows)) + salt
        untouched = logits.clone()
        assert on_device(logits, rows) == expected(logits, rows)
        assert torch.equal(logits, untouched)


def test_a_row_does_not_see_the_rows_beside_it() -> None:
    rows, logits = rows_of(WISHES), tied_logits(len(WISHES))
    together = on_device(logits, rows)
    for i, row in enumerate(rows):
        assert on_device(logits[i : i + 1], [row]) == [together[i]], WISHES[i]


def test_more_rows_than_one_group_holds() -> None:
    wishes = [{"temperature": 0.9, "top_k": 1 + i % 9, "num_logprobs": i % 3} for i in range(2 * MAX_GROUP_ROWS + 5)]
    rows = rows_of(wishes)
    logits = random_logits(len(rows))
    assert on_device(logits, rows) == expected(logits, rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_row_fails_alone(bad: float) -> None:
    rows, logits = rows_of(WISHES), random_logits(len(WISHES))
    clean = on_device(logits, rows)
    for broken in range(len(rows)):
        poisoned = logits.clone()
        poisoned[broken, 40] = bad
        found = on_device(poisoned, rows)
        assert found[broken].token_id is None
        assert found[:broken] + found[broken + 1 :] == clean[:broken] + clean[broken + 1 :]


def test_greedy_rows_alone_need_no_words() -> None:
    words = Words()
    rows = rows_of([{"temperature": 0.0, "min_tokens": 3}] * 4)
    assert plan_draws(rows, VOCAB, EOS, grammar_mask, TokenHistories(), words) == [] and words.size == 0


def test_a_row_without_sample_is_no_ones_business() -> None:
    rows = rows_of([{"temperature": 1.0}] * 3)
    rows[1] = Row("chunk", [1, 2], 0, [0], None, None)
    logits = random_logits(3)
    found = on_device(logits, rows)
    assert [found[0], found[2]] == [expected(logits[[0, 2]], [rows[0], rows[2]])[i] for i in (0, 1)]


def test_a_chained_row_draws_as_if_its_newest_token_were_known() -> None:
    logits = random_logits(2)
    params = SamplingParams(max_tokens=9, seed=4, min_tokens=3, temperature=1.2)
    known = Row("a", [9], 7, [0], None, SampleSpec(params, [1, 2], [5, 9]))
    chained = Row("b", [-1], 7, [0], None, SampleSpec(params, [1, 2], [5]), is_chained=True)
    assert on_device(logits[[0, 0]], [known, chained])[1] == on_device(logits[:1], [known])[0]


def test_penalties_follow_a_sequence_that_grows_and_starts_again() -> None:
    histories = TokenHistories()
    logits = random_logits(1)
    params = SamplingParams(max_tokens=9, seed=4, repetition_penalty=1.3, frequency_penalty=0.7, temperature=0.0)
    output: list[int] = []
    row = Row("a", [9], 7, [0], None, SampleSpec(params, list(range(400)), output))
    for _ in range(12):
        wanted = expected(logits, [row])
        assert on_device(logits, [row], histories=histories) == wanted
        output.append(wanted[0].token_id or 0)
    # the same id with a shorter output is another life: nothing of the old one may stay
    del output[3:]
    assert on_device(logits, [row], histories=histories) == expected(logits, [row])
    histories.release("a")
    histories.release("never seen")


def test_falling_orders_equal_scores_by_id_for_any_count() -> None:
    scores = torch.tensor([[1.0, -0.0, 2.0, 0.0, 2.0, float("-inf"), -3.0]])
    order = [2, 4, 0, 1, 3, 6, 5]
    for count in range(1, 8):
        values, ids = falling(scores, count)
        assert ids[0].tolist() == order[:count]
        assert values[0].tolist() == scores[0, order[:count]].tolist()


def test_bf16_logits_give_the_greedy_token_of_their_fp32_values() -> None:
    logits = random_logits(4).to(torch.bfloat16)
    found = on_device(logits, rows_of([{"temperature": 0.0}] * 4))
    assert [row.token_id for row in found] == logits.float().argmax(1).tolist()
