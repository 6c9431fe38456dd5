"""Adapters outside the linear layers, from canonical files through the whole engine: against PEFT, and run alone."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapter_kernels.extras import AdapterExtras
from adapters_store.base import read_base_dims
from adapters_store.blobs import open_image
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.executor import TorchExecutor
from serve.engine.limits import EngineLimits
from serve.engine.model_parts import load_parts
from serve.messages import Embed, Embedded, Event, Failed, SamplingParams, Started, Submit, TokenLogprobs, Tokens
from tests.engine.stored_model_ops import store_adapter
from tests.model.mlp_mixtures import LLAVA_MOLE, MIXLORA, extras_of, llava_mole, make_experts, mixlora, source_logits
from tests.model.peft_model_ops import peft_cases
from tests.model.tiny_models import BY_NAME, VOCAB, reference_logits, save

pytestmark = [
    # PEFT 0.21 reads an attribute that transformers 5 renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT measures layers that have no inputs and outputs
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]

TOLERANCE = 1e-4
IDS = torch.randint(3, VOCAB, (25,), generator=torch.Generator().manual_seed(5)).tolist()
NUM_KV_BLOCKS, BLOCK_SIZE = 256, 4
MIXTURES = (("mixlora", MIXLORA, mixlora), ("llava-mole", LLAVA_MOLE, llava_mole))


class Served:
    """A model, its adapters in canonical files, and the logits that their sources give."""

    def __init__(self, root: Path) -> None:
        with torch.random.fork_rng():
            model = BY_NAME["qwen3"].build()
            folder = save(model, root / "base")
            base = read_base_dims(folder)
            (root / "objects").mkdir()
            config = EngineConfig(
                model_dir=folder,
                store_dir=root,
                dtype="float32",
                num_kv_blocks=NUM_KV_BLOCKS,
                block_size=BLOCK_SIZE,
            )
            self.parts = load_parts(config)
            cases = list(peft_cases(model, self.parts.spec, IDS))
            self.logits: dict[str, Tensor] = {case.name: case.logits for case in cases}
            self.logits["base"] = reference_logits(model, IDS)
            extras = {case.name: AdapterExtras({}, case.tensors) for case in cases}
            for seed, (name, row, forward) in enumerate(MIXTURES):
                experts = make_experts(self.parts.spec, seed)
                self.logits[name] = source_logits(model, experts, forward, IDS)
                extras[name] = extras_of(experts, row, has_bias=row is LLAVA_MOLE)
        self.num_virtual = {name: own.model.num_virtual_tokens for name, own in extras.items() if own.model}
        self.digests = {name: store_adapter(root, own, base) for name, own in extras.items()}
        self.open_image = partial(open_image, root / "objects")

    def submit(self, name: str, request_id: str, *, asks_prompt: bool = True, ids: list[int] = IDS) -> Submit:
        """Ask for four greedy tokens, and for the prompt's log-probabilities."""
        sampling = SamplingParams(
            max_tokens=4,
            seed=0,
            temperature=0.0,
            ignore_eos=True,
            num_logprobs=2,
            num_prompt_logprobs=2 if asks_prompt else None,
        )
        digest = self.digests.get(name)
        return Submit(request_id, ids, sampling, digest, num_virtual_tokens=self.num_virtual.get(name, 0))


class Run:
    """One engine over the executor, and what its requests got."""

    def __init__(self, served: Served, max_step_tokens: int) -> None:
        limits = EngineLimits(
            num_kv_blocks=NUM_KV_BLOCKS,
            block_size=BLOCK_SIZE,
            max_model_len=128,
            max_num_seqs=16,
            max_step_tokens=max_step_tokens,
            max_waiting=32,
            adapter_device_bytes=1 << 30,
            num_adapter_slots=16,
            eos_token_ids=(),
        )
        self._executor = TorchExecutor(served.parts, served.open_image)
        self.engine = Engine(limits, self._executor, lambda: 0.0)
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.started: dict[str, Started] = {}
        self.vectors: dict[str, list[float]] = {}

    def run(self, *commands: Submit | Embed) -> "Run":
        """Handle the commands together and step until all have ended."""
        for command in commands:
            self.engine.handle(command)
        while self.engine.has_work():
            for event in self.engine.step():
                self._take(event)
            self.engine.check_invariants()
        return self

    def close(self) -> None:
        """Stop the loader thread."""
        self._executor.close()

    def _take(self, event: Event) -> None:
        match event:
            case Started():
                self.started[event.request_id] = event
            case Tokens():
                self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
                self.logprobs.setdefault(event.request_id, []).extend(event.logprobs or [])
            case Embedded():
                self.vectors[event.request_id] = event.vector
            case Failed():
                raise AssertionError(event.message)
            case _:
                pass


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("model-ops"))


