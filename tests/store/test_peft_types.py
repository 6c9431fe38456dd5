"""Every served kind of adapter acts as PEFT acts: module by module, and all kinds in one step of the executor."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters_store.base import BaseDims, read_base_dims
from adapters_store.convert.peft_types import PEFT_TYPES
from adapters_store.convert.tinylora import FUSED_MODULE_ORDER, MODULE_ORDER
from adapters_store.convert.tuner import Served
from adapters_store.store import AdapterStore, AdapterVersion
from serve.config import EngineConfig
from serve.engine.executor import TorchExecutor
from serve.engine.model_parts import load_parts
from serve.engine.plan import Row, SampleSpec, StepPlan
from serve.messages import SamplingParams
from tests.model.tiny_models import BY_NAME, TINY_MODELS, VOCAB, TinyModel, reference_logits, save
from tests.store.deltas import assert_equal_deltas, fused_deltas, split_weights, stored_deltas
from tests.store.folders import open_store
from tests.store.peft_cases import CASES, MODEL_CASES, Answer, ask_peft, rename_to_bone, save_case, tiny_llama

# PEFT's own words about its own kinds
pytestmark = pytest.mark.filterwarnings("ignore")

IGNORED = {
    "adalora": ("total_step",),
    "adalora-pruned": ("total_step",),
    "qalora": ("qalora_group_size", "use_qalora"),
    "supertuning": ("sparsity",),
    "supra": ("sparsity",),
}
DELTA_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-4
PROMPT = torch.randint(3, VOCAB, (17,), generator=torch.Generator().manual_seed(5)).tolist()


class Converted:
    """One store with a folder of every kind, and what PEFT answers for each."""

    def __init__(self, root: Path) -> None:
        with torch.random.fork_rng():
            model = tiny_llama()
            self.base_dir = save(model, root / "base")
            self.weights = split_weights(model)
            self.base_logprobs = reference_logits(model, PROMPT).log_softmax(-1)
            self.answers: dict[str, Answer] = {}
            for seed, (name, case) in enumerate(CASES.items()):
                save_case(model, case, root / name, seed)
                self.answers[name] = ask_peft(model, root / name, PROMPT)
        rename_to_bone(root / "bone")
        self.base: BaseDims = read_base_dims(self.base_dir)
        self.store: AdapterStore = open_store(root / "store", self.base, base_dir=self.base_dir)
        self.versions: dict[str, AdapterVersion] = {name: self.store.put_dir(name, root / name) for name in CASES}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Converted]:
    made = Converted(tmp_path_factory.mktemp("kinds"))
    yield made
    made.store.close()


def test_every_served_kind_has_a_case() -> None:
    served = {name for name, kind in PEFT_TYPES.items() if isinstance(kind, Served)}
    assert served == {case.peft_type for case in (CASES | MODEL_CASES).values()} | {"BONE"}


@pytest.mark.parametrize("name", CASES)
def test_the_store_acts_as_peft_acts(name: str, converted: Converted) -> None:
    image = converted.store.open_image(converted.versions[name].digest)
    stored, wanted = stored_deltas(image, converted.base, converted.weights), converted.answers[name].deltas
    assert converted.versions[name].report.ignored == IGNORED.get(name, ())
    assert all(np.abs(delta).max() > 0.001 for delta, bias in wanted.values() if delta.any())
    # a module without any rank left is not stored at all
    silent = {path for path, (delta, bias) in wanted.items() if not delta.any() and bias is None}
    assert len(silent) == (1 if name == "adalora-pruned" else 0)
    assert_equal_deltas(stored, {path: wanted[path] for path in wanted.keys() - silent}, rtol=DELTA_TOLERANCE)


def test_all_kinds_in_one_step_agree_with_peft(converted: Converted) -> None:
    config = EngineConfig(
        model_dir=converted.base_dir, store_dir=converted.base_dir, dtype="float32", num_kv_blocks=4 * len(CASES)
    )
    executor = TorchExecutor(load_parts(config), converted.store.open_image)
    digests = {slot: version.digest for slot, version in enumerate(converted.versions.values())}
    for slot, digest in digests.items():
        load(executor, digest, slot)
    rows = [
        Row(
            request_id=name,
            token_ids=PROMPT,
            start=0,
            block_table=[2 * slot, 2 * slot + 1],
            adapter_slot=slot,
            sample=SampleSpec(SamplingParams(max_tokens=1, seed=0, temperature=0.0), PROMPT, []),
            num_prompt_logprobs=1,
            prompt_targets=PROMPT[1:],
        )
        for slot, name in enumerate(CASES)
    ]
    results = executor.execute(StepPlan(rows, digests))
    executor.close()
    for name, result in zip(CASES, results, strict=True):
        expected = converted.answers[name].logprobs
        # otherwise the base would pass for its adapter
        assert (expected - converted.base_logprobs).abs().max() > 1000 * LOGIT_TOLERANCE, name
        found = [entry.logprob for entry in result.prompt_logprobs or []]
        wanted = [float(expected[position, token]) for position, token in enumerate(PROMPT[1:])]
        assert found == pytest.approx(wanted, abs=LOGIT_TOLERANCE), name


@pytest.mark.parametrize(
    "name",
    [
        "loha",
        "lokr",
        "miss",
        "gralora",
        "tinylora",
        "tinylora-tied",
        "poly",
        "dora",
        "ia3",
        "pissa",
        "hra",
        "road",
        "oft",
        "shira",
    ],
)
def test_fused_projections_of_phi3_are_split(name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = BY_NAME["phi3"].build()
        base_dir = save(model, tmp_path / "base")
        case = replace(CASES[name], targets=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
        weights = split_weights(model)
        save_case(model, case, tmp_path / name, seed=1)
        wanted = ask_peft(model, tmp_path / name, PROMPT).deltas
    base = read_base_dims(base_dir)
    store = open_store(tmp_path / "store", base, base_dir=base_dir)
    stored = stored_deltas(store.open_image(store.put_dir("a", tmp_path / name).digest), base, weights)
    assert_equal_deltas(fused_deltas(stored), wanted, rtol=DELTA_TOLERANCE)
    store.close()


@pytest.mark.parametrize("tiny", TINY_MODELS, ids=lambda tiny: tiny.name)
def test_linear_layers_are_counted_in_the_order_of_transformers(tiny: TinyModel) -> None:
    # TinyLoRA's files depend on it
    model = tiny.build()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    prefix = "model.layers.1."
    found = tuple(name.removeprefix(prefix) for name in names if name.startswith(prefix))
    assert found == (FUSED_MODULE_ORDER if "self_attn.qkv_proj" in found else MODULE_ORDER)


def load(executor: TorchExecutor, digest: str, slot: int) -> None:
    executor.start_load(digest, slot)
    deadline = time.monotonic() + 120
    while not (results := executor.poll_loads()):
        assert time.monotonic() < deadline, "an adapter was not loaded within 120 s"
        time.sleep(0.001)
    assert results[0].error is None
