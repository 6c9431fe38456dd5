"""DoRA, IA3, LoRA and the base in one step over a base with biases of q, k and v alone, as PEFT answers each."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters_store.base import read_base_dims
from serve.config import EngineConfig
from serve.engine.executor import TorchExecutor
from serve.engine.model_parts import load_parts
from serve.engine.plan import Row, SampleSpec, StepPlan
from serve.messages import SamplingParams
from tests.model.tiny_models import BY_NAME, VOCAB, reference_logits, save
from tests.store.folders import open_store
from tests.store.peft_cases import Case, ask_peft, save_case
from tests.store.test_peft_types import load

# PEFT's own words about its own kinds
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4
PROMPT = torch.randint(3, VOCAB, (17,), generator=torch.Generator().manual_seed(6)).tolist()
CASES = {
    "dora": Case("LORA", {"r": 3, "lora_alpha": 5, "use_dora": True}, scale=0.5),
    "dora-attention": Case("LORA", {"r": 4, "use_dora": True, "use_rslora": True}, ["k_proj", "v_proj"], scale=0.5),
    "ia3": Case("IA3", {"feedforward_modules": ["down_proj"]}, ["k_proj", "v_proj", "down_proj"], scale=0.5),
    "ia3-inputs": Case("IA3", {"feedforward_modules": ["q_proj", "down_proj"]}, ["q_proj", "v_proj", "down_proj"], 0.5),
    "lora": Case("LORA", {"r": 2}),
}


class Served:
    """An executor with every case loaded, and PEFT's log-probabilities [T, V] of the prompt by slot."""

    def __init__(self, root: Path) -> None:
        self.expected: dict[int | None, Tensor] = {}
        with torch.random.fork_rng():
            model = BY_NAME["qwen2-tied"].build()
            folder = save(model, root / "base")
            self.expected[None] = reference_logits(model, PROMPT).log_softmax(-1)
            for slot, (name, case) in enumerate(CASES.items()):
                save_case(model, case, root / name, seed=slot)
                self.expected[slot] = ask_peft(model, root / name, PROMPT).logprobs
        self.store = open_store(root / "store", read_base_dims(folder), base_dir=folder)
        config = EngineConfig(model_dir=folder, store_dir=root / "store", dtype="float32", num_kv_blocks=64)
        self.executor = TorchExecutor(load_parts(config), self.store.open_image)
        self.digests = {slot: self.store.put_dir(name, root / name).digest for slot, name in enumerate(CASES)}
        for slot, digest in self.digests.items():
            load(self.executor, digest, slot)

    def run(self, slots: list[int | None]) -> list[list[float]]:
        """Return each row's log-probabilities of the prompt's tokens, all rows in one step."""
        sample = SampleSpec(SamplingParams(max_tokens=1, seed=0, temperature=0.0), PROMPT, [])
        rows = [
            Row(str(i), PROMPT, 0, [2 * i, 2 * i + 1], slot, sample, num_prompt_logprobs=1, prompt_targets=PROMPT[1:])
            for i, slot in enumerate(slots)
        ]
        plan = StepPlan(rows, {slot: self.digests[slot] for slot in slots if slot is not None})
        results = self.executor.execute(plan)
        return [[token.logprob for token in result.prompt_logprobs or []] for result in results]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("scaled"))
    yield made
    made.executor.close()
    made.store.close()


def test_each_scaled_adapter_in_a_mixed_step_agrees_with_peft(served: Served) -> None:
    slots: list[int | None] = [0, None, 2, 4, 1, 3, 0, None, 2]
    for slot, found in zip(slots, served.run(slots), strict=True):
        expected = served.expected[slot]
        wanted = [float(expected[position, token]) for position, token in enumerate(PROMPT[1:])]
        assert found == pytest.approx(wanted, abs=TOLERANCE), slot


@pytest.mark.parametrize("slot", range(len(CASES)), ids=CASES.keys())
def test_alone_it_answers_the_same_and_not_as_the_base(served: Served, slot: int) -> None:
    mixed, alone = served.run([*range(len(CASES)), None])[slot], served.run([slot])[0]
    assert alone == pytest.approx(mixed, abs=1e-5)
    assert (served.expected[slot] - served.expected[None]).abs().max() > 100 * TOLERANCE