@pytest.fixture
def start(served: Served) -> Iterator[Callable[[int], Run]]:
    """Make an engine with so many tokens per step; its loader ends with the test."""
    runs: list[Run] = []

    def make(max_step_tokens: int) -> Run:
        runs.append(Run(served, max_step_tokens))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


Start = Callable[[int], Run]


@pytest.mark.parametrize("max_step_tokens", [29, 512], ids=["in chunks", "all at once"])
def test_every_kind_beside_the_others_agrees_with_its_source(
    served: Served, start: Start, max_step_tokens: int
) -> None:
    names = ["base", *served.digests, "base"]
    run = start(max_step_tokens).run(*(served.submit(name, f"{i}-{name}") for i, name in enumerate(names)))
    for i, name in enumerate(names):
        found, expected = run.started[f"{i}-{name}"].prompt_logprobs, served.logits[name].log_softmax(-1)
        assert found is not None and len(found) == len(IDS) - 1
        for position, logprobs in enumerate(found):
            assert logprobs.token_id == IDS[position + 1]
            assert logprobs.logprob == pytest.approx(float(expected[position, logprobs.token_id]), abs=TOLERANCE), name
            assert logprobs.top_logprobs == pytest.approx(expected[position].topk(2).values.tolist(), abs=TOLERANCE)
        first = run.logprobs[f"{i}-{name}"][0]
        assert first.token_id == int(expected[-1].argmax())
        assert first.top_logprobs == pytest.approx(expected[-1].topk(2).values.tolist(), abs=TOLERANCE), name


def test_each_alone_gives_the_tokens_of_the_mixed_run(served: Served, start: Start) -> None:
    names = ["base", *served.digests]
    mixed = start(17).run(*(served.submit(name, name, asks_prompt=False) for name in names))
    for name in names:
        assert start(128).run(served.submit(name, name, asks_prompt=False)).tokens[name] == mixed.tokens[name], name
    assert len({tuple(tokens) for tokens in mixed.tokens.values()}) > 3


@pytest.mark.parametrize("name", ["prompt", "prefix", "norms"])
def test_a_cached_prefix_serves_its_own_adapter_only(served: Served, start: Start, name: str) -> None:
    run = start(64)
    for request_id, of in (("first", name), ("base", "base"), ("again", name), ("base again", "base")):
        run.run(served.submit(of, request_id, asks_prompt=False))
    length = len(IDS) + served.num_virtual[name]
    assert [run.started[i].num_cached_tokens for i in ("first", "base")] == [0, 0]
    # positions of the adapter's own prompt are hits that no client is told of
    hits = (length - 1) // BLOCK_SIZE * BLOCK_SIZE - served.num_virtual[name]
    assert run.started["again"].num_cached_tokens == hits
    assert run.tokens["again"] == run.tokens["first"] and run.tokens["base again"] == run.tokens["base"]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_pools_the_requests_own_tokens(served: Served, start: Start, pooling: str) -> None:
    names = ["base", "prompt", "prefix"]
    commands = [
        Embed(name, IDS, pooling, served.digests.get(name), num_virtual_tokens=served.num_virtual.get(name, 0))
        for name in names
    ]
    whole, pieces = start(128).run(*commands).vectors, start(9).run(*commands).vectors
    for name in names:
        assert pieces[name] == pytest.approx(whole[name], abs=1e-4)
        # the head is linear here: it takes the mean of hidden states to the mean of logits
        logits = served.logits[name].mean(0) if pooling == "mean" else served.logits[name][-1]
        found = served.parts.decoder.logits(torch.tensor([whole[name]]))[0]
        assert (found - logits).abs().max() <= TOLERANCE, name
