"""S2FT, MeteoRA, LoRA and the base in one step of the executor, each against its own source run by transformers.

The S2FT source is the fused, permuted checkpoint itself; the MeteoRA source is a loop over tokens and experts hooked
into the base's layers.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from adapters_store.base import SITE_PATHS, SITES, read_base_dims
from adapters_store.convert.dispatch import convert
from adapters_store.formats import Declared
from adapters_store.store import AdapterStore
from adapters_store.strict_json import Json
from serve.config import EngineConfig
from serve.engine.executor import TorchExecutor
from serve.engine.model_parts import load_parts
from serve.engine.plan import Row, RowResult, SampleSpec, StepPlan
from serve.messages import SamplingParams
from tests.model.tiny_models import BY_NAME, VOCAB, reference_logits, save
from tests.store.folders import lora_config, lora_tensors, write_folder
from tests.store.tiny_checkpoints import (
    Mixture,
    S2ft,
    TinyBase,
    meteora_checkpoint,
    mixture,
    s2ft_checkpoint,
    write_checkpoint,
)

TOLERANCE = 1e-4
PROMPT = torch.randint(3, VOCAB, (17,), generator=torch.Generator().manual_seed(3)).tolist()
MIXTURES: dict[str, tuple[tuple[int, ...], int, float]] = {
    "top-2": ((3, 3, 3), 2, 1.0),
    "top-1-unequal": ((1, 4, 2), 1, 1.0),
    "warm": ((2, 5), 2, 4.0),
}
# small, so that float32 noise through the layers stays below the tolerance
SCALING = 0.25
NAMES = ["s2ft-down", "s2ft-attention", *MIXTURES, "lora"]


def mixed_logits(model: torch.nn.Module, made: Mixture, top_k: int, temperature: float) -> torch.Tensor:
    """Run the model with the mixture added to every linear layer, token by token and expert by expert."""

    def hook(key: tuple[int, str]) -> object:
        gate = torch.from_numpy(made.gates[key].copy())
        experts = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(made.a[key], made.b[key], strict=True)]

        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            rows = []
            for x in inputs[0][0]:
                best = (gate @ x).topk(top_k)
                weights = (best.values / temperature).softmax(-1)
                row = torch.zeros(output.shape[-1])
                for weight, expert in zip(weights, best.indices.tolist(), strict=True):
                    a, b = experts[expert]
                    row += weight * SCALING * (b @ (a @ x))
                rows.append(row)
            return output + torch.stack(rows)[None]

        return add

    with ExitStack() as stack:
        for layer, site in made.gates:
            module = model.get_submodule(f"model.layers.{layer}.{SITE_PATHS[site]}")
            stack.callback(module.register_forward_hook(hook((layer, site))).remove)  # type: ignore[arg-type]
        return reference_logits(model, PROMPT)


class Served:
    """An executor with every adapter loaded, and what its source says."""

    def __init__(self, root: Path) -> None:
        with torch.random.fork_rng():
            model = BY_NAME["llama3"].build()
        folder = save(model, root / "base")
        base = TinyBase(folder, read_base_dims(folder), load_file(folder / "model.safetensors"))
        self.store = AdapterStore.open(
            root / "store", base.dims, base_dir=folder, image_dtype="float32", convert=convert
        )
        self.expected: dict[int | None, torch.Tensor] = {None: reference_logits(model, PROMPT).log_softmax(-1)}
        self._add_s2ft(model, base, root)
        self._add_mixtures(model, base, root)
        self._add_lora(model, base, root)
        config = EngineConfig(model_dir=folder, store_dir=root / "store", dtype="float32", num_kv_blocks=64)
        self.executor = TorchExecutor(load_parts(config), self.store.open_image)
        self.digests = {slot: self.store.get(name).digest for slot, name in enumerate(NAMES)}
        for slot, digest in self.digests.items():
            self._load(digest, slot)

    def run(self, slots: list[int | None]) -> list[RowResult]:
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

    def _add_s2ft(self, model: torch.nn.Module, base: TinyBase, root: Path) -> None:
        dims = base.dims
        empty: list[list[int]] = [[] for _ in range(dims.num_hidden_layers)]
        channels = [[*range(5, 5 + 3 * layer)] for layer in range(dims.num_hidden_layers)]
        chosen = {
            "s2ft-down": S2ft(v=empty, o=empty, up=empty, down=channels),
            "s2ft-attention": S2ft(v=empty, o=[[1], *empty[1:]], up=[*empty[1:], [9, 2, 7]], down=[[2], *empty[1:]]),
        }
        original = {name: value.clone() for name, value in model.state_dict().items()}
        for name, selection in chosen.items():
            weights, _ = s2ft_checkpoint(base, selection)
            write_checkpoint(root / name, weights, "F32")
            (root / name / "config.json").unlink()
            self.store.put_dir(name, root / name)
            model.load_state_dict({key: torch.tensor(value) for key, value in weights.items()}, strict=False)
            self.expected[NAMES.index(name)] = reference_logits(model, PROMPT).log_softmax(-1)
        model.load_state_dict(original)

    def _add_mixtures(self, model: torch.nn.Module, base: TinyBase, root: Path) -> None:
        for seed, (name, (ranks, top_k, temperature)) in enumerate(MIXTURES.items()):
            made = mixture(base.dims, ranks, seed=seed)
            write_checkpoint(root / name, meteora_checkpoint(base, made), "F32")
            (root / name / "config.json").unlink()
            alphas = [SCALING * rank for rank in ranks]
            options: dict[str, Json] = {"top_k": top_k, "temperature": temperature}
            options |= {"rank": [*ranks], "alpha": [*alphas]}
            self.store.put_dir(name, root / name, declared=Declared("meteora", options))
            self.expected[NAMES.index(name)] = mixed_logits(model, made, top_k, temperature).log_softmax(-1)

    def _add_lora(self, model: torch.nn.Module, base: TinyBase, root: Path) -> None:
        tensors = lora_tensors(base.dims, rank=2, seed=5)
        self.store.put_dir("lora", write_folder(root / "lora", lora_config(lora_alpha=2 * SCALING), tensors))
        made = Mixture((2,), {}, {}, {})
        for layer in range(base.dims.num_hidden_layers):
            for site in SITES:
                a, b = (
                    np.frombuffer(raw, dtype="<f4").reshape(shape)
                    for _, shape, raw in (
                        tensors[f"base_model.model.model.layers.{layer}.{SITE_PATHS[site]}.lora_{kind}.weight"]
                        for kind in "AB"
                    )
                )
                # one expert alone is a LoRA
                made.gates[layer, site] = np.zeros((1, a.shape[1]), dtype=np.float32)
                made.a[layer, site], made.b[layer, site] = [a], [b]
        self.expected[NAMES.index("lora")] = mixed_logits(model, made, 1, 1.0).log_softmax(-1)

    def _load(self, digest: str, slot: int) -> None:
        self.executor.start_load(digest, slot)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if results := self.executor.poll_loads():
                assert results[0].error is None, results[0].error
                return
            time.sleep(0.001)
        raise TimeoutError(f"slot {slot} was not loaded within 30 s")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("families"))
    yield served
    served.executor.close()
    served.store.close()


def test_every_family_in_one_step_agrees_with_its_source(served: Served) -> None:
    slots: list[int | None] = [0, None, 3, 5, 2, 1, 4, 3, None, 0]
    for slot, result in zip(slots, served.run(slots), strict=True):
        expected = served.expected[slot]
        assert result.prompt_logprobs is not None
        for position, found in enumerate(result.prompt_logprobs):
            wanted = float(expected[position, found.token_id])
            assert found.logprob == pytest.approx(wanted, abs=TOLERANCE), NAMES[slot or 0]
            assert found.top_logprobs == pytest.approx(expected[position].topk(2).values.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("slot", range(len(NAMES)), ids=NAMES)
def test_every_adapter_moves_the_answer(served: Served, slot: int) -> None:
    base, own = served.expected[None], served.expected[slot]
    assert (base - own).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("slot", range(len(NAMES)), ids=NAMES)
def test_an_adapter_alone_answers_as_in_the_mixed_step(served: Served, slot: int) -> None:
    mixed = served.run([*range(len(NAMES)), None])[slot].prompt_logprobs
    alone = served.run([slot])[0].prompt_logprobs
    assert mixed is not None and alone is not None
    for found, wanted in zip(mixed, alone, strict=True):
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-5)
