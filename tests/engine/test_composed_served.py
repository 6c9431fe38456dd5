"""Composed requests through the whole engine: against transformers with slow hooks, and alone as beside others.

Owns the slow reference: every module of the base computes its output, and each adapter of the composition its own;
the weighted sum of the differences is added in fp32. It knows no batches, passes or slabs.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapter_kernels.extras import AdapterExtras
from adapter_kernels.model_image import EmbedLowrank, HeadSite, ModelTensors, TokenRows
from adapter_kernels.rare_image import read_rare
from adapter_kernels.reference import site_output
from adapters_store.base import SITE_PATHS, SITES, read_base_dims
from adapters_store.blobs import open_image
from adapters_store.store import OpenAdapter
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.executor import TorchExecutor
from serve.engine.limits import EngineLimits
from serve.engine.model_parts import load_parts
from serve.messages import Embed, Embedded, Event, Failed, SamplingParams, Started, Submit, TokenLogprobs, Tokens
from tests.engine.arena_adapters import Images
from tests.engine.stored_model_ops import store_adapter
from tests.engine.test_mixed_families import FAMILIES, adapter, everywhere
from tests.kernels.random_adapters import Ops
from tests.model.mlp_mixtures import (
    LLAVA_MOLE,
    MIXLORA,
    Experts,
    Forward,
    extras_of,
    llava_mole,
    make_experts,
    mixlora,
)
from tests.model.tiny_models import BY_NAME, VOCAB, reference_logits, save

Composition = tuple[tuple[str, float], ...]

TOLERANCE = 1e-4
IDS = torch.randint(3, VOCAB, (21,), generator=torch.Generator().manual_seed(5)).tolist()
RARE = {
    (0, "q_proj"): Ops((2,), csr=60),
    (1, "o_proj"): Ops(blockdiag=4),
    (2, "v_proj"): Ops(rot2_group=4, out_scale=True),
    (2, "down_proj"): Ops(dense=True),
}
LLAVA_MOLES = ("llava-mole", "llava-mole too")
COMPOSITIONS: dict[str, Composition] = {
    "one": (("lora", -1.5),),
    "two": (("lora", 0.75), ("s2ft", 1.25)),
    "scaled": (("dora", 0.5), ("ia3", -0.75), ("lora-bias", 1.0)),
    "mixtures": (("meteora", 0.5), ("meteora-unequal", -0.25), ("s2ft-down", 2.0), ("dora", 0.25)),
    "rare": (("rare", 0.5), ("lora", 0.5)),
    "outside": (("outside", 0.5), ("outside too", -0.25), ("lora", 0.5)),
    "gated": (("mixlora", 0.5), ("llava-mole", -0.75), ("lora", 0.5), ("outside", 0.25)),
    "gated twice": (("llava-mole", 0.5), ("llava-mole too", 1.0)),
    "slices": (("s2ft", 1.0), ("s2ft-down", 1.0)),
}


def outside(seed: int, hidden_size: int) -> ModelTensors:
    """Random norms, token rows, embeddings and head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    rows = TokenRows(torch.randperm(VOCAB, generator=generator)[:20].sort().values, normal(20, hidden_size))
    return ModelTensors(
        norms={(seed % 3, "input_layernorm"): normal(hidden_size) + 1.0, (-1, "norm"): normal(hidden_size) + 1.0},
        embed_rows=rows,
        head_rows=rows if seed % 2 else None,
        embed_lowrank=EmbedLowrank(normal(VOCAB, 3), normal(3, hidden_size)),
        head=HeadSite(normal(2, hidden_size), normal(2, VOCAB), normal(VOCAB)),
    )


class Served:
    """A base, adapters of every kind, and the engine's way to open them."""

    def __init__(self, root: Path) -> None:
        with torch.random.fork_rng():
            # transformers tells no types of its modules
            self.model: Any = BY_NAME["llama3"].build()
        folder = save(self.model, root / "base")
        config = EngineConfig(model_dir=folder, store_dir=root, dtype="float32", num_kv_blocks=128, block_size=4)
        self.parts = load_parts(config)
        shapes = self.parts.shapes
        kinds = {**FAMILIES, "rare": RARE, "everywhere": everywhere(Ops((2,)))}
        self.images = {name: adapter(seed, ops, shapes) for seed, (name, ops) in enumerate(kinds.items())}
        self.outside = {
            name: outside(seed, self.parts.spec.dims.hidden_size)
            for seed, name in enumerate(("outside", "outside too"))
        }
        (root / "objects").mkdir()
        base = read_base_dims(folder)
        self.digests = {name: name.ljust(64, "0") for name in self.images}
        self.digests |= {name: store_adapter(root, AdapterExtras({}, own), base) for name, own in self.outside.items()}
        self.gated: dict[str, tuple[Forward, list[Experts]]] = {}
        gated = (("mixlora", MIXLORA, mixlora), *((name, LLAVA_MOLE, llava_mole) for name in LLAVA_MOLES))
        for name, row, forward in gated:
            experts = make_experts(self.parts.spec, len(self.gated))
            self.gated[name] = (forward, experts)
            self.digests[name] = store_adapter(root, extras_of(experts, row, has_bias=row is LLAVA_MOLE), base)
        self._images = Images({self.digests[name]: image for name, image in self.images.items()})
        self._stored = partial(open_image, root / "objects")

    def open(self, digest: str) -> OpenAdapter:
        """Open an adapter by its digest."""
        return self._images.open(digest) if digest in self._images.images else self._stored(digest)

    def submit(self, request_id: str, composition: Composition) -> Submit:
        """Ask for five greedy tokens and the prompt's log-probabilities."""
        params = SamplingParams(5, 0, temperature=0.0, ignore_eos=True, num_logprobs=2, num_prompt_logprobs=2)
        return Submit(request_id, IDS, params, adapters=self.named(composition))

    def named(self, composition: Composition) -> Composition:
        """Replace names by digests."""
        return tuple((self.digests[name], weight) for name, weight in composition)


