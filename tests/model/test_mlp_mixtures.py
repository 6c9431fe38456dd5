"""MixLoRA and LLaVA-MoLE against transformers with their own loop in place of each MLP, in one step with the base."""

from pathlib import Path

import pytest
import torch

from tests.kernels.model_adapters import place
from tests.model.mlp_mixtures import (
    LLAVA_MOLE,
    MIXLORA,
    extras_of,
    llava_mole,
    make_experts,
    mixlora,
    source_logits,
)
from tests.model.paged_run import PagedRun, chunked, load
from tests.model.tiny_models import BY_NAME, VOCAB, reference_logits, save

TOLERANCE = 1e-4
IDS = torch.randint(3, VOCAB, (19,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_mixtures_of_mlps_agree_with_their_sources(name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = BY_NAME[name].build()
        decoder = load(save(model, tmp_path))
    mixed, single = make_experts(decoder.spec, 1), make_experts(decoder.spec, 2)
    base = reference_logits(model, IDS)
    expected = [base, source_logits(model, mixed, mixlora, IDS), source_logits(model, single, llava_mole, IDS), base]
    places = {
        1: place(extras_of(mixed, MIXLORA, has_bias=False), 1),
        2: place(extras_of(single, LLAVA_MOLE, has_bias=True), 2),
    }
    run, found = PagedRun(decoder, num_sequences=4), []
    for chunk in chunked(IDS, [7, 9]):
        rows = run.step_placed(dict.fromkeys(range(4), chunk), places)
        found.append(torch.stack([rows[i] for i in range(4)]))
    for sequence, logits in enumerate(torch.cat(found, dim=1)):
        assert (logits - expected[sequence]).abs().max() <= TOLERANCE, sequence
    assert min(float((expected[i] - base).abs().max()) for i in (1, 2)) > 0.1
