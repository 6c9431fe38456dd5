"""The order in which an S2FT checkpoint holds heads and channels, told from the rows that S2FT never trains.

Its training moves the selected heads (of q, k, v, o) and channels (of gate, up, down) to the front and saves no order.
gate_proj, q_proj and k_proj are copied bit by bit, so each of their rows names its place in the base. Invariant: an
order that is returned is the only one that the untrained rows allow, and attention under it is the base's.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters_store.base import BaseDims
from adapters_store.convert.model_files import BitPair, Bits, ModelFiles
from adapters_store.errors import AmbiguousOrder, TrainedElsewhere, WrongBase

# position in the checkpoint -> position in the base
Order = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LayerOrder:
    """One layer's orders by rows: of q_proj's outputs, of k_proj's and v_proj's, and of the channels between them."""

    query: Order
    key: Order
    channel: Order


def read_order(layer: int, found: ModelFiles, base: ModelFiles, dims: BaseDims) -> LayerOrder:
    """Tell one layer's order.

    Raises:
        TrainedElsewhere: a row of an untrained layer is not the base's. AmbiguousOrder: the base has two equal rows.
        WrongBase: no row is the base's.
    """
    path = f"layers.{layer}"
    channel = _match(f"{path}.mlp.gate_proj.weight", found, base, 1)
    key = _match(f"{path}.self_attn.k_proj.weight", found, base, dims.head_dim)
    query = _match(f"{path}.self_attn.q_proj.weight", found, base, dims.head_dim)
    group = dims.num_attention_heads // dims.num_key_value_heads
    if not np.array_equal(query // group, np.repeat(key, group)):
        raise AmbiguousOrder(
            f"in layer {layer} the heads of q_proj and k_proj lie in orders that do not belong together", param=path
        )
    return LayerOrder(_by_rows(query, dims.head_dim), _by_rows(key, dims.head_dim), channel)


def _match(name: str, found: ModelFiles, base: ModelFiles, block: int) -> Order:
    """Return for each block of rows of the checkpoint which one of the base it is."""
    original = found.original(name)
    pair = BitPair.read(name, found, base)
    if pair.found.shape != pair.base.shape:
        raise WrongBase(
            f"{original} has shape {list(pair.found.shape)}; the base's has {list(pair.base.shape)}", param=original
        )
    places: dict[bytes, int] = {}
    for index, digest in enumerate(_digests(pair.base, block)):
        if places.setdefault(digest, index) != index:
            raise AmbiguousOrder(
                f"the base's {base.original(name)} has equal rows at {places[digest] * block} and {index * block}, "
                "so the order of the checkpoint cannot be told",
                param=original,
            )
    order = [places.get(digest) for digest in _digests(pair.found, block)]
    if all(place is None for place in order):
        raise WrongBase(f"no row of {original} is one of the base's: the checkpoint is of another base", param=original)
    if None in order:
        raise TrainedElsewhere(
            f"{original} was trained: its rows from {order.index(None) * block} on are none of the base's; S2FT leaves "
            "q_proj, k_proj and gate_proj alone, so the order of the checkpoint cannot be told",
            param=original,
        )
    matched = np.array(order, dtype=np.int64)
    if len(np.unique(matched)) != len(matched):
        raise AmbiguousOrder(f"{original} holds a row of the base twice", param=original)
    return matched


def _digests(bits: Bits, block: int) -> Iterator[bytes]:
    for begin in range(0, len(bits), block):
        yield hashlib.blake2b(np.ascontiguousarray(bits[begin : begin + block]).tobytes(), digest_size=16).digest()


def _by_rows(blocks: Order, size: int) -> Order:
    rows: Order = (blocks[:, None] * size + np.arange(size)).reshape(-1)
    return rows
