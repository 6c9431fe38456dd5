"""Adapters outside the linear layers against PEFT: all kinds in one step, through prefill chunks and decodes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapter_kernels.extras import AdapterExtras
from adapter_kernels.route import Placement
from tests.kernels.model_adapters import place
from tests.model.paged_run import PagedRun, load
from tests.model.peft_model_ops import NUM_VIRTUAL, PeftCase, peft_cases
from tests.model.tiny_models import BY_NAME, VOCAB, reference_logits, save

pytestmark = [
    # PEFT 0.21 reads an attribute that transformers 5 renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT measures layers that have no inputs and outputs
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]

TOLERANCE = 1e-4
FAMILIES = ["llama3", "smollm2-tied", "mistral-window", "gemma2", "gemma3", "granite", "qwen3", "olmo2"]
IDS = torch.randint(3, VOCAB, (25,), generator=torch.Generator().manual_seed(5)).tolist()
# inside the virtual tokens, across their end, inside the prompt; then decodes
CHUNKS = [3, 10, 15, 1, 1, 1, 1, 1, 1, 1, 1]


def chunks_of(case: PeftCase | None) -> list[list[int]]:
    num_virtual = 0 if case is None else case.tensors.num_virtual_tokens
    ids, chunks = [*(-2 - i for i in range(num_virtual)), *IDS], []
    for size in CHUNKS:
        chunks.append(ids[:size])
        ids = ids[size:]
    return [chunk for chunk in chunks if chunk] + [[token] for token in ids]


def run_together(run: PagedRun, cases: list[PeftCase | None]) -> list[Tensor]:
    """Run the prompt once per case, chunk by chunk beside one another; logits [T, V] of the prompt's own tokens."""
    places: dict[int, Placement] = {
        i: place(AdapterExtras({}, case.tensors), i) for i, case in enumerate(cases) if case is not None
    }
    pending = {i: chunks_of(case) for i, case in enumerate(cases)}
    found: dict[int, list[Tensor]] = {i: [] for i in pending}
    while any(pending.values()):
        tokens = {i: chunks.pop(0) for i, chunks in pending.items() if chunks}
        for i, rows in run.step_placed(tokens, places).items():
            found[i].append(rows)
    return [torch.cat(found[i])[-len(IDS) :] for i in range(len(cases))]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_in_one_step_agrees_with_peft(name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = BY_NAME[name].build()
        decoder = load(save(model, tmp_path))
        cases = list(peft_cases(model, decoder.spec, IDS))
    base = reference_logits(model, IDS)
    order: list[PeftCase | None] = [None, *cases, None]
    logits = run_together(PagedRun(decoder, num_sequences=len(order)), order)
    for case, found in zip(order, logits, strict=True):
        expected = base if case is None else case.logits
        assert (found - expected).abs().max() <= TOLERANCE, "base" if case is None else case.name
        assert case is None or (expected - base).abs().max() > 0.05, f"{case.name} does nothing"
    assert {case.tensors.num_virtual_tokens for case in cases} == {0, NUM_VIRTUAL}
