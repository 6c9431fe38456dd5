"""A model of a few kilobytes, random adapters for it, and a hand-driven sequence of steps for any executor.

Owns the script's side of the step contract: tokens, block tables, what is chained. The shapes are those of
`tests.kernels.random_adapters`, so that its images fit. Invariant: the same script names the same rows for every
executor; only the tokens that come back may differ.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from adapter_kernels.gpu.paged_decode import DecodeWorkspace
from adapter_kernels.image import AdapterImage
from serve.config import EngineConfig
from serve.engine.device_executor import DeviceExecutor
from serve.engine.plan import AsyncExecutor, Executor, Row, RowResult, SampleSpec, StepPlan
from serve.messages import SamplingParams
from tests.kernels.random_adapters import SHAPES, random_image

# one layer: each costs the interpreter a third of a second per step
NUM_LAYERS = 1
HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCAB = 16, 40, 3, 1, 8, 70
EOS = 69
BLOCK_SIZE = 4
_BLOCKS_PER_SEQUENCE = 12
_PARENTS = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}


def write_model(folder: Path) -> EngineConfig:
    """Write the model and return a config that serves it."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": BLOCK_SIZE * _BLOCKS_PER_SEQUENCE,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(4)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN), np.float32)}
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = np.ones(HIDDEN, np.float32)
        for site, (out_dim, in_dim) in SHAPES.items():
            weight = rng.standard_normal((out_dim, in_dim), np.float32) * np.float32(2.0 / in_dim**0.5)
            tensors[f"{prefix}.{_PARENTS.get(site[0], 'mlp')}.{site}.weight"] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return EngineConfig(
        model_dir=folder,
        store_dir=folder,
        num_kv_blocks=8 * _BLOCKS_PER_SEQUENCE,
        block_size=BLOCK_SIZE,
        max_num_seqs=8,
        max_step_tokens=48,
        adapter_device_bytes=1 << 18,
        num_adapter_slots=8,
        max_adapter_rank=16,
        num_threads=1,
    )


def image(seed: int, ranks: dict[str, int], biased: str = "") -> AdapterImage:
    """An adapter with these ranks by site."""
    generator = torch.Generator().manual_seed(seed)
    sites = {(0, site): rank for site, rank in ranks.items()}
    return random_image(sites, generator, biased=frozenset({(0, biased)} & sites.keys()))


def use_one_split(executor: DeviceExecutor) -> None:
    """Let decodes attend in one split: the contexts are short, and the interpreter pays for empty splits too."""
    decoder = executor._forward.decoder
    decoder._decode_workspace = DecodeWorkspace.build(8, NUM_HEADS, HEAD_DIM, decoder.device, num_splits=1)


def load(executor: Executor, digest: str, slot: int) -> None:
    """Load an adapter to the end."""
    executor.start_load(digest, slot)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if results := executor.poll_loads():
            assert results[0].error is None, results[0].error
            return
        time.sleep(0.001)
    raise TimeoutError(f"slot {slot} was not loaded within 30 s")


@dataclass(slots=True)
class Talk:
    """One sequence of a script."""

    prompt: list[int]
    adapter_slot: int | None
    params: SamplingParams | None
    embed: str | None = None
    composed: tuple[tuple[int, float], ...] = ()
    output: list[int] = field(default_factory=list)
    num_computed: int = 0
    # tokens sampled by steps that were not collected yet
    num_unknown: int = 0
    results: list[RowResult] = field(default_factory=list)


def talk(
    prompt_length: int, slot: int | None, seed: int, composed: tuple[tuple[int, float], ...] = (), **fields: Any
) -> Talk:
    """A sequence with a prompt of its own."""
    prompt = np.random.default_rng(seed).integers(0, VOCAB - 1, prompt_length).tolist()
    params = SamplingParams(**{"max_tokens": 40, "seed": seed, "temperature": 0.0, **fields})
    return Talk(prompt, slot, params, composed=composed)


class Script:
    """Sequences and the steps that are run on them, by hand."""

    def __init__(self, executor: Executor, talks: Sequence[Talk], block_order: Sequence[int] | None = None) -> None:
        self._executor = executor
        self.talks = list(talks)
        order = list(block_order or range(len(self.talks) * _BLOCKS_PER_SEQUENCE))
        self.tables = [order[i :: len(self.talks)] for i in range(len(self.talks))]
        self._submitted: list[StepPlan] = []

    def step(self, *counts: tuple[int, int]) -> None:
        """Run some tokens of some sequences: (index, how many)."""
        plan = self._plan(counts)
        self._apply(plan, self._executor.execute(plan))

    def submit(self, *counts: tuple[int, int]) -> None:
        """Submit a step; rows whose token is not known yet are chained."""
        assert isinstance(self._executor, AsyncExecutor)
        plan = self._plan(counts)
        self._executor.submit(plan)
        self._submitted.append(plan)

    def collect(self) -> None:
        """Collect the oldest submitted step."""
        assert isinstance(self._executor, AsyncExecutor)
        self._apply(self._submitted.pop(0), self._executor.collect())

    def prefill_all(self) -> None:
        """Run every prompt whole, in one step."""
        self.step(*((i, len(each.prompt)) for i, each in enumerate(self.talks)))

    def decode_all(self, num_steps: int) -> None:
        """Run decodes of all sequences."""
        for _ in range(num_steps):
            self.step(*((i, 1) for i in range(len(self.talks))))

    @property
    def outputs(self) -> list[list[int]]:
        """What each sequence wrote."""
        return [each.output for each in self.talks]

    def _plan(self, counts: Sequence[tuple[int, int]]) -> StepPlan:
        rows = [self._row(index, count) for index, count in counts]
        slots = {slot for row in rows for slot in row.slots}
        return StepPlan(rows, {slot: str(slot) for slot in slots})

    def _row(self, index: int, count: int) -> Row:
        each = self.talks[index]
        tokens = each.prompt + each.output
        start, stop = each.num_computed, each.num_computed + count
        each.num_computed = stop
        is_chained = stop > len(tokens)
        is_last = stop >= len(tokens)
        if is_last and each.params is not None:
            each.num_unknown += 1
        wants = each.params.num_prompt_logprobs if each.params is not None and start < len(each.prompt) else None
        return Row(
            request_id=f"talk-{index}",
            token_ids=[-1] if is_chained else tokens[start:stop],
            start=start,
            block_table=self.tables[index],
            adapter_slot=each.adapter_slot,
            sample=SampleSpec(each.params, each.prompt, each.output) if each.params is not None and is_last else None,
            embed=each.embed,
            num_prompt_logprobs=wants,
            prompt_targets=None if wants is None else each.prompt[start + 1 : stop + 1],
            is_chained=is_chained,
            composed=each.composed,
        )

    def _apply(self, plan: StepPlan, results: list[RowResult]) -> None:
        assert [row.request_id for row in plan.rows] == [result.request_id for result in results]
        for result in results:
            each = self.talks[int(result.request_id.removeprefix("talk-"))]
            each.results.append(result)
            if result.token_id is not None:
                each.output.append(result.token_id)
                each.num_unknown -= 1
