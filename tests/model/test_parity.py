"""Every family against transformers in fp32: prefill whole and in chunks, mixed steps, 20 decodes through the cache."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from serve.model.decoder import Decoder
from tests.model.paged_run import PagedRun, chunked, load
from tests.model.tiny_models import TINY_MODELS, VOCAB, TinyModel, build_gemma3_multimodal, reference_logits, save

PROMPTS = (30, 13)
NUM_DECODES = 20
# measured 2e-6 to 1e-5: fp32 sums in another order
TOLERANCE = 1e-4

_IMAGE_PARTS = ("vision_tower.", "multi_modal_projector.")


@dataclass(frozen=True)
class Case:
    """A loaded checkpoint, two sequences and what transformers says about them."""

    decoder: Decoder
    sequences: tuple[list[int], list[int]]
    expected: tuple[Tensor, Tensor]


def make_case(model: torch.nn.Module, folder: Path, max_model_len: int | None) -> Case:
    draw = random.Random(3)
    first, second = ([draw.randrange(3, VOCAB) for _ in range(n + NUM_DECODES)] for n in PROMPTS)
    expected = (reference_logits(model, first), reference_logits(model, second))
    return Case(load(save(model, folder), max_model_len=max_model_len), (first, second), expected)


@pytest.fixture(scope="module", params=TINY_MODELS, ids=lambda model: model.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    tiny: TinyModel = request.param
    # longrope: the short factors belong to a server that never goes beyond the original length
    max_model_len = 128 if tiny.name.endswith("longrope-short") else None
    with torch.random.fork_rng():
        yield make_case(tiny.build(), tmp_path_factory.mktemp(tiny.name), max_model_len)


def max_error(logits: Tensor, expected: Tensor) -> float:
    return (logits - expected).abs().max().item()


def test_the_reference_is_not_flat(case: Case) -> None:
    assert case.expected[0].std() > 0.3
    assert case.expected[0][-1].argmax() != case.expected[0][-2].argmax() or case.expected[0].std(0).mean() > 0.1


@pytest.mark.parametrize("sizes", [[30], [17, 13], [5, 1, 24]], ids=["one-chunk", "two-chunks", "three-chunks"])
def test_prefill_and_decodes_agree_with_transformers(case: Case, sizes: list[int]) -> None:
    logits = PagedRun(case.decoder).run(0, chunked(case.sequences[0], sizes))
    assert max_error(logits, case.expected[0]) <= TOLERANCE


def test_two_sequences_in_one_step_agree_with_transformers(case: Case) -> None:
    run = PagedRun(case.decoder)
    chunks = [chunked(case.sequences[0], [20, 10]), chunked(case.sequences[1], [13])]
    logits: list[list[Tensor]] = [[], []]
    # the second joins one step late: its prefill shares a step with the first's second chunk, then both decode
    for step in range(len(chunks[0])):
        tokens = {0: chunks[0][step]}
        if step >= 1 and step - 1 < len(chunks[1]):
            tokens[1] = chunks[1][step - 1]
        for sequence, rows in run.step(tokens).items():
            logits[sequence].append(rows)
    for sequence in (0, 1):
        got = torch.cat(logits[sequence])
        assert max_error(got, case.expected[sequence][: len(got)]) <= TOLERANCE


@pytest.mark.parametrize("new_names", [False, True], ids=["transformers-4-names", "transformers-5-names"])
def test_the_text_part_of_a_multimodal_gemma3_agrees(new_names: bool, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = build_gemma3_multimodal()
    save(model, tmp_path)
    if new_names:
        path = tmp_path / "model.safetensors"
        tensors = {name.replace("language_model.model.", ""): value for name, value in load_file(path).items()}
        text = {f"model.language_model.{n}": t for n, t in tensors.items() if not n.startswith(_IMAGE_PARTS)}
        save_file(text | {f"model.{n}": t for n, t in tensors.items() if n.startswith(_IMAGE_PARTS)}, path)
    ids = list(range(3, 53))
    logits = PagedRun(load(tmp_path)).run(0, chunked(ids, [30]))
    assert max_error(logits, reference_logits(model, ids)) <= TOLERANCE