class Slow:
    """The base under transformers with one composition hooked into every module."""

    def __init__(self, served: Served, composition: Composition, active_from: int = 0) -> None:
        self._model = served.model
        self._active_from = active_from
        self._sites = [(served.images[name], weight) for name, weight in composition if name in served.images]
        self._outside = [(served.outside[name], weight) for name, weight in composition if name in served.outside]
        self._gated = [(served.gated[name], weight) for name, weight in composition if name in served.gated]

    def logits(self, token_ids: list[int]) -> Tensor:
        """Run a whole sequence: [T, V]."""
        inner = self._model.model
        places: list[tuple[Any, Any]] = [
            (inner.embed_tokens, self._embed),
            (self._model.lm_head, self._head),
            (inner.norm, partial(self._norm, -1, "norm")),
        ]
        for index, layer in enumerate(inner.layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                places.append((getattr(layer, name), partial(self._norm, index, name)))
            places.append((layer.mlp, partial(self._mlp, index)))
            for site in SITES:
                places.append((layer.get_submodule(SITE_PATHS[site]), partial(self._site, index, site)))
        handles = [module.register_forward_hook(hook) for module, hook in places]
        try:
            return reference_logits(self._model, token_ids)
        finally:
            for handle in handles:
                handle.remove()

    def _mlp(self, layer: int, module: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        total = y.clone()
        for (forward, experts), weight in self._gated:
            own = torch.stack([forward(module, experts[layer], x) for x in inputs[0][0]])
            total += weight * (own[None] - y)
        return total

    def _site(self, layer: int, site: str, module: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        x, shape = inputs[0].reshape(-1, inputs[0].shape[-1]), y.shape
        y = y.reshape(-1, shape[-1])
        total = y.clone()
        for image, weight in self._sites:
            for rows in image.rows:
                if (rows.layer, rows.site) == (layer, site):
                    rare = read_rare(image, rows, torch.float32)
                    own = site_output(x, module.weight, module.bias, image.site(rows), rare)
                    total[self._active_from :] += weight * (own - y)[self._active_from :]
        return total.view(shape)

    def _norm(self, layer: int, name: str, module: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        x, total = inputs[0], y.clone()
        for own, weight in self._outside:
            if (layer, name) in own.norms:
                scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
                total += weight * (scaled * own.norms[layer, name] - y)
        return total

    def _embed(self, module: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        total = y.clone()
        for own, weight in self._outside:
            table = module.weight.clone()
            assert own.embed_rows is not None and own.embed_lowrank is not None
            table[own.embed_rows.idx] = own.embed_rows.e
            total += weight * ((table + own.embed_lowrank.at @ own.embed_lowrank.bt)[inputs[0]] - y)
        return total

    def _head(self, module: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        total = y.clone()
        for own, weight in self._outside:
            table = module.weight.clone()
            if own.head_rows is not None:
                table[own.head_rows.idx] = own.head_rows.e
            assert own.head is not None and own.head.bias is not None
            logits = inputs[0] @ (table + (own.head.a.T @ own.head.bt).T).T + own.head.bias
            total += weight * (logits - y)
        return total


class Run:
    """One engine over the executor, and what its requests got."""

    def __init__(self, served: Served, max_step_tokens: int = 64) -> None:
        limits = EngineLimits(128, 4, 128, 16, max_step_tokens, 32, 1 << 30, 16, ())
        self._executor = TorchExecutor(served.parts, served.open)
        self._engine = Engine(limits, self._executor, lambda: 0.0)
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.vectors: dict[str, list[float]] = {}

    def run(self, *commands: Submit | Embed) -> "Run":
        """Handle the commands together, step until all have ended, and close."""
        try:
            for command in commands:
                self._engine.handle(command)
            while self._engine.has_work():
                for event in self._engine.step():
                    self._take(event)
                self._engine.check_invariants()
        finally:
            self._executor.close()
        return self

    def _take(self, event: Event) -> None:
        match event:
            case Failed():
                raise AssertionError(event.message)
            case Started():
                self.logprobs[event.request_id] = list(event.prompt_logprobs or [])
            case Tokens():
                self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
                self.logprobs[event.request_id] += event.logprobs or []
            case Embedded():
                self.vectors[event.request_id] = event.vector
            case _:
                pass


def check(run: Run, name: str, expected: Tensor) -> None:
    """Compare every log-probability; greedy to the end, each token must be the slow one's choice."""
    assert run.tokens[name] == expected[len(IDS) - 1 :].argmax(-1).tolist()
    assert len(run.logprobs[name]) == expected.shape[0]
    for position, logprobs in enumerate(run.logprobs[name]):
        wanted = float(expected[position, logprobs.token_id])
        assert logprobs.logprob == pytest.approx(wanted, abs=TOLERANCE * max(1.0, abs(wanted))), position


def gap(first: list[TokenLogprobs], second: list[TokenLogprobs]) -> float:
    """Return how far two requests' log-probabilities lie apart; a batch of another shape may round otherwise."""
    return max(abs(a.logprob - b.logprob) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield Served(tmp_path_factory.mktemp("composed"))


@pytest.fixture(scope="module")
def together(served: Served) -> Run:
    """All compositions at once, chunked, beside single adapters and the base."""
    commands = [served.submit(name, composition) for name, composition in COMPOSITIONS.items()]
    commands += [served.submit("base", ()), served.submit("plain", (("everywhere", 1.0),))]
    commands.append(served.submit("weight zero", (("lora", 0.0), ("outside", 0.0))))
    return Run(served, max_step_tokens=37).run(*commands)


@pytest.mark.parametrize("name", [*COMPOSITIONS, "base", "plain"])
def test_composed_requests_agree_with_a_slow_weighted_sum(served: Served, together: Run, name: str) -> None:
    composition = COMPOSITIONS.get(name, (("everywhere", 1.0),) if name == "plain" else ())
    ids = [*IDS, *together.tokens[name][:-1]]
    expected = Slow(served, composition).logits(ids).log_softmax(-1)
    check(together, name, expected)


def test_each_composition_says_something_else(together: Run) -> None:
    names = [*COMPOSITIONS, "base", "plain"]
    assert len({tuple(together.tokens[name]) for name in names}) > len(names) - 3


def test_weight_zero_is_the_base(served: Served, together: Run) -> None:
    assert together.tokens["weight zero"] == together.tokens["base"]
    names = ("base", "zero")
    runs = [Run(served).run(served.submit(name, (("lora", 0.0),) if name == "zero" else ())) for name in names]
    # to the bit, in steps of equal shape
    assert runs[0].logprobs["base"] == runs[1].logprobs["zero"]


@pytest.mark.parametrize("name", ["two", "mixtures", "outside"])
def test_a_composed_request_gets_alone_what_it_gets_beside_others(served: Served, together: Run, name: str) -> None:
    alone = Run(served).run(served.submit(name, COMPOSITIONS[name]))
    assert alone.tokens[name] == together.tokens[name]
    assert gap(alone.logprobs[name], together.logprobs[name]) <= TOLERANCE


def test_an_embedding_is_composed_too(served: Served) -> None:
    composition = COMPOSITIONS["outside"]
    command = Embed("e", IDS, "last", adapters=served.named(composition))
    vector = torch.tensor(Run(served).run(command).vectors["e"])
    seen: list[Tensor] = []
    handle = served.model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0, -1]))
    try:
        Slow(served, composition).logits(IDS)
    finally:
        handle.remove()
    assert float((vector - seen[0]).abs().max()) <= TOLERANCE * float(seen[0].abs().max())


def test_an_adapter_that_acts_later_leaves_the_prompts_begin_to_the_base(served: Served) -> None:
    params = SamplingParams(5, 0, temperature=0.0, ignore_eos=True, num_logprobs=2, num_prompt_logprobs=2)
    late = Submit("late", IDS, params, served.digests["lora"], active_from=9)
    run = Run(served, max_step_tokens=12).run(late, served.submit("base", ()), served.submit("plain", (("lora", 1.0),)))
    check(run, "late", Slow(served, (("lora", 1.0),), 9).logits([*IDS, *run.tokens["late"][:-1]]).log_softmax(-1))
    assert gap(run.logprobs["late"][:9], run.logprobs["base"][:9]) <= TOLERANCE
    assert gap(run.logprobs["late"][9:20], run.logprobs["plain"][9:20]) > 0.01
