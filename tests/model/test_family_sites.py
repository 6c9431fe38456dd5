"""S2FT, scales and mixtures through the whole decoder against transformers with merged weights, or with plain loops."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adapter_kernels.cpu import CpuDelta
from adapter_kernels.image import AdapterImage, SiteTensors
from adapter_kernels.profile import Profile
from adapter_kernels.route import Placement, build_route
from adapter_kernels.slab import Slab
from adapters_store.base import SITES
from serve.model.decoder import Decoder
from tests.kernels.random_adapters import Ops, Place, random_adapter
from tests.model.paged_run import PagedRun, load
from tests.model.tiny_models import BY_NAME, VOCAB, reference_logits, save

TOLERANCE = 1e-4
IDS = torch.randint(3, VOCAB, (25,), generator=torch.Generator().manual_seed(5)).tolist()
# grouped query attention with biases everywhere; as many keys as queries; norms of q and k
FAMILIES = ["llama3", "llama2", "qwen3"]

# other numbers in each layer, the middle one empty, and some sites of the others
S2FT: dict[Place, Ops] = {
    (0, "v_proj"): Ops(rows=7),
    (0, "o_proj"): Ops(cols=16),
    (0, "down_proj"): Ops(cols=22),
    (2, "up_proj"): Ops(rows=1),
    (2, "down_proj"): Ops(cols=5),
}
SCALED: dict[Place, Ops] = {
    **{(layer, site): Ops((2,), out_scale=True) for layer in range(2) for site in SITES},
    **{(2, site): Ops(in_scale=True, bias=True) for site in ("k_proj", "o_proj", "up_proj", "down_proj")},
}


def mixtures(ranks: tuple[int, ...], top_k: int, temperature: float) -> dict[Place, Ops]:
    return {(layer, site): Ops(ranks, top_k=top_k, temperature=temperature) for layer in range(3) for site in SITES}


class Tiny:
    """A tiny model in both forms, and adapters for it."""

    def __init__(self, name: str, folder: Path) -> None:
        with torch.random.fork_rng():
            self.model = BY_NAME[name].build()
            self.decoder: Decoder = load(save(self.model, folder))
        self.base = reference_logits(self.model, IDS)
        self.shapes = {site: self.decoder.spec.dims.site_shape(site) for site in SITES}

    def adapter(self, ops: dict[Place, Ops]) -> AdapterImage:
        """Random weights, a tenth as large as the base's, so that logits stay of healthy size."""
        image = random_adapter(ops, torch.Generator().manual_seed(1), shapes=self.shapes)
        for rows in image.rows:
            site = image.site(rows)
            for tensor in (site.a, site.bt, *(s.d for s in (site.cols, site.rows) if s is not None)):
                tensor.mul_(0.1)
        return image

    def linear(self, layer: int, site: str) -> nn.Linear:
        """transformers' module of a site."""
        block = "mlp" if site in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        module = self.model.get_submodule(f"model.layers.{layer}.{block}.{site}")
        assert isinstance(module, nn.Linear)
        return module

    def serve(self, image: AdapterImage) -> Tensor:
        """Prefill and decodes beside the same tokens without adapter, which must keep the base's logits."""
        slab = Slab(Profile.of(image), self.shapes, torch.float32)
        slab.write(5, image)
        run = PagedRun(self.decoder)
        logits: dict[int, list[Tensor]] = {0: [], 1: []}
        for chunk in [IDS[:20], *[[token] for token in IDS[20:]]]:
            delta = CpuDelta(build_route([None, Placement(0, slab, 5)], [len(chunk)] * 2))
            for sequence, rows in run.step({0: chunk, 1: chunk}, delta).items():
                logits[sequence].append(rows)
        assert (torch.cat(logits[0]) - self.base).abs().max() <= TOLERANCE
        return torch.cat(logits[1])


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tiny]:
    yield Tiny(request.param, tmp_path)


def merged(weight: Tensor, site: SiteTensors) -> Tensor:
    """W with everything that is linear in it, by single columns and rows."""
    weight = weight.clone()
    if site.in_scale is not None:
        weight = weight * site.in_scale[None, :]
    if site.out_scale is not None:
        weight = weight * site.out_scale[:, None]
    if site.cols is not None:
        for j, channel in enumerate(site.cols.idx.tolist()):
            weight[:, channel] += site.cols.d[j]
    if site.rows is not None:
        for j, channel in enumerate(site.rows.idx.tolist()):
            weight[channel] += site.rows.d[j]
    return weight + site.bt.T @ site.a


@pytest.mark.parametrize("ops", [S2FT, SCALED], ids=["s2ft", "scales"])
def test_the_decoder_agrees_with_merged_weights(ops: dict[Place, Ops], tiny: Tiny) -> None:
    image = tiny.adapter(ops)
    for rows in image.rows:
        module, site = tiny.linear(rows.layer, rows.site), image.site(rows)
        with torch.no_grad():
            module.weight.copy_(merged(module.weight, site))
        if site.bias is not None:
            bias = site.bias if module.bias is None else module.bias.detach() + site.bias
            module.bias = nn.Parameter(bias)
    expected = reference_logits(tiny.model, IDS)
    assert (expected - tiny.base).abs().max() > 0.1
    assert (tiny.serve(image) - expected).abs().max() <= TOLERANCE


class MixtureLoop:
    """A forward hook that adds a mixture token by token, expert by expert, in double precision."""

    def __init__(self, site: SiteTensors) -> None:
        assert site.gate is not None
        self._gate = site.gate
        self._a = torch.split(site.a.double(), list(site.gate.ranks))
        self._bt = torch.split(site.bt.double(), list(site.gate.ranks))

    def __call__(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        output = output.clone()
        for token, x in enumerate(inputs[0][0].double()):
            logits = self._gate.weight.double() @ x
            values, chosen = logits.topk(self._gate.top_k)
            for expert, weight in zip(chosen.tolist(), (values / self._gate.temperature).softmax(0), strict=True):
                delta = weight * (self._a[expert] @ x) @ self._bt[expert]
                output[0, token] += delta.float()
        return output


@pytest.mark.parametrize(
    "ops",
    [mixtures((2, 2, 2, 2, 2, 2), 1, 1.0), mixtures((2,) * 6, 2, 0.5), mixtures((1, 4, 2), 2, 3.0)],
    ids=["top 1", "top 2", "unequal ranks"],
)
def test_the_decoder_agrees_with_a_loop_over_tokens_and_experts(ops: dict[Place, Ops], tiny: Tiny) -> None:
    image = tiny.adapter(ops)
    for rows in image.rows:
        tiny.linear(rows.layer, rows.site).register_forward_hook(MixtureLoop(image.site(rows)))
    expected = reference_logits(tiny.model, IDS)
    assert (expected - tiny.base).abs().max() > 0.1
    assert (tiny.serve(image) - expected).abs().max() <= TOLERANCE
