"""PEFT's PREFIX_TUNING and CARTRIDGE: trained keys and values in front of every sequence, in every layer.

Owns their keys and how a row of the file is cut into layers. Invariant: keys are stored as they are, without rotation,
which is how PEFT hands them to the attention.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_whole
from adapters_store.convert.model_factors import ModelFactors
from adapters_store.convert.peft_keys import harmless, prompt_rules, training_only
from adapters_store.convert.peft_tensors import PeftTensors, TensorFile, check_shape
from adapters_store.convert.prompts import read_count
from adapters_store.convert.tuner import Array, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.float_bits import Float32

_ROWS = "prompt_embeddings"


@dataclass(frozen=True, slots=True)
class _Delta:
    """rows [n, 2 L K E]: of each virtual token the keys of layer 0, its values, the keys of layer 1 and so on."""

    rows: Float32
    layers: int
    heads: int
    size: int

    def factors(self) -> tuple[Array, Array]:
        cut = self.rows.reshape(len(self.rows), self.layers, 2, self.heads, self.size)
        keys, values = cut.transpose(2, 1, 0, 3, 4)
        return keys, values

    def apply(self, layer: int) -> tuple[Float64, Float64]:
        width = self.heads * self.size
        shape = (len(self.rows), self.heads, self.size)
        begin = 2 * layer * width
        keys = self.rows[:, begin : begin + width].astype(np.float64)
        values = self.rows[:, begin + width : begin + 2 * width].astype(np.float64)
        return keys.reshape(shape), values.reshape(shape)


@dataclass(frozen=True, slots=True)
class _Tuner:
    """What the config says of the base is None where it says nothing."""

    count: int
    layers: int | None
    heads: int | None
    width: int | None

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return nothing: no linear layer changes."""
        return {}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def read_model(self, tensors: PeftTensors, file: TensorFile, base: BaseDims) -> ModelFactors:
        """Return the keys and values."""
        (slot,) = tensors.take_shared(_ROWS)
        wanted = {
            "num_layers": (self.layers, base.num_hidden_layers),
            "num_attention_heads": (self.heads, base.num_key_value_heads),
            "token_dim": (self.width, base.num_key_value_heads * base.head_dim),
        }
        for key, (found, own) in wanted.items():
            if found is not None and found != own:
                raise UnsupportedAdapter(
                    f"{key} is {found}; the keys and values of this base need {own}. Was the adapter trained for "
                    "another base?",
                    param=key,
                )
        heads, size = base.num_key_value_heads, base.head_dim
        check_shape(slot, (self.count, base.num_hidden_layers * 2 * heads * size))
        return ModelFactors(prefix=_Delta(file.floats(slot), base.num_hidden_layers, heads, size))


def _read(config: Config) -> _Tuner:
    layers, heads, width = (
        None if config.get(key) is None else read_whole(config, key, 1)
        for key in ("num_layers", "num_attention_heads", "token_dim")
    )
    return _Tuner(read_count(config), layers, heads, width)


_SERVED_AS = "keys, not rotated, and values in front of every sequence"
_LIMITS = "more than 4096 virtual tokens, or than the context holds"
PREFIX_TUNING = Served(
    title="prefix tuning",
    served_as=_SERVED_AS,
    limits=_LIMITS,
    rules=(
        *prompt_rules(),
        harmless("prefix_projection", "the projection's answer is in the file"),
        harmless("encoder_hidden_size", "the projection's answer is in the file"),
        training_only("init_weights", True, "zero"),
    ),
    parts=frozenset(),
    shared=frozenset({_ROWS}),
    read=_read,
    recorded=("num_virtual_tokens",),
    acts_on="prompt",
)
CARTRIDGE = Served(
    title="cartridge",
    served_as=_SERVED_AS,
    limits=_LIMITS,
    rules=(*prompt_rules(), training_only("num_frozen_tokens", 1)),
    parts=frozenset(),
    shared=frozenset({_ROWS}),
    read=_read,
    recorded=("num_virtual_tokens",),
    acts_on="prompt",
)
