"""Adapters at all seven sites against PEFT: by plain loops, which proves the wiring, and by the real CPU path."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapter_kernels.delta import AdapterDelta, BaseLinear
from adapters_store.base import BaseDims
from tests.model.paged_run import PagedRun, load
from tests.model.peft_adapters import Sites, SlowDelta, add_lora, cpu_delta, read_sites
from tests.model.tiny_models import BY_NAME, VOCAB, reference_logits, save

pytestmark = [
    # PEFT 0.21 reads an attribute that transformers 5 renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]

TOLERANCE = 1e-4
FAMILIES = ["llama3", "phi3-window-partial", "gemma2", "gemma3", "olmo2", "qwen3", "qwen2-tied", "granite", "smollm3"]

MakeDelta = Callable[[Sites, BaseDims, list[int], list[bool]], AdapterDelta]


def slow_delta(sites: Sites, dims: BaseDims, counts: list[int], has_adapter: list[bool]) -> AdapterDelta:
    rows = [has for count, has in zip(counts, has_adapter, strict=True) for _ in range(count)]
    return SlowDelta(sites, dims, rows)


@pytest.mark.parametrize("make_delta", [slow_delta, cpu_delta], ids=["loops", "cpu"])
@pytest.mark.parametrize("name", FAMILIES)
def test_deltas_at_all_sites_agree_with_peft(name: str, make_delta: MakeDelta, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = BY_NAME[name].build()
        decoder = load(save(model, tmp_path))
        ids = torch.randint(3, VOCAB, (25,), generator=torch.Generator().manual_seed(5)).tolist()
        base = reference_logits(model, ids)
        adapted = add_lora(model, rank=3, seed=1, bias=name != "gemma2", fused=name.startswith("phi3"))
    expected = reference_logits(adapted, ids)
    assert (expected - base).abs().max() > 0.1
    dims = decoder.spec.dims
    sites = read_sites(adapted, dims)
    assert len(sites) == 7 * dims.num_hidden_layers
    # prefill then decodes, next to the same tokens without the adapter
    run = PagedRun(decoder)
    logits: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for chunk in [ids[:20], *[[token] for token in ids[20:]]]:
        delta = make_delta(sites, dims, [len(chunk)] * 2, [False, True])
        for sequence, rows in run.step({0: chunk, 1: chunk}, delta).items():
            logits[sequence].append(rows)
    assert (torch.cat(logits[0]) - base).abs().max() <= TOLERANCE
    assert (torch.cat(logits[1]) - expected).abs().max() <= TOLERANCE


def test_without_adapters_the_linear_runs_alone(tmp_path: Path) -> None:
    decoder = load(save(BY_NAME["llama2"].build(), tmp_path))
    ids = list(range(3, 20))
    alone = PagedRun(decoder).step({0: ids})[0]

    class Silent:
        calls = 0
        model = None

        def apply(self, layer: int, site: str, x: torch.Tensor, base: BaseLinear) -> torch.Tensor:
            y = base(x)
            assert y.is_contiguous() and y.data_ptr() != x.data_ptr()
            self.calls += 1
            return y

    silent = Silent()
    assert torch.equal(PagedRun(decoder).step({0: ids}, silent)[0], alone)
    assert silent.calls == 4 * decoder.spec.dims.num_hidden_layers
