"""The whole adapter path against PEFT: folders through the store into slabs, then one mixed step of the executor."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adapters_store.base import read_base_dims
from adapters_store.store import AdapterStore
from serve.config import EngineConfig
from serve.engine.executor import TorchExecutor
from serve.engine.model_parts import load_parts
from serve.engine.plan import LoadResult, Row, RowResult, SampleSpec, StepPlan
from serve.messages import SamplingParams
from tests.model.tiny_models import BY_NAME, VOCAB, reference_logits, save

pytestmark = [
    # PEFT 0.21 reads an attribute that transformers 5 renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT 0.21 takes the bias of lora_bias for a torn tensor
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]

TOLERANCE = 1e-4
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "rank1": {"r": 1, "lora_alpha": 3, "target_modules": ALL},
    "rank3-attention": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "rank8-rslora": {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": ALL},
    "rank16-bias": {"r": 16, "lora_alpha": 16, "lora_bias": True, "target_modules": ["k_proj", "down_proj"]},
    "rank64": {"r": 64, "lora_alpha": 16, "target_modules": ALL},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["o_proj", "up_proj", "gate_proj"],
        "rank_pattern": {"up_proj": 7, "layers.0.self_attn.o_proj": 2},
        "alpha_pattern": {"o_proj": 3},
        "layers_to_transform": [0, 2],
    },
}
PROMPT = torch.randint(3, VOCAB, (21,), generator=torch.Generator().manual_seed(3)).tolist()


def make_adapters(model: torch.nn.Module, root: Path) -> dict[str, torch.Tensor]:
    """Save every adapter as PEFT does; returns PEFT's own log-probabilities of the prompt, by name."""
    expected = {"": reference_logits(model, PROMPT).log_softmax(-1)}
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
        wrapped = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
        wrapped.save_pretrained(str(root / name))
        expected[name] = reference_logits(wrapped.eval(), PROMPT).log_softmax(-1)
        wrapped.unload()
    return expected


class Served:
    """An executor with every adapter loaded, and what PEFT says."""

    def __init__(self, root: Path) -> None:
        with torch.random.fork_rng():
            model = BY_NAME["llama3"].build()
            base = save(model, root / "base")
            self.expected = make_adapters(model, root / "peft")
        self.store = AdapterStore.open(root / "store", read_base_dims(base), image_dtype="float32")
        versions = {name: self.store.put_dir(name, root / "peft" / name) for name in ADAPTERS}
        self.digests = {slot: versions[name].digest for slot, name in enumerate(ADAPTERS)}
        config = EngineConfig(model_dir=base, store_dir=root / "store", dtype="float32", num_kv_blocks=64)
        self.executor = TorchExecutor(load_parts(config), self.store.open_image)

    def load(self, digest: str, slot: int) -> LoadResult:
        self.executor.start_load(digest, slot)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if results := self.executor.poll_loads():
                return results[0]
            time.sleep(0.001)
        raise TimeoutError(f"slot {slot} was not loaded within 30 s")

    def prefill(self, slots: list[int | None]) -> list[RowResult]:
        """Run the prompt once per entry, all in one step, asking for the prompt's log-probabilities."""
        rows = [
            Row(
                request_id=f"request-{i}",
                token_ids=PROMPT,
                start=0,
                block_table=[2 * i, 2 * i + 1],
                adapter_slot=slot,
                sample=SampleSpec(SamplingParams(max_tokens=1, seed=0, temperature=0.0), PROMPT, []),
                num_prompt_logprobs=2,
                prompt_targets=PROMPT[1:],
            )
            for i, slot in enumerate(slots)
        ]
        return self.executor.execute(StepPlan(rows, {s: self.digests[s] for s in slots if s is not None}))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("executor"))
    for slot, digest in served.digests.items():
        assert served.load(digest, slot).error is None
    yield served
    served.executor.close()
    served.store.close()


def test_a_mixed_step_agrees_with_peft_for_every_adapter(served: Served) -> None:
    slots: list[int | None] = [3, None, 0, 5, 2, 4, 1, None, 2]
    names = list(ADAPTERS)
    for slot, result in zip(slots, served.prefill(slots), strict=True):
        expected = served.expected["" if slot is None else names[slot]]
        assert result.prompt_logprobs is not None and len(result.prompt_logprobs) == len(PROMPT) - 1
        for position, found in enumerate(result.prompt_logprobs):
            assert found.token_id == PROMPT[position + 1]
            assert found.logprob == pytest.approx(float(expected[position, found.token_id]), abs=TOLERANCE)
            assert found.top_logprobs == pytest.approx(expected[position].topk(2).values.tolist(), abs=TOLERANCE)
        assert result.token_id == int(expected[-1].argmax())


def test_a_row_without_adapter_has_the_same_bits_with_and_without_adapters_beside_it(served: Served) -> None:
    alone = served.prefill([None, None, None])[0]
    mixed = served.prefill([0, None, 4])[1]
    assert mixed.prompt_logprobs == alone.prompt_logprobs


def test_a_load_that_fails_says_why_and_leaves_no_bytes(served: Served) -> None:
    result = served.load("0" * 64, 40)
    assert result.error is not None and (result.num_bytes, result.rank) == (0, 0)
    with pytest.raises(KeyError):
        served.executor._arena.placement(40)


def test_a_dropped_slot_gives_its_slab_back(served: Served) -> None:
    arena = served.executor._arena
    before = arena.num_slabs
    served.executor.drop(served.digests[4], 4)
    assert arena.num_slabs == before - 1
    assert served.load(served.digests[4], 4).error is None
    assert arena.num_slabs == before
    test_a_mixed_step_agrees_with_peft_for_every_adapter(served)
