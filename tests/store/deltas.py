"""What an adapter image does, as dense matrices: the common ground on which the store is compared with PEFT."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from adapters_store.base import SITE_PATHS, BaseDims
from adapters_store.entries import SiteEntry
from adapters_store.float_bits import FILE_DTYPES, Float32, decode
from adapters_store.store import OpenAdapter

# by base-neutral module path: delta [out, in], bias [out] or None
Deltas = dict[str, tuple[Float32, Float32 | None]]
# by base-neutral module path: weight [out, in]
Weights = dict[str, Float32]


def stored_deltas(image: OpenAdapter, base: BaseDims, weights: Weights | None = None) -> Deltas:
    """Return the effective delta and bias of every module of an image; `weights` are the base's, for scales."""
    deltas: Deltas = {}
    dtype = FILE_DTYPES[image.dtype]
    item_bytes = 4 if dtype == "F32" else 2
    for entry in image.entries:
        num_out, num_in = base.site_shape(entry.site)

        def read(offset: int, *shape: int) -> Float32:
            end = offset + item_bytes * int(np.prod(shape))
            return decode(image.data[offset:end], dtype).reshape(shape)

        a = read(entry.a_offset, entry.rank, num_in)
        bt = read(entry.bt_offset, entry.rank, num_out)
        bias = None if entry.bias_offset is None else read(entry.bias_offset, num_out)
        path = f"layers.{entry.layer}.{SITE_PATHS[entry.site]}"
        delta = bt.astype(np.float64).T @ a.astype(np.float64)
        if entry.csr is not None:
            begins, cols = (
                np.frombuffer(image.data, "<i4", count=count, offset=offset)
                for count, offset in ((num_out + 1, entry.csr.indptr_offset), (entry.csr.nnz, entry.csr.col_offset))
            )
            values = read(entry.csr.val_offset, entry.csr.nnz)
            for row in range(num_out):
                part = slice(begins[row], begins[row + 1])
                delta[row, cols[part]] += values[part]
        if _is_framed(entry):
            assert weights is not None, "scales and rotations act on the base's weights"
            weight = weights[path].astype(np.float64)
            delta += _framed(image, entry, weight) - weight
        deltas[path] = (delta.astype(np.float32), bias)
    return deltas


def _is_framed(entry: SiteEntry) -> bool:
    places = (entry.out_scale_offset, entry.in_scale_offset, entry.blockdiag_offset, entry.c0_offset)
    return any(place is not None for place in places)


def _framed(image: OpenAdapter, entry: SiteEntry, weight: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return what the scales and rotations make of the base's weight."""
    num_out, num_in = weight.shape
    framed = weight.copy()
    if entry.blockdiag_offset is not None:
        size = entry.blockdiag
        flat = np.frombuffer(image.data, "<f4", count=num_in * size, offset=entry.blockdiag_offset)
        for at, block in enumerate(flat.reshape(-1, size, size)):
            part = slice(at * size, (at + 1) * size)
            framed[:, part] = weight[:, part] @ block.T
    framed *= scale_at(image, entry.in_scale_offset, num_in)
    framed *= scale_at(image, entry.out_scale_offset, num_out)[:, None]
    if entry.c0_offset is None:
        return framed
    half = entry.rot2_group // 2
    c0, c1 = scale_at(image, entry.c0_offset, num_out), scale_at(image, entry.c1_offset, num_out)
    turned = np.empty_like(framed)
    for row in range(num_out):
        is_first = row % entry.rot2_group < half
        turned[row] = c0[row] * framed[row] + c1[row] * (-framed[row + half] if is_first else framed[row - half])
    return turned


def scale_at(image: OpenAdapter, offset: int | None, width: int) -> Float32:
    """Return a scale, float32 whatever the image's dtype; ones where there is none."""
    if offset is None:
        return np.ones(width, np.float32)
    return np.frombuffer(image.data, "<f4", count=width, offset=offset)


def split_weights(model: nn.Module) -> Weights:
    """Return a model's linear layers by base-neutral path, fused ones split."""
    sizes = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    weights: Weights = {}
    for name, parameter in model.named_parameters():
        path = name.removeprefix("model.").removesuffix(".weight")
        stem, _, last = path.rpartition(".")
        if last not in sizes:
            weights[path] = parameter.detach().numpy()
            continue
        config: Any = model.config
        head_dim = config.hidden_size // config.num_attention_heads
        heads = {"q_proj": config.num_attention_heads}
        begin = 0
        for site in sizes[last]:
            is_attention = last == "qkv_proj"
            width = heads.get(site, config.num_key_value_heads) * head_dim if is_attention else config.intermediate_size
            weights[f"{stem}.{site}"] = parameter.detach()[begin : begin + width].numpy()
            begin += width
    return weights


def assert_equal_deltas(stored: Deltas, wanted: Deltas, rtol: float) -> None:
    """Compare all modules; `rtol` is relative to the largest value of each."""
    assert stored.keys() == wanted.keys()
    for path, (delta, bias) in wanted.items():
        np.testing.assert_allclose(stored[path][0], delta, rtol=0, atol=rtol * float(np.abs(delta).max()), err_msg=path)
        stored_bias = stored[path][1]
        assert (stored_bias is None) == (bias is None)
        if bias is not None and stored_bias is not None:
            np.testing.assert_allclose(stored_bias, bias, rtol=0, atol=rtol * float(np.abs(bias).max()), err_msg=path)


def fused_deltas(deltas: Deltas) -> Deltas:
    """Return the same as Phi-3's checkpoints name it: q, k, v stacked, and gate, up."""
    groups = {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "self_attn.o_proj": ("self_attn.o_proj",),
        "mlp.down_proj": ("mlp.down_proj",),
    }
    joined: Deltas = {}
    for layer in sorted({path.split(".")[1] for path in deltas}):
        for fused, parts in groups.items():
            pieces = [deltas[f"layers.{layer}.{part}"] for part in parts]
            biases = [bias for _, bias in pieces if bias is not None]
            bias = np.concatenate(biases) if biases else None
            joined[f"layers.{layer}.{fused}"] = (np.concatenate([delta for delta, _ in pieces]), bias)
    return joined
