"""The GPU launch plan against the CPU decoder, family by family, in fp32 under Triton's interpreter.

One run per family mixes all that a step can hold: a chunk alone, a decode beside another chunk, decodes alone; rows
without adapter beside adapters of mixed ranks, patterns, biases and partial targets.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapter_kernels import reference
from adapter_kernels.delta import FUSED_SITES, BaseLinear
from adapter_kernels.gpu import paged_decode
from adapter_kernels.image import AdapterImage
from serve.model.checkpoint import Checkpoint
from serve.model.fused_weights import read_fused_weights
from serve.model.spec import ModelSpec, read_spec
from serve.model.weight_names import WeightNames
from serve.model.weight_source import CheckpointWeights, RandomWeights
from tests.kernels.gpu.batches import random_image
from tests.model.fused_run import MAX_STEP_TOKENS, Adapters, FusedRun, load_fused
from tests.model.paged_run import CPU, PagedRun, load
from tests.model.tiny_models import BY_NAME, VOCAB, save

# fp32 sums in another order, through two layers
TOLERANCE = 1e-4

# small enough for the interpreter, and each with what sets the family apart in its two layers
_TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_GEMMA: dict[str, object] = {"head_dim": 16, "sliding_window": 4}
CASES: dict[str, dict[str, object]] = {
    "llama3": {},
    "mistral-window": {"head_dim": 24, "sliding_window": 4},
    "qwen2-tied": {},
    "qwen3": {"head_dim": 24},
    "phi3-window-partial": {"sliding_window": 4},
    "smollm3": {},
    "granite": {},
    "olmo2": {},
    "gemma2": _GEMMA,
    "gemma3": {**_GEMMA, "sliding_window_pattern": 2},
}

# sequence by sequence: adapter slots 0 and 2, no adapter, slot 1
SLOTS = (0, None, 2, 1)
STEPS: tuple[dict[int, list[int]], ...] = (
    {0: [5, 9, 31, 7, 44]},
    # decodes, two of them a sequence's first token, beside a chunk
    {0: [11], 1: [70], 2: [12, 80], 3: [4]},
)


class ReferenceDelta:
    """`AdapterDelta` by the definition: row t has the adapter `images[t]`."""

    model = None

    def __init__(self, images: Sequence[AdapterImage | None], shapes: dict[str, tuple[int, int]]) -> None:
        self._images = images
        self._shapes = shapes

    def apply(self, layer: int, site: str, x: Tensor, base: BaseLinear) -> Tensor:
        return base(x) + reference.fused_delta(x, layer, site, self._images, self._shapes)


def make_images(spec: ModelSpec) -> tuple[AdapterImage, ...]:
    """All sites at mixed ranks with biases; o_proj of one layer alone; a bias without rank, k, up and down without."""
    shapes = {site: spec.dims.site_shape(site) for members in FUSED_SITES.values() for site in members}
    generator = torch.Generator().manual_seed(2)
    every = {(layer, site): 3 + 5 * layer + len(site) % 4 for layer in range(2) for site in shapes}
    patterned = {(0, "q_proj"): 16, (1, "v_proj"): 1, (0, "gate_proj"): 17, (1, "up_proj"): 8, (1, "down_proj"): 20}
    return (
        random_image(shapes, every, generator, biased=frozenset({(0, "q_proj"), (1, "down_proj"), (1, "gate_proj")})),
        random_image(shapes, {(1, "o_proj"): 8}, generator),
        random_image(shapes, patterned, generator, biased=frozenset({(0, "k_proj"), (0, "o_proj")})),
    )


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one program walk all splits of a context: the interpreter pays per program."""
    monkeypatch.setattr(paged_decode, "_TARGET_PROGRAMS", 1)


def save_tiny(name: str, folder: Path, **more: object) -> Path:
    with torch.random.fork_rng():
        return save(BY_NAME[name].build(**{**_TINY, **CASES[name], **more}), folder)


def check_steps(folder: Path, steps: Sequence[dict[int, list[int]]]) -> None:
    """Run the steps on both decoders, sequence i with the adapter of `SLOTS[i]`; adapters must move the logits."""
    decoder, fused = load(folder), load_fused(folder)
    images = make_images(decoder.spec)
    shapes = images[0].shapes
    expected_run = PagedRun(decoder, num_sequences=len(SLOTS))
    base_run = PagedRun(decoder, num_sequences=len(SLOTS))
    run = FusedRun(fused, Adapters.build(fused.spec, images), SLOTS)
    moved = 0.0
    for tokens in steps:
        owners = [None if slot is None else images[slot] for i in tokens for slot in [SLOTS[i]] * len(tokens[i])]
        expected = expected_run.step(tokens, ReferenceDelta(owners, shapes))
        base = base_run.step(tokens)
        got = run.step(tokens)
        for i in tokens:
            assert (got[i] - expected[i]).abs().max() <= TOLERANCE, f"sequence {i}"
            moved = max(moved, (expected[i] - base[i]).abs().max().item())
    assert moved > 0.1


@pytest.mark.parametrize("name", CASES)
def test_the_launch_plan_agrees_with_the_cpu_decoder(name: str, tmp_path: Path) -> None:
    check_steps(save_tiny(name, tmp_path), STEPS)


def test_a_step_whose_rows_are_grouped_by_adapter_agrees_too(tmp_path: Path) -> None:
    prompts = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(4)).tolist()
    check_steps(save_tiny("gemma3", tmp_path), [{2: prompts[0], 0: prompts[1], 3: [7]}])


@pytest.mark.parametrize("name", ["llama3", "olmo2"])
def test_without_adapters_the_launch_plan_agrees_too(name: str, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path, num_attention_heads=4, num_key_value_heads=2)
    expected_run, run = PagedRun(load(folder)), FusedRun(load_fused(folder))
    for tokens in ({0: [5, 9, 31, VOCAB - 1]}, {0: [11], 1: [8, 3]}):
        expected, got = expected_run.step(tokens), run.step(tokens)
        for i in tokens:
            assert (got[i] - expected[i]).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("name", "is_tied"), [("qwen2-tied", True), ("qwen3", False)])
def test_a_tied_head_is_the_token_table_itself(name: str, is_tied: bool, tmp_path: Path) -> None:
    spec = read_spec(save_tiny(name, tmp_path))
    checkpoint = Checkpoint.open(tmp_path)
    from_files = CheckpointWeights(spec, checkpoint, WeightNames.find(spec, checkpoint), torch.float32, CPU)
    for source in (from_files, RandomWeights(spec, torch.float32, CPU, torch.Generator())):
        weights = read_fused_weights(source)
        assert (weights.lm_head is weights.embedding) == is_tied
        assert weights.lm_head.shape == (VOCAB, spec.dims.hidden_size)


def test_a_step_larger_than_the_buffers_is_refused(tmp_path: Path) -> None:
    run = FusedRun(load_fused(save_tiny("qwen3", tmp_path)))
    with pytest.raises(AssertionError, match="33 rows in buffers of 32"):
        run.step({0: [5] * (MAX_STEP_TOKENS // 2), 1: [6] * (MAX_STEP_TOKENS // 2 + 1)})
