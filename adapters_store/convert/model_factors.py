"""What an adapter of PEFT's does outside the linear layers, with values: what is stored, and the source's own formula.

Owns the types only. Invariant: where a stored value is computed, the type holds PEFT's formula too, written apart from
it, so that comparing them proves the conversion.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from adapters_store.base import BaseDims
from adapters_store.convert.peft_tensors import PeftTensors, TensorFile
from adapters_store.convert.tuner import Array, Float64, Tuner

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenValues:
    """Rows [n, H] that replace those of the tokens ids [n], which increase strictly."""

    ids: Ids
    rows: Array


class EmbeddingDelta(Protocol):
    """What is added to the embeddings of tokens, before the base scales them."""

    def factors(self) -> tuple[Array, Array]:
        """Return what is stored: AT [V, r] and BT [r, H], the scaling in one of them."""
        ...

    def apply(self, token_ids: Ids) -> Float64:
        """Return what PEFT adds to the embeddings of these tokens [T, H]."""
        ...


class PromptDelta(Protocol):
    """Embeddings in front of every sequence."""

    def factors(self) -> Array:
        """Return the rows [n, H] that are stored, as the base's layers read them."""
        ...

    def apply(self) -> Float64:
        """Return PEFT's prompt [n, H]."""
        ...


class PrefixDelta(Protocol):
    """Keys and values in front of every sequence."""

    def factors(self) -> tuple[Array, Array]:
        """Return the keys and values [L, n, K, E] that are stored; keys are not rotated."""
        ...

    def apply(self, layer: int) -> tuple[Float64, Float64]:
        """Return PEFT's keys and values [n, K, E] of one layer."""
        ...


@dataclass(frozen=True, slots=True)
class ModelFactors:
    """norms by (layer, name), the last norm as (-1, "norm"); token rows by target: "embed", "lm_head" or "both"."""

    norms: Mapping[tuple[int, str], Array] = field(default_factory=dict)
    token_rows: Mapping[str, TokenValues] = field(default_factory=dict)
    embedding: EmbeddingDelta | None = None
    prompt: PromptDelta | None = None
    prefix: PrefixDelta | None = None

    @property
    def is_empty(self) -> bool:
        """Is there nothing to do outside the linear layers?"""
        return self == ModelFactors()


@runtime_checkable
class ModelTuner(Protocol):
    """A kind of adapter that acts outside the linear layers."""

    def read_model(self, tensors: PeftTensors, file: TensorFile, base: BaseDims) -> ModelFactors:
        """Take this kind's tensors out of `tensors.outer` and read them; raises AdapterRefused."""
        ...


@runtime_checkable
class TaskTuner(Tuner, Protocol):
    """A kind whose file holds several tasks, one of which is served."""

    @property
    def num_tasks(self) -> int:
        """How many there are; 0: this file has none."""
        ...

    def choose(self, task_id: int) -> Tuner:
        """Return the same with this task chosen."""
        ...
