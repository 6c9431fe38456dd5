"""Official S2FT and MeteoRA checkpoints through the store into the engine: what transformers computes from them."""

import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from adapters_store.base import BaseDims
from adapters_store.convert.dispatch import convert
from adapters_store.formats import Declared
from serve.config import EngineConfig
from serve.engine.executor import TorchExecutor
from serve.engine.model_parts import load_parts
from serve.engine.plan import Row, SampleSpec, StepPlan
from serve.messages import SamplingParams
from tests.model.tiny_models import reference_logits
from tests.store.folders import open_store
from tests.store.tiny_checkpoints import (
    GQA,
    MHA,
    Mixture,
    S2ft,
    TinyBase,
    Weights,
    meteora_checkpoint,
    mixture,
    s2ft_checkpoint,
    stem,
    write_checkpoint,
)

PROMPT = [3, 17, 5, 29, 8, 8, 21, 14, 30, 2, 11]
TOLERANCE = 1e-4
# ragged, one layer empty in all but one site
SELECTIONS = [
    (MHA, S2ft(v=[[2], []], o=[[1], [3]], up=[[5, 20], []], down=[[20, 3, 7], []])),
    (GQA, S2ft(o=[[2], []], up=[[3], []], down=[[9, 1], []])),
]


class Served:
    """A tiny base on disk and in an executor with a store beside it."""

    def __init__(self, root: Path, dims: BaseDims) -> None:
        self.root = root
        self.base = TinyBase.write(root / "base", dims)
        self.write(self.base.folder, self.base.weights)
        self.store = open_store(root / "store", self.base.dims, base_dir=self.base.folder, convert=convert)
        config = EngineConfig(
            model_dir=self.base.folder, store_dir=root / "store", dtype="float32", num_kv_blocks=4, block_size=16
        )
        self.executor = TorchExecutor(load_parts(config), self.store.open_image)

    def write(self, folder: Path, weights: Weights) -> Path:
        """Write a checkpoint that transformers reads too."""
        dims = self.base.dims
        return write_checkpoint(
            folder,
            weights,
            architectures=["LlamaForCausalLM"],
            hidden_size=dims.hidden_size,
            intermediate_size=dims.intermediate_size,
            num_hidden_layers=dims.num_hidden_layers,
            num_attention_heads=dims.num_attention_heads,
            num_key_value_heads=dims.num_key_value_heads,
            head_dim=dims.head_dim,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            hidden_act="silu",
            tie_word_embeddings=False,
        )

    def close(self) -> None:
        """Stop the loader and close the store."""
        self.executor.close()
        self.store.close()

    def logprobs(self, digest: str) -> tuple[list[float], list[float]]:
        """Log-probabilities of the prompt's tokens by the base and by an adapter, in one step."""
        self.executor.start_load(digest, 0)
        deadline = time.monotonic() + 120
        while not (results := self.executor.poll_loads()) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert results and results[0].error is None
        sample = SampleSpec(SamplingParams(max_tokens=1, seed=0, temperature=0.0), PROMPT, [])
        rows = [
            Row(str(i), PROMPT, 0, [i], slot, sample, num_prompt_logprobs=1, prompt_targets=PROMPT[1:])
            for i, slot in enumerate((None, 0))
        ]
        found = [result.prompt_logprobs for result in self.executor.execute(StepPlan(rows, {0: digest}))]
        base, adapted = ([token.logprob for token in each or []] for each in found)
        return base, adapted


def read_model(folder: Path) -> nn.Module:
    model: nn.Module = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def expected_logprobs(model: nn.Module) -> list[float]:
    logprobs = reference_logits(model, PROMPT).log_softmax(-1)
    return [float(logprobs[i, token]) for i, token in enumerate(PROMPT[1:])]


@pytest.mark.parametrize(("dims", "chosen"), SELECTIONS, ids=["as many keys as queries", "grouped queries"])
def test_an_s2ft_checkpoint_is_served_as_the_fused_model_answers(dims: BaseDims, chosen: S2ft, tmp_path: Path) -> None:
    with closing(Served(tmp_path, dims)) as served:
        # permuted heads and channels compute the same function
        fused = served.write(tmp_path / "ft", s2ft_checkpoint(served.base, chosen)[0])
        base, adapted = served.logprobs(served.store.put_dir("a", fused).digest)
    expected = expected_logprobs(read_model(fused))
    assert adapted == pytest.approx(expected, abs=TOLERANCE)
    assert base == pytest.approx(expected_logprobs(read_model(served.base.folder)), abs=TOLERANCE)
    assert max(abs(a - b) for a, b in zip(base, expected, strict=True)) > 0.01


class ExpertLoop:
    """A forward hook that adds a mixture token by token, from the experts as they were drawn."""

    def __init__(self, made: Mixture, layer: int, site: str, top_k: int, scaling: float) -> None:
        self._gate = made.gates[layer, site]
        self._experts = list(zip(made.a[layer, site], made.b[layer, site], strict=True))
        self._top_k = top_k
        self._scaling = scaling

    def __call__(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        added = []
        for x in inputs[0][0].numpy():
            logits = self._gate @ x
            chosen = np.argsort(-logits, kind="stable")[: self._top_k]
            weights = np.exp(logits[chosen] - logits[chosen].max())
            pairs = zip(chosen, weights / weights.sum(), strict=True)
            added.append(sum(w * self._scaling * (self._experts[e][1] @ (self._experts[e][0] @ x)) for e, w in pairs))
        return output + torch.from_numpy(np.array(added, dtype=np.float32))


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_meteora_checkpoint_is_served_as_its_experts_in_a_loop(top_k: int, tmp_path: Path) -> None:
    with closing(Served(tmp_path, GQA)) as served:
        made = mixture(GQA, (2, 2, 2, 2, 2))
        folder = write_checkpoint(tmp_path / "ft", meteora_checkpoint(served.base, made))
        (folder / "config.json").unlink()
        declared = Declared("auto", {"top_k": top_k, "temperature": 1.0, "rank": 2, "alpha": 4})
        base, adapted = served.logprobs(served.store.put_dir("a", folder, declared=declared).digest)
    model = read_model(served.base.folder)
    for layer, site in made.gates:
        module = model.get_submodule(stem(layer, site))
        module.register_forward_hook(ExpertLoop(made, layer, site, top_k, scaling=2.0))
    expected = expected_logprobs(model)
    assert adapted == pytest.approx(expected, abs=TOLERANCE)
    assert max(abs(a - b) for a, b in zip(base, expected, strict=True)) > 0.01
