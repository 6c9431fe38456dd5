"""The factors of a LoRA as its file may hold them: plain, in blocks on the diagonal, and those of the embedding.

Owns the values of one module and their formula. Invariant: the scaling is folded into B (and the bias) in float32
exactly once.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.convert.config_values import Config, read_flag, read_whole
from adapters_store.convert.model_factors import Ids
from adapters_store.convert.peft_patterns import MAX_ENTRIES
from adapters_store.convert.tuner import Array, Factors, Float64
from adapters_store.errors import SwappedFactors, UnsupportedAdapter, WrongBase
from adapters_store.float_bits import Float32
from adapters_store.safetensors_header import TensorSlot
from adapters_store.strict_json import Json

_KEY = "use_bdlora"
_BLOCK_KEYS = frozenset({"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"})


@dataclass(frozen=True, slots=True)
class LoraValues:
    """The values of one module, unscaled: a [r, in], b [out, r], bias [out]; KaSA's diag [r] between them."""

    a: Float32
    b: Float32
    bias: Float32 | None
    scaling: float
    diag: Float32 | None = None

    def factors(self) -> Factors:
        """Return what is served."""
        bias = None if self.bias is None else folded(self.bias, self.scaling)
        b: Array = self.b if self.diag is None else self.b.astype(np.float64) * self.diag
        return Factors(self.a, folded(self.b, self.scaling) if self.diag is None else b * self.scaling, bias)

    def apply(self, x: Float64) -> Float64:
        """Return what PEFT adds."""
        hidden = x @ self.a.astype(np.float64).T
        if self.diag is not None:
            hidden = hidden * self.diag.astype(np.float64)
        y: Float64 = hidden @ self.b.astype(np.float64).T * self.scaling
        return y if self.bias is None else y + self.bias.astype(np.float64) * self.scaling


@dataclass(frozen=True, slots=True)
class EmbeddingValues:
    """The LoRA of the embedding, unscaled: a [r, V], b [H, r]."""

    a: Float32
    b: Float32
    scaling: float

    def factors(self) -> tuple[Array, Array]:
        """Return AT [V, r] and BT [r, H]."""
        return self.a.T, folded(self.b, self.scaling).T

    def apply(self, token_ids: Ids) -> Float64:
        """Return what PEFT adds to the embeddings of these tokens."""
        columns = self.a[:, token_ids].astype(np.float64)
        return (self.b.astype(np.float64) @ columns).T * self.scaling


@dataclass(frozen=True, slots=True)
class Blocks:
    """BD-LoRA: modules whose path holds a text of `in_a` have A in blocks on the diagonal, those of `in_b` B."""

    in_a: tuple[str, ...] = ()
    in_b: tuple[str, ...] = ()
    count: int = 1
    is_strict: bool = False

    def of(self, path: str) -> str | None:
        """Return which factor is in blocks, "A" or "B", None: neither."""
        has_a, has_b = (any(name in path for name in names) for names in (self.in_a, self.in_b))
        if (has_a and has_b) or (self.is_strict and not has_a and not has_b):
            both = "both lists" if has_a else "neither list, and match_strict is true"
            raise UnsupportedAdapter(f"{_KEY} names {path} in {both}", param=_KEY)
        return "A" if has_a else "B" if has_b else None

    def shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape in the file of a factor in blocks; raises UnsupportedAdapter when they do not divide it."""
        if shape[0] % self.count or shape[1] % self.count:
            raise UnsupportedAdapter(f"{_KEY} has {self.count} blocks, which do not divide {list(shape)}", param=_KEY)
        return shape[0], shape[1] // self.count

    def densified(self, blocks: Float32) -> Float32:
        """Return the whole factor of what the file holds."""
        height, width = len(blocks) // self.count, blocks.shape[1]
        whole = np.zeros((len(blocks), width * self.count), np.float32)
        for at in range(self.count):
            rows = slice(at * height, (at + 1) * height)
            whole[rows, at * width : (at + 1) * width] = blocks[rows]
        return whole


NO_BLOCKS = Blocks()


def read_blocks(value: Json) -> Blocks:
    """Read `use_bdlora`; raises UnsupportedAdapter."""
    if value in (None, False, {}):
        return NO_BLOCKS
    if not isinstance(value, dict) or not value.keys() <= _BLOCK_KEYS:
        raise UnsupportedAdapter(f"{_KEY} must be an object with {', '.join(sorted(_BLOCK_KEYS))}", param=_KEY)
    inner: Config = value
    try:
        count = read_whole(inner, "nblocks", 1)
        is_strict = read_flag(inner, "match_strict", default=True)
    except UnsupportedAdapter as error:
        raise UnsupportedAdapter(f"{_KEY}: {error.message}", param=_KEY) from None
    return Blocks(_texts(inner, "target_modules_bd_a"), _texts(inner, "target_modules_bd_b"), count, is_strict)


def folded(values: Float32, scaling: float) -> Float32:
    """Return values times scaling, multiplied in float32; overflow is infinity, refused by the writer."""
    with np.errstate(over="ignore"):
        scaled: Float32 = values * np.float32(scaling)
    return scaled


def refuse_other_base(a: TensorSlot, b: TensorSlot, wanted_a: tuple[int, int], wanted_b: tuple[int, int]) -> None:
    """Raise WrongBase when A or B is as wide as no layer of this base at this place."""
    for slot, axis, wanted in ((a, 1, wanted_a), (b, 0, wanted_b)):
        if len(slot.shape) == 2 and slot.shape[axis] != wanted[axis]:
            raise WrongBase(
                f"{slot.name} has shape {list(slot.shape)}; the config and this base need {list(wanted)}: the adapter "
                "was trained for another base, upload it to a server of that one",
                param=slot.name,
            )


def refuse_swapped(a: TensorSlot, b: TensorSlot, wanted_a: tuple[int, int], wanted_b: tuple[int, int]) -> None:
    """Raise SwappedFactors when A has B's shape and B A's, or one of them is transposed."""
    if (a.shape, b.shape) == (wanted_a, wanted_b):
        return
    turned = [slot for slot, wanted in ((a, wanted_a), (b, wanted_b)) if slot.shape == wanted[::-1] != wanted]
    is_swapped = (a.shape, b.shape) == (wanted_b, wanted_a)
    if is_swapped or turned:
        problem = "each has the other's shape" if is_swapped else f"{turned[0].name} is transposed"
        raise SwappedFactors(
            f"{a.name} has shape {list(a.shape)} and {b.name} {list(b.shape)}: {problem}; A must be {list(wanted_a)} "
            f"and B {list(wanted_b)}",
            param=a.name if is_swapped else turned[0].name,
        )


def _texts(inner: Config, key: str) -> tuple[str, ...]:
    value = inner.get(key) or []
    texts = [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(texts) != len(value) or len(value) > MAX_ENTRIES:
        raise UnsupportedAdapter(f"{_KEY}.{key} must be a list of at most {MAX_ENTRIES} texts", param=_KEY)
    return tuple(texts)
