"""Every family in one batch of the executor: each request's tokens are those of its run alone."""

import random
import time
from collections.abc import Iterator

import pytest
import torch

from adapter_kernels.image import AdapterImage
from adapters_store.base import SITES
from serve.config import EngineConfig
from serve.engine.executor import TorchExecutor
from serve.engine.model_parts import load_parts
from serve.engine.plan import Row, SampleSpec, StepPlan
from serve.messages import SamplingParams
from tests.engine.arena_adapters import Images
from tests.kernels.random_adapters import Ops, Place, random_adapter
from tests.model.tiny_models import BY_NAME, VOCAB, save

NUM_REQUESTS = 64
NUM_NEW_TOKENS = 6
BLOCKS_PER_REQUEST = 3
GREEDY = SamplingParams(max_tokens=NUM_NEW_TOKENS, seed=0, temperature=0.0)


def everywhere(ops: Ops) -> dict[Place, Ops]:
    return {(layer, site): ops for layer in range(3) for site in SITES}


FAMILIES: dict[str, dict[Place, Ops]] = {
    "meteora": everywhere(Ops((2,) * 9, top_k=2)),
    "meteora-unequal": everywhere(Ops((1, 4, 2), top_k=2, temperature=0.5)),
    "lora": everywhere(Ops((8,))),
    "lora-bias": everywhere(Ops((3,), bias=True)),
    "s2ft": {
        (0, "v_proj"): Ops(rows=7),
        (0, "o_proj"): Ops(cols=16),
        (0, "down_proj"): Ops(cols=22),
        (2, "up_proj"): Ops(rows=20),
        (2, "down_proj"): Ops(cols=21),
    },
    "s2ft-down": {(layer, "down_proj"): Ops(cols=20 + layer) for layer in range(3)},
    "dora": everywhere(Ops((4,), out_scale=True)),
    "ia3": {
        (layer, site): Ops(in_scale=site == "down_proj", out_scale=site != "down_proj")
        for layer in range(3)
        for site in ("k_proj", "v_proj", "down_proj")
    },
}


class Request:
    """One sequence that is run greedily."""

    def __init__(self, index: int, prompt: list[int], slot: int | None, first_step: int) -> None:
        self.index = index
        self.prompt = prompt
        self.slot = slot
        self.first_step = first_step

    def row(self, tokens: list[int]) -> Row:
        """What it runs next, after it got `tokens`: the prompt, then single tokens."""
        ids = self.prompt if not tokens else tokens[-1:]
        start = 0 if not tokens else len(self.prompt) + len(tokens) - 1
        blocks = [self.index * BLOCKS_PER_REQUEST + i for i in range(BLOCKS_PER_REQUEST)]
        sample = SampleSpec(GREEDY, self.prompt, list(tokens))
        return Row(f"request-{self.index}", ids, start, blocks, self.slot, sample)


def run(executor: TorchExecutor, requests: list[Request]) -> dict[int, list[int]]:
    """Run requests together, each from its own first step on: prefills beside decodes."""
    tokens: dict[int, list[int]] = {request.index: [] for request in requests}
    for step in range(min(r.first_step for r in requests), max(r.first_step for r in requests) + NUM_NEW_TOKENS):
        active = [r for r in requests if r.first_step <= step < r.first_step + NUM_NEW_TOKENS]
        digests = {request.slot: str(request.slot) for request in active if request.slot is not None}
        rows = [request.row(tokens[request.index]) for request in active]
        if rows:
            for request, result in zip(active, executor.execute(StepPlan(rows, digests)), strict=True):
                assert result.token_id is not None and result.is_finite
                tokens[request.index].append(result.token_id)
    return tokens


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchExecutor]:
    folder = tmp_path_factory.mktemp("families")
    with torch.random.fork_rng():
        base = save(BY_NAME["llama3"].build(), folder / "base")
    config = EngineConfig(
        model_dir=base, store_dir=folder, dtype="float32", num_kv_blocks=NUM_REQUESTS * BLOCKS_PER_REQUEST
    )
    parts = load_parts(config)
    images = {name: adapter(seed, ops, parts.shapes) for seed, (name, ops) in enumerate(FAMILIES.items())}
    executor = TorchExecutor(parts, Images(images).open)
    for slot, name in enumerate(FAMILIES):
        executor.start_load(name, slot)
    loaded = 0
    deadline = time.monotonic() + 120
    while loaded < len(FAMILIES) and time.monotonic() < deadline:
        for result in executor.poll_loads():
            assert result.error is None, result.error
            loaded += 1
        time.sleep(0.001)
    assert loaded == len(FAMILIES)
    yield executor
    executor.close()


def adapter(seed: int, ops: dict[Place, Ops], shapes: dict[str, tuple[int, int]]) -> AdapterImage:
    """Random weights, about a third of the base's."""
    image = random_adapter(ops, torch.Generator().manual_seed(seed), shapes=shapes)
    for rows in image.rows:
        site = image.site(rows)
        for tensor in (site.a, site.bt, *(s.d for s in (site.cols, site.rows) if s is not None)):
            tensor.mul_(0.2)
    return image


def test_64_requests_of_all_families_get_the_tokens_they_get_alone(executor: TorchExecutor) -> None:
    rng = random.Random(3)
    slots: list[int | None] = [None, *range(len(FAMILIES))]
    requests = [
        Request(i, [rng.randrange(3, VOCAB) for _ in range(rng.choice([1, 5, 18, 33]))], slots[i % 9], rng.randrange(4))
        for i in range(NUM_REQUESTS)
    ]
    together = run(executor, requests)
    for request in requests:
        assert together[request.index] == run(executor, [request])[request.index]


def test_an_adapter_that_overflows_loses_its_own_rows_alone(executor: TorchExecutor) -> None:
    requests = [Request(i, [5, 9, 31], None if i == 8 else i, 0) for i in range(9)]
    rows = [request.row([]) for request in requests]
    digests = {slot: str(slot) for slot in range(8)}
    clean = executor.execute(StepPlan(rows, digests))
    lost = {list(FAMILIES).index(name) for name in ("meteora", "s2ft", "dora")}
    touched = []
    for slot in lost:
        placement = executor._arena.placement(slot)
        for _, _, tensor in placement.slab.tensors():
            if tensor.is_floating_point():
                touched.append((tensor[placement.position], tensor[placement.position].clone()))
                touched[-1][0].fill_(3e38)
    mixed = executor.execute(StepPlan(rows, digests))
    for view, before in touched:
        view.copy_(before)
    for slot, (alone, beside) in enumerate(zip(clean, mixed, strict=True)):
        assert beside.is_finite == (slot not in lost)
        assert beside == alone or slot in lost


def test_every_family_changes_what_the_base_says(executor: TorchExecutor) -> None:
    prompt = list(range(3, 20))
    said = run(executor, [Request(0, prompt, None, 0), *(Request(i + 1, prompt, i, 0) for i in range(len(FAMILIES)))])
    assert len({tuple(tokens) for tokens in said.values()}) == len(FAMILIES) + 1
