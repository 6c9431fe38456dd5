"""PEFT's LN_TUNING: the weights of norms, trained and saved whole.

Owns LN tuning's keys. Invariant: a norm's weight is stored as the file holds it, in a checkpoint's own terms.
"""

from dataclasses import dataclass

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config
from adapters_store.convert.model_factors import ModelFactors
from adapters_store.convert.outer_tensors import LN_PART
from adapters_store.convert.peft_keys import common_rules
from adapters_store.convert.peft_targets import DefaultTargets
from adapters_store.convert.peft_tensors import PeftTensors, TensorFile
from adapters_store.convert.saved_modules import norm_place, read_norm
from adapters_store.convert.tuner import PlannedModule, Served


@dataclass(frozen=True, slots=True)
class _Tuner:
    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return nothing: no linear layer changes."""
        tensors.take_shared()
        return {}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def read_model(self, tensors: PeftTensors, file: TensorFile, base: BaseDims) -> ModelFactors:
        """Return the norms' weights."""
        norms = {}
        for place, part in tensors.outer.names(LN_PART):
            slot = tensors.outer.take((place, part))
            assert slot is not None, "it was just listed"
            norms[norm_place(place)] = read_norm(place, slot, tensors, file, base)
        return ModelFactors(norms=norms)


def _read(_config: Config) -> _Tuner:
    return _Tuner()


LN_TUNING = Served(
    title="LN tuning",
    served_as="weights of norms, kept in fp32",
    limits="a norm that the base does not have",
    rules=common_rules("exclude_modules"),
    parts=frozenset(),
    read=_read,
    recorded=(),
    default_targets=DefaultTargets(
        ("input_layernorm", "post_attention_layernorm", "norm"), frozenset({"llama", "mistral", "gemma"})
    ),
    acts_on="norms",
)
