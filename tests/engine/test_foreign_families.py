"""Foreign adapters as their own trainers save them, all in one batch, answer as their published code does."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from adapters_store.base import read_base_dims
from adapters_store.convert.dispatch import convert, open_source
from adapters_store.convert.options import ConvertOptions
from adapters_store.formats import Declared
from adapters_store.unpickled import translate_pickles
from serve.config import EngineConfig
from serve.engine.executor import TorchExecutor
from serve.engine.model_parts import load_parts
from serve.engine.plan import Row, SampleSpec, StepPlan
from serve.messages import SamplingParams
from serve.model.spec import read_spec
from serve.probe.decoder import Lane, ReferenceDecoder
from serve.probe.weights import ProbeWeights
from tests.model.tiny_models import BY_NAME, VOCAB, save
from tests.store.folders import open_store
from tests.store.foreign_models import MAKERS
from tests.store.test_peft_types import load
from tests.store.test_unpickle import in_process

# PEFT's own words about its own kinds
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4
PROMPT = torch.randint(3, VOCAB, (13,), generator=torch.Generator().manual_seed(9)).tolist()


class Served:
    """An executor with every adapter loaded, and its own code's log-probabilities [T, V] of the prompt by slot."""

    def __init__(self, root: Path) -> None:
        self.expected: dict[int | None, Tensor] = {}
        # the uploads as the converter saw them, and what it was told, by slot
        self.sources: list[tuple[Path, ConvertOptions]] = []
        self.base_dir = folder = root / "base"
        base = BY_NAME["llama3"].build()
        assert isinstance(base, LlamaForCausalLM)
        save(base, folder)
        dims = read_base_dims(folder)

        def convert_here(source: Path, target: Path, options: ConvertOptions) -> None:
            translate_pickles(source, in_process)
            self.sources.append((root / f"upload-{len(self.sources)}", options))
            shutil.copytree(source, self.sources[-1][0])
            convert(source, target, options)

        self.store = open_store(root / "store", dims, base_dir=folder, convert=convert_here, max_rank=8)
        config = EngineConfig(model_dir=folder, store_dir=root / "store", dtype="float32", num_kv_blocks=64)
        self.executor = TorchExecutor(load_parts(config), self.store.open_image)
        self.digests: dict[int, str] = {}
        with torch.no_grad():
            self.expected[None] = log_probabilities(base)
            for slot, (name, make) in enumerate(MAKERS.items()):
                made = make(base, root / name)
                self.expected[slot] = log_probabilities(made.model.eval())
                declared = Declared(made.format, made.options)
                self.digests[slot] = self.store.put_dir(name, root / name, declared=declared).digest
                load(self.executor, self.digests[slot], slot)

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


def log_probabilities(model: torch.nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([PROMPT])).logits[0]
    return logits.float().log_softmax(-1)


def run_alone(base_dir: Path, folder: Path, root: Path) -> list[float]:
    """Serve one fine-tuned model as an adapter of its base and return the log-probabilities of the prompt's tokens."""
    store = open_store(root / "store", read_base_dims(base_dir), base_dir=base_dir, convert=convert, max_rank=8)
    config = EngineConfig(model_dir=base_dir, store_dir=root / "store", dtype="float32", num_kv_blocks=8)
    executor = TorchExecutor(load_parts(config), store.open_image)
    digest = store.put_dir("tuned", folder, declared=Declared("hf_model")).digest
    load(executor, digest, 0)
    sample = SampleSpec(SamplingParams(max_tokens=1, seed=0, temperature=0.0), PROMPT, [])
    row = Row("0", PROMPT, 0, [0, 1], 0, sample, num_prompt_logprobs=1, prompt_targets=PROMPT[1:])
    result = executor.execute(StepPlan([row], {0: digest}))[0]
    executor.close()
    store.close()
    return [token.logprob for token in result.prompt_logprobs or []]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("foreign"))
    yield made
    made.executor.close()
    made.store.close()


def test_all_families_in_one_step_answer_as_their_own_code(served: Served) -> None:
    slots: list[int | None] = [None, *range(len(MAKERS)), None]
    for slot, found in zip(slots, served.run(slots), strict=True):
        expected = served.expected[slot]
        wanted = [float(expected[position, token]) for position, token in enumerate(PROMPT[1:])]
        assert found == pytest.approx(wanted, abs=TOLERANCE), "base" if slot is None else [*MAKERS][slot]
        if slot is not None:
            assert (expected - served.expected[None]).abs().max() > 100 * TOLERANCE, [*MAKERS][slot]


def test_alone_each_answers_the_same(served: Served) -> None:
    slots: list[int | None] = [*range(len(MAKERS))]
    for slot, together in zip(slots, served.run([*slots, None]), strict=False):
        assert served.run([slot])[0] == pytest.approx(together, abs=1e-5)


def test_opened_as_its_own_forward_each_source_is_its_own_code(served: Served) -> None:
    with ExitStack() as stack:
        options = served.sources[0][1]
        weights = stack.enter_context(ProbeWeights(served.base_dir, options.base))
        models = [stack.enter_context(open_source(*upload)) for upload in served.sources]
        lanes = [Lane(model, tuple(PROMPT), lambda values: values.astype(np.float32)) for model in models]
        decoder = ReferenceDecoder(read_spec(served.base_dir), weights, lanes, max_model_len=64)
        for slot, found in enumerate(decoder.logprobs()):
            expected = served.expected[slot].numpy()
            np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE, err_msg=[*MAKERS][slot])


@pytest.mark.parametrize("name", ["qwen2-tied", "phi3"])
def test_a_fine_tuned_model_with_a_tied_head_or_fused_layers_is_an_adapter_of_its_base(
    name: str, tmp_path: Path
) -> None:
    model = BY_NAME[name].build()
    save(model, tmp_path / "base")
    with torch.no_grad():
        before = log_probabilities(model)
        parameters = dict(model.named_parameters())
        parameters["model.embed_tokens.weight"][[PROMPT[2], 7]] += 0.5
        first = next(path for path in parameters if "layers.0" in path and "q" in path and path.endswith("weight"))
        second = next(path for path in parameters if "layers.1" in path and "up_proj.weight" in path)
        # of a fused layer, a row of q and one of k
        parameters[first][[3, -58]] += 0.3
        parameters[second].add_(torch.randn(len(parameters[second]), 1) @ torch.randn(1, 64) * 0.1)
        save(model, tmp_path / "tuned")
        expected = log_probabilities(model)
    assert (expected - before).abs().max() > 100 * TOLERANCE
    wanted = [float(expected[position, token]) for position, token in enumerate(PROMPT[1:])]
    assert run_alone(tmp_path / "base", tmp_path / "tuned", tmp_path) == pytest.approx(wanted, abs=TOLERANCE)
