"""What each adapter answers when it runs alone: greedy tokens of the tiny model, in numpy, by another way than ours.

Owns a forward pass written from the published Llama model: the adapter merged into the weights (`W + alpha / r * B A`),
nothing paged, nothing batched with other adapters, nothing shared with the server. Invariant: a version whose two best
tokens ever lie closer than `MIN_MARGIN` has no answer here (`None`), so rounding never decides a comparison.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from tests.tiny_model import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS, SITES

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

# far above what float32 sums of this size lose (1e-5), far below the usual distance of the best two (1)
MIN_MARGIN = 1e-3
_EPSILON = 1e-5
_ROPE_THETA = 10000.0
# `write_tiny_adapter` makes alpha twice the rank
_SCALING = 2.0


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens to run: `ids` and their positions, both [P, N], one line per prompt."""

    ids: Ints
    positions: Ints


class SoloModel:
    """The tiny model's weights, and what its adapters make of a fixed set of prompts."""

    def __init__(self, model_dir: Path, prompts: list[list[int]], num_tokens: int) -> None:
        self._weights = load_file(model_dir / "model.safetensors")
        self._prompts = prompts
        self._num_tokens = num_tokens
        self._longest = max(map(len, prompts))
        self._turns = _turns(self._longest + num_tokens)

    def answers(self, folder: Path | None) -> list[list[int]] | None:
        """Return the greedy tokens of each prompt; None where the best two come too close for float32 to say.

        Args:
            folder: PEFT folder of the adapter; None: the base.
        """
        return _Run(self._merged(folder), self._turns, len(self._prompts)).greedy(
            self._prompts, self._longest, self._num_tokens
        )

    def _merged(self, folder: Path | None) -> dict[str, Floats]:
        weights = dict(self._weights)
        tensors = {} if folder is None else load_file(folder / "adapter_model.safetensors")
        for layer in range(NUM_LAYERS):
            for site in SITES:
                a = tensors.get(f"base_model.model.model.layers.{layer}.{site}.lora_A.weight")
                if a is not None:
                    b = tensors[f"base_model.model.model.layers.{layer}.{site}.lora_B.weight"]
                    weights[f"model.layers.{layer}.{site}.weight"] = weights[
                        f"model.layers.{layer}.{site}.weight"
                    ] + np.float32(_SCALING) * (b @ a)
        return weights


class _Run:
    """One adapter's pass over all prompts at once, with a plain cache [P, T, K, E] per layer."""

    def __init__(self, weights: dict[str, Floats], turns: tuple[Floats, Floats], num_prompts: int) -> None:
        self._weights = weights
        self._turns = turns
        shape = (num_prompts, len(turns[0]), NUM_KV_HEADS, HEAD_DIM)
        self._cache = [(np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for _ in range(NUM_LAYERS)]

    def greedy(self, prompts: list[list[int]], longest: int, num_tokens: int) -> list[list[int]] | None:
        ids = np.array([prompt + [0] * (longest - len(prompt)) for prompt in prompts], np.int64)
        hidden = self._forward(Rows(ids, np.tile(np.arange(longest), (len(prompts), 1))))
        lengths = np.array([len(prompt) for prompt in prompts])
        last = hidden[np.arange(len(prompts)), lengths - 1]
        found: list[Ints] = []
        while True:
            logits = last @ self._weights["model.embed_tokens.weight"].T
            best = np.partition(logits, -2, axis=-1)[:, -2:]
            if (best[:, 1] - best[:, 0]).min() < MIN_MARGIN:
                return None
            found.append(logits.argmax(-1))
            if len(found) == num_tokens:
                return [[int(token) for token in tokens] for tokens in np.stack(found, axis=1)]
            # what the padding left in the cache at this position is overwritten before anybody looks at it
            positions = (lengths + len(found) - 1)[:, None]
            last = self._forward(Rows(found[-1][:, None], positions))[:, 0]

    def _forward(self, rows: Rows) -> Floats:
        hidden = self._weights["model.embed_tokens.weight"][rows.ids]
        for layer in range(NUM_LAYERS):
            hidden = hidden + self._attention(layer, self._norm(hidden, f"model.layers.{layer}.input_layernorm"), rows)
            inner = self._norm(hidden, f"model.layers.{layer}.post_attention_layernorm")
            gate, up = self._linear(layer, "mlp.gate_proj", inner), self._linear(layer, "mlp.up_proj", inner)
            hidden = hidden + self._linear(layer, "mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
        return self._norm(hidden, "model.norm")

    def _attention(self, layer: int, x: Floats, rows: Rows) -> Floats:
        q, k, v = (
            self._linear(layer, f"self_attn.{name}_proj", x).reshape(*rows.ids.shape, -1, HEAD_DIM) for name in "qkv"
        )
        keys, values = self._cache[layer]
        line = np.arange(len(rows.ids))[:, None]
        keys[line, rows.positions], values[line, rows.positions] = self._turned(k, rows), v
        per_head = NUM_HEADS // NUM_KV_HEADS
        all_keys, all_values = keys.repeat(per_head, axis=2), values.repeat(per_head, axis=2)
        scores = np.einsum("pnhe,pthe->phnt", self._turned(q, rows), all_keys) / np.float32(HEAD_DIM**0.5)
        is_seen = np.arange(keys.shape[1]) <= rows.positions[:, None, :, None]
        scores = np.where(is_seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        attended = np.einsum("phnt,pthe->pnhe", weights, all_values)
        return self._linear(layer, "self_attn.o_proj", attended.reshape(*rows.ids.shape, -1))

    def _turned(self, x: Floats, rows: Rows) -> Floats:
        cos, sin = (table[rows.positions][:, :, None, :] for table in self._turns)
        first, second = np.split(x, 2, axis=-1)
        return (x * cos + np.concatenate([-second, first], axis=-1) * sin).astype(np.float32)

    def _linear(self, layer: int, site: str, x: Floats) -> Floats:
        result: Floats = x @ self._weights[f"model.layers.{layer}.{site}.weight"].T
        return result

    def _norm(self, x: Floats, name: str) -> Floats:
        scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(_EPSILON))
        result: Floats = x * scale * self._weights[f"{name}.weight"]
        return result


def _turns(num_positions: int) -> tuple[Floats, Floats]:
    """Return cosines and sines [T, E] of the rotary embedding."""
    frequencies = _ROPE_THETA ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = np.outer(np.arange(num_positions), np.concatenate([frequencies, frequencies]))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
