"""The sampler against plain probability: draws follow the distribution, truncations and masks hold, seeds repeat."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from serve.engine.plan import SampleSpec
from serve.engine.sampler import sample
from serve.engine.sampling_plan import uniform
from serve.messages import SamplingParams

VOCAB = 1300
EOS = [2]


def spec(output_ids: list[int] | None = None, prompt_ids: list[int] | None = None, **fields: Any) -> SampleSpec:
    params = SamplingParams(**{"max_tokens": 8, "seed": 1, **fields})
    return SampleSpec(params, prompt_ids or [5], output_ids or [])


def one(logits: torch.Tensor, wanted: SampleSpec) -> int | None:
    return sample(logits[None], [wanted], EOS, lambda _: None)[0].token_id


def random_logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_draws_follow_the_softmax() -> None:
    logits = torch.full((VOCAB,), -30.0)
    logits[[3, 600, 1299]] = torch.tensor([0.5, 0.3, 0.2]).log()
    draws = [one(logits, spec(seed=seed)) for seed in range(3000)]
    for token, share in ((3, 0.5), (600, 0.3), (1299, 0.2)):
        assert abs(draws.count(token) / 3000 - share) < 4 * math.sqrt(share * (1 - share) / 3000)


def test_the_uniform_draw_is_flat_and_differs_between_positions_and_seeds() -> None:
    draws = np.array([uniform(seed, index) for seed in range(40) for index in range(50)])
    counts, _ = np.histogram(draws, bins=10, range=(0.0, 1.0))
    assert len(set(draws.tolist())) == 2000
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees, 0.1 %


def test_a_token_does_not_depend_on_the_rest_of_the_batch() -> None:
    logits = random_logits(6)
    specs = [
        spec(temperature=0.0),
        spec(temperature=0.8, top_p=0.7),
        spec(top_k=5),
        spec(min_p=0.2, seed=9),
        spec(temperature=1.3, output_ids=[1, 1, 7], presence_penalty=1.0, frequency_penalty=0.5),
        spec(repetition_penalty=1.4, temperature=0.0, num_logprobs=3),
    ]
    together = sample(logits, specs, EOS, lambda _: None)
    alone = [sample(logits[i : i + 1], [specs[i]], EOS, lambda _: None)[0] for i in range(6)]
    assert together == alone


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.5}, {0}), ({"top_p": 0.75}, {0, 1}), ({"min_p": 0.3}, {0, 1, 2})],
)
def test_truncation_keeps_only_the_likely_tokens(fields: dict[str, Any], allowed: set[int]) -> None:
    logits = torch.full((VOCAB,), -40.0)
    logits[:4] = torch.tensor([0.5, 0.25, 0.2, 0.05]).log()
    assert {one(logits, spec(seed=seed, **fields)) for seed in range(300)} == allowed


def test_a_flat_distribution_beyond_the_top_p_candidates_is_sorted_whole() -> None:
    drawn = {one(torch.zeros(VOCAB), spec(seed=seed, top_p=0.95)) for seed in range(600)}
    assert len(drawn) > 400


def test_penalties_move_logits_by_their_formulas() -> None:
    logits = torch.zeros(VOCAB)
    logits[7], logits[8] = 2.0, 1.4
    assert one(logits, spec(temperature=0.0, prompt_ids=[7], repetition_penalty=1.5)) == 8
    assert one(logits, spec(temperature=0.0, prompt_ids=[7], presence_penalty=1.0)) == 7
    assert one(logits, spec(temperature=0.0, output_ids=[7], presence_penalty=1.0)) == 8
    assert one(logits, spec(temperature=0.0, output_ids=[7, 7], frequency_penalty=0.25)) == 7
    assert one(logits, spec(temperature=0.0, output_ids=[7, 7], frequency_penalty=0.35)) == 8
    assert one(logits, spec(temperature=0.0, logit_bias=((8, 0.7),))) == 8


def test_min_tokens_forbids_every_end_for_a_while() -> None:
    logits = torch.zeros(VOCAB)
    logits[2], logits[9], logits[4] = 9.0, 8.0, 7.0
    wanted: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (9,)}
    assert one(logits, spec(output_ids=[1], **wanted)) == 4
    assert one(logits, spec(output_ids=[1, 1], **wanted)) == 2


def test_a_grammar_mask_leaves_only_its_tokens() -> None:
    bits = np.zeros(VOCAB + 12, dtype=np.uint8)
    bits[[11, 700]] = 1
    mask = np.packbits(bits, bitorder="little").view(np.int32)
    logits = random_logits()
    expected = 11 if logits[0, 11] > logits[0, 700] else 700
    assert sample(logits, [spec(temperature=0.0)], EOS, lambda _: mask)[0].token_id == expected
    assert {sample(logits, [spec(seed=s)], EOS, lambda _: mask)[0].token_id for s in range(40)} <= {11, 700}


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits()
    found = sample(logits, [spec(temperature=0.5, num_logprobs=4, logit_bias=((3, 50.0),))], EOS, lambda _: None)[0]
    expected = logits[0].log_softmax(0)
    assert found.logprobs is not None and found.token_id == 3
    assert found.logprobs.logprob == pytest.approx(float(expected[3]), abs=1e-5)
    assert found.logprobs.top_ids == expected.topk(4).indices.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_row_fails_alone(bad: float) -> None:
    logits = random_logits(3)
    clean = sample(logits, [spec(temperature=0.0)] * 3, EOS, lambda _: None)
    logits[1, 40] = bad
    found = sample(logits, [spec(temperature=0.0)] * 3, EOS, lambda _: None)
    assert found[1].token_id is None and (found[0], found[2]) == (clean[0], clean[2])


def test_bf16_logits_give_the_greedy_token_of_their_fp32_values() -> None:
    logits = random_logits(4).to(torch.bfloat16)
    tokens = [found.token_id for found in sample(logits, [spec(temperature=0.0)] * 4, EOS, lambda _: None)]
    assert tokens == logits.float().argmax(1).tolist()
