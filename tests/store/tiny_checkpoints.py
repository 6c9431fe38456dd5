"""A tiny base in safetensors, and S2FT and MeteoRA checkpoints of it, built from their published recipes in numpy.

Owns the oracles: what was trained is drawn here, in the base's own order, and a forward pass runs any set of weights.
Invariant: shares no code with the converters under test.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters_store.base import SITE_PATHS, SITES, BaseDims, weights_fingerprint
from tests.store.folders import TINY, Tensors, safetensors_bytes

Array = npt.NDArray[np.float32]
# (layer, site, input rows) -> what to add to the module's output
Deltas = Callable[[int, str, Array], Array]
Weights = dict[str, Array]

MHA = replace(TINY, num_key_value_heads=4)
GQA = TINY


def bf16(values: npt.ArrayLike) -> Array:
    """Return the values cut to what bfloat16 can hold."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def entry(values: Array, dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    """Return an entry for `safetensors_bytes`; bfloat16 takes the upper halves, so the values must fit."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "F32":
        return dtype, values.shape, values.astype("<f4").tobytes()
    return dtype, values.shape, (values.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()


def stem(layer: int, site: str) -> str:
    """Return a module's name in a checkpoint."""
    return f"model.layers.{layer}.{SITE_PATHS[site]}"


def base_weights(dims: BaseDims, seed: int = 7) -> Weights:
    """Return random weights that bfloat16 can hold, under Hugging Face's names."""
    random = np.random.default_rng(seed)
    weights: dict[str, npt.NDArray[np.float64]] = {
        "model.embed_tokens.weight": random.standard_normal((dims.vocab_size, dims.hidden_size)),
        "model.norm.weight": random.standard_normal(dims.hidden_size),
        "lm_head.weight": random.standard_normal((dims.vocab_size, dims.hidden_size)),
    }
    for layer in range(dims.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = 1 + random.standard_normal(dims.hidden_size) / 8
        for site in SITES:
            weights[f"{stem(layer, site)}.weight"] = random.standard_normal(dims.site_shape(site)) / 4
    return {name: bf16(values) for name, values in weights.items()}


def write_checkpoint(folder: Path, weights: Weights, dtype: str = "BF16", **config: object) -> Path:
    """Write weights as one safetensors file with a config beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: Tensors = {name: entry(values, dtype) for name, values in weights.items()}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    text = {"model_type": "llama", "rope_theta": 10000.0, "vocab_size": TINY.vocab_size, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(text | config))
    return folder


@dataclass(frozen=True)
class TinyBase:
    """A base on disk with its dimensions and weights."""

    folder: Path
    dims: BaseDims
    weights: Weights

    @classmethod
    def write(cls, folder: Path, dims: BaseDims, change: Callable[[Weights], object] | None = None) -> "TinyBase":
        """Make one; `change` edits its weights first."""
        weights = base_weights(dims)
        if change is not None:
            change(weights)
        write_checkpoint(folder, weights)
        return cls(folder, replace(dims, weights_fingerprint=weights_fingerprint(folder)), weights)


@dataclass
class S2ft:
    """What is selected per layer: query heads of o, key heads of v, channels of up and down; in the base's numbers."""

    v: list[list[int]] = field(default_factory=lambda: [[], []])
    o: list[list[int]] = field(default_factory=lambda: [[], []])
    up: list[list[int]] = field(default_factory=lambda: [[], []])
    down: list[list[int]] = field(default_factory=lambda: [[], []])


def s2ft_order(first: list[int], second: list[int], count: int) -> list[int]:
    """Return the published order: only the first's, both's, only the second's, then the rest."""
    order = [i for i in first if i not in second] + [i for i in first if i in second]
    order += [i for i in second if i not in first]
    return order + [i for i in range(count) if i not in order]


def s2ft_checkpoint(base: TinyBase, chosen: S2ft, seed: int = 3) -> tuple[Weights, dict[tuple[int, str], Array]]:
    """Return the fused, permuted checkpoint and what was trained, as full matrices in the base's order.

    With fewer key heads than query heads, whole groups move: the published code then permutes channels only, and a
    checkpoint whose heads moved in groups is the natural extension.
    """
    dims, weights = base.dims, dict(base.weights)
    random = np.random.default_rng(seed)
    trained: dict[tuple[int, str], Array] = {}
    group, head = dims.num_attention_heads // dims.num_key_value_heads, dims.head_dim
    for layer in range(dims.num_hidden_layers):
        key_order = s2ft_order(chosen.v[layer], sorted({o // group for o in chosen.o[layer]}), dims.num_key_value_heads)
        query_order = [k * group + i for k in key_order for i in range(group)]
        channels = s2ft_order(chosen.up[layer], chosen.down[layer], dims.intermediate_size)
        rows = {"q_proj": _rows(query_order, head), "k_proj": _rows(key_order, head), "v_proj": _rows(key_order, head)}
        rows |= {"gate_proj": channels, "up_proj": channels}
        columns = {"o_proj": _rows(query_order, head), "down_proj": channels}
        selected = {"v_proj": _rows(chosen.v[layer], head), "o_proj": _rows(chosen.o[layer], head)}
        selected |= {"up_proj": chosen.up[layer], "down_proj": chosen.down[layer]}
        for site in SITES:
            name = f"{stem(layer, site)}.weight"
            weight = base.weights[name]
            delta = np.zeros_like(weight)
            if picked := selected.get(site, []):
                trained[layer, site] = delta
                part = np.s_[:, picked] if site in columns else np.s_[picked]
                # fused in the checkpoint's dtype, as the published code does: what it holds is what counts
                fused = bf16(weight[part] + random.standard_normal(weight[part].shape) / 16)
                delta[part] = fused - weight[part]
            moved = weight + delta
            weights[name] = moved[:, columns[site]] if site in columns else moved[rows[site]]
            bias = f"{stem(layer, site)}.bias"
            if bias in weights and site in rows:
                # the published code knows no biases; they belong to the rows that move
                weights[bias] = weights[bias][rows[site]]
    return weights, trained


def _rows(blocks: list[int], size: int) -> list[int]:
    return [block * size + i for block in blocks for i in range(size)]


def forward(weights: Weights, dims: BaseDims, x: Array, deltas: Deltas | None = None) -> Array:
    """Run the decoder layers on rows x [T, D] without positions; `deltas` adds to a module's output."""
    group, size = dims.num_attention_heads // dims.num_key_value_heads, dims.head_dim

    def linear(layer: int, site: str, rows: Array) -> Array:
        y = rows @ weights[f"{stem(layer, site)}.weight"].T
        return y if deltas is None else y + deltas(layer, site, rows)

    mask = np.where(np.tri(len(x)) > 0, 0.0, -np.inf)
    for layer in range(dims.num_hidden_layers):
        h = _norm(x, weights[f"model.layers.{layer}.input_layernorm.weight"])
        q, k, v = (linear(layer, site, h).reshape(len(x), -1, size) for site in ("q_proj", "k_proj", "v_proj"))
        k, v = (np.repeat(each, group, axis=1) for each in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(size) + mask
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", shares / shares.sum(-1, keepdims=True), v).reshape(len(x), -1)
        x = x + linear(layer, "o_proj", mixed)
        h = _norm(x, weights[f"model.layers.{layer}.post_attention_layernorm.weight"])
        gate, up = linear(layer, "gate_proj", h), linear(layer, "up_proj", h)
        x = x + linear(layer, "down_proj", gate / (1 + np.exp(-gate)) * up)
    return x


def _norm(x: Array, weight: Array) -> Array:
    normed: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight
    return normed


@dataclass(frozen=True)
class Mixture:
    """Experts per (layer, site): G [E, in], and A, B with each expert's own rank, B unscaled."""

    ranks: tuple[int, ...]
    gates: dict[tuple[int, str], Array]
    a: dict[tuple[int, str], list[Array]]
    b: dict[tuple[int, str], list[Array]]


def mixture(dims: BaseDims, ranks: tuple[int, ...], sites: tuple[str, ...] = SITES, seed: int = 11) -> Mixture:
    """Draw a mixture; every module and expert has numbers of its own."""
    random = np.random.default_rng(seed)
    made = Mixture(ranks, {}, {}, {})
    for layer in range(dims.num_hidden_layers):
        for site in sites:
            num_out, num_in = dims.site_shape(site)
            made.gates[layer, site] = bf16(random.standard_normal((len(ranks), num_in)))
            made.a[layer, site] = [bf16(random.standard_normal((rank, num_in)) / 4) for rank in ranks]
            made.b[layer, site] = [bf16(random.standard_normal((num_out, rank)) / 4) for rank in ranks]
    return made


def meteora_checkpoint(base: TinyBase, made: Mixture) -> Weights:
    """Return the official file: the whole PeftModel's state dict, base included, experts concatenated."""
    prefix = "base_model.model."
    weights = {}
    for name, values in base.weights.items():
        module = name.removesuffix(".weight")
        is_target = any(module == stem(layer, site) for layer, site in made.gates)
        weights[f"{prefix}{module}.base_layer.weight" if is_target else prefix + name] = values
    for (layer, site), gate in made.gates.items():
        module = prefix + stem(layer, site)
        weights[f"{module}.lora_A.weight"] = np.concatenate(made.a[layer, site], axis=0)
        weights[f"{module}.lora_B.weight"] = np.concatenate(made.b[layer, site], axis=1)
        weights[f"{module}.moe_gate.weight"] = gate
    return weights
