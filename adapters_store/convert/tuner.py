"""What the converter must know of a kind of adapter: the contract between one tuner's file and the conversion.

Owns the types only. Invariant: `factors` (what is stored) and `apply` (the source's own formula) of a `Delta` are
written independently of each other, so that comparing them proves the conversion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config
from adapters_store.convert.peft_keys import Rules
from adapters_store.convert.peft_targets import MOST_TARGETS, DefaultTargets
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.safetensors_header import TensorSlot

Float64 = npt.NDArray[np.float64]
Array = npt.NDArray[np.float32] | Float64


@dataclass(frozen=True, slots=True)
class SparseValues:
    """Single entries of a weight: rows and cols int64 [n], by rows, then columns, no place twice; values [n]."""

    rows: npt.NDArray[np.int64]
    cols: npt.NDArray[np.int64]
    values: Array


@dataclass(frozen=True, slots=True)
class Rotation:
    """`c0 * u + c1 * partner(u)`: in every `group` of outputs the partner of the halves (u1, u2) is (-u2, u1)."""

    c0: Array
    c1: Array
    group: int


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's delta as it is served, every scaling in it: `y = (x a^T) b^T + x sparse^T + bias`.

    The rest frames the base's product, before its own bias: `rot2(out_scale * (W blocks(in_scale * x)))`, with blocks
    [in / b, b, b] and `x' = x blocks`, group by group.
    a [rank, in], b [out, rank], bias [out], float32 or float64; the writer rounds each value to float32 once. Where
    the values of a or b are themselves sums, `a_terms` and `b_terms` are the sums of their terms' absolute values.
    """

    a: Array
    b: Array
    bias: Array | None = None
    a_terms: Array | None = None
    b_terms: Array | None = None
    out_scale: Array | None = None
    in_scale: Array | None = None
    sparse: SparseValues | None = None
    blocks: Array | None = None
    rotation: Rotation | None = None


class Delta(Protocol):
    """One module's trained values, read from the file."""

    def factors(self) -> Factors:
        """Return what is served."""
        ...

    def apply(self, x: Float64) -> Float64:
        """Return what PEFT adds to the layer's output [T, out] for x [T, in], by PEFT's formula, in float64.

        What scales change of the base's own product is left out; see `ScaledDelta`.
        """
        ...


@runtime_checkable
class ScaledDelta(Delta, Protocol):
    """A delta that scales the base's product too."""

    def scales(self) -> tuple[Float64 | None, Float64 | None]:
        """Return the scales of outputs [out] and inputs [in] by PEFT's formula, in float64; None: not scaled."""
        ...


@runtime_checkable
class TurningDelta(Delta, Protocol):
    """A delta that rotates what the base's product reads or what comes out of it."""

    def turned_inputs(self, x: Float64) -> Float64:
        """Return what the base's product reads instead of x [T, in], by PEFT's formula, in float64; scales left out."""
        ...

    def turned_outputs(self, u: Float64) -> Float64:
        """Return what becomes of the base's product u [T, out], by PEFT's formula, in float64; scales left out."""
        ...


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """One module before its values are read: its rank when served, and the shape that each of its tensors must have.

    `block` is the size of the blocks that inputs are turned in, `rotation_group` the group of outputs that rotate; 0:
    none. `has_sparse`: single entries of the weight change.
    """

    source: PeftModule
    rank: int
    has_bias: bool
    shapes: tuple[tuple[TensorSlot, tuple[int, ...]], ...]
    load: Callable[[TensorFile], Delta]
    has_out_scale: bool = False
    has_in_scale: bool = False
    has_sparse: bool = False
    block: int = 0
    rotation_group: int = 0

    @property
    def acts(self) -> bool:
        """Is there any op to serve?"""
        has_frame = self.has_out_scale or self.has_in_scale or self.block > 0 or self.rotation_group > 0
        return self.rank > 0 or self.has_bias or self.has_sparse or has_frame


class Tuner(Protocol):
    """A kind of adapter with its config: how its tensors act."""

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return every module of the file by path; raises AdapterRefused where tensors lack, disagree or are extra."""
        ...

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return the pattern keys that decide nothing for these modules."""
        ...


@dataclass(frozen=True, slots=True)
class Served:
    """A kind of adapter that is converted exactly.

    `parts` are the names of a module's tensors, `shared` those of the whole model; `integers` names those of both that
    hold indices. `recorded` are the config's keys that go into the manifest. `is_product` says that the served rank is
    a product of ranks, which has a limit of its own. `served_as` and `limits` are for the page about adapters.
    `acts_on`: what its targets name: "linear" layers, "norms", "tables" of tokens; a "prompt" has none.
    """

    title: str
    served_as: str
    limits: str
    rules: Rules
    parts: frozenset[str]
    read: Callable[[Config], Tuner]
    recorded: tuple[str, ...]
    shared: frozenset[str] = frozenset()
    integers: frozenset[str] = frozenset()
    default_targets: DefaultTargets = MOST_TARGETS
    is_product: bool = False
    allows_empty: bool = False
    acts_on: str = "linear"


@dataclass(frozen=True, slots=True)
class Refused:
    """A kind of adapter that is not converted: why, and what its owner can do."""

    title: str
    reason: str
    way_out: str
