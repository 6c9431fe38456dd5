"""PEFT's ADALORA: `delta = s B diag(E) A` with s = lora_alpha / (init_r + 1e-5), over the ranks that pruning kept.

Owns AdaLoRA's keys and formula. Invariant: the scaling divides by init_r however many ranks are left, as PEFT's
`ranknum` does; the saved `rank_pattern` was applied to the file by PEFT already, so it only says what must be there.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_scale, read_whole
from adapters_store.convert.lora_keys import BASE_CHANGING_RULES, TOKEN_RULES, TRAINING_RULES, VARIANT_RULES
from adapters_store.convert.peft_keys import common_rules, harmless, refused, training_only, used
from adapters_store.convert.peft_patterns import MAX_ENTRIES
from adapters_store.convert.peft_targets import DefaultTargets
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import CorruptUpload, UnsupportedAdapter
from adapters_store.float_bits import Float32

_A, _E, _B = "lora_A", "lora_E", "lora_B"


@dataclass(frozen=True, slots=True)
class _Delta:
    """A [r, in], E [r, 1], B [out, r]; r is what pruning kept."""

    a: Float32
    e: Float32
    b: Float32
    scaling: float

    def factors(self) -> Factors:
        return Factors(self.a, self.b.astype(np.float64) * (self.e[:, 0].astype(np.float64) * self.scaling))

    def apply(self, x: Float64) -> Float64:
        weighted = self.a.astype(np.float64) * self.e.astype(np.float64)
        return (x @ weighted.T @ self.b.astype(np.float64).T) * self.scaling


@dataclass(frozen=True, slots=True)
class _Tuner:
    """`kept` holds the number of ranks that pruning left, by module path; all of init_r where it is silent."""

    init_rank: int
    alpha: float
    kept: dict[str, int]

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return A [r, in], E [r, 1], B [out, r] for every module."""
        tensors.take_shared()
        strangers = [path for path in self.kept if path not in tensors.modules]
        if strangers:
            raise CorruptUpload(
                f"rank_pattern names {ascii(strangers[0])[:80]}, which the file has no tensors for",
                param="rank_pattern",
            )
        return {path: self._plan_module(module, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: every entry of AdaLoRA's rank_pattern must name a module."""
        return ()

    def _plan_module(self, module: PeftModule, base: BaseDims) -> PlannedModule:
        a, e, b = module.take(_A, _E, _B)
        rank = self.kept.get(module.path, self.init_rank)
        num_out, num_in = module.dims(base)
        # PEFT adds this against a division by zero
        scaling = self.alpha / (self.init_rank + 1e-5)

        def load(file: TensorFile) -> _Delta:
            return _Delta(file.floats(a), file.floats(e), file.floats(b), scaling)

        return PlannedModule(module, rank, False, ((a, (rank, num_in)), (e, (rank, 1)), (b, (num_out, rank))), load)


def _read(config: Config) -> _Tuner:
    init_rank = read_whole(config, "init_r", 12)
    return _Tuner(init_rank, read_scale(config, "lora_alpha", 8), _kept(config, init_rank))


def _kept(config: Config, init_rank: int) -> dict[str, int]:
    """Read which ranks are left: `{"model.layers.0.self_attn.q_proj.lora_E": [true, false, ...], ...}`."""
    pattern = config.get("rank_pattern")
    if pattern is None:
        return {}
    if not isinstance(pattern, dict) or len(pattern) > MAX_ENTRIES:
        raise UnsupportedAdapter(f"rank_pattern must map at most {MAX_ENTRIES} modules to lists", param="rank_pattern")
    kept = {}
    for name, mask in pattern.items():
        is_mask = isinstance(mask, list) and len(mask) == init_rank and all(isinstance(item, bool) for item in mask)
        if not is_mask or not isinstance(mask, list) or not name.endswith(f".{_E}"):
            raise UnsupportedAdapter(
                f"rank_pattern must map modules' lora_E to lists of {init_rank} booleans, as PEFT saves it",
                param="rank_pattern",
            )
        kept[name.removesuffix(f".{_E}")] = sum(item is True for item in mask)
    return kept


_UNREAD = "PEFT's AdaLoRA does not read it"

ADALORA = Served(
    title="AdaLoRA",
    served_as="low rank of what pruning kept: A, B diag(E) lora_alpha / (init_r + 1e-5)",
    limits="as LoRA",
    rules=(
        *common_rules("exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out"),
        used("init_r", "the scaling divides by it, however many ranks are left"),
        used("lora_alpha", "scaling is lora_alpha / (init_r + 1e-5)"),
        used("rank_pattern", "the ranks that pruning kept, already applied to the tensors; must agree with them"),
        harmless("r", _UNREAD, 8),
        harmless("use_rslora", _UNREAD),
        harmless("alpha_pattern", _UNREAD),
        harmless("lora_bias", _UNREAD),
        training_only("init_lora_weights", True),
        training_only("target_r", 8),
        training_only("tinit", 0),
        training_only("tfinal", 0),
        training_only("deltaT", 1),
        training_only("beta1", 0.85),
        training_only("beta2", 0.85),
        training_only("orth_reg_weight", 0.5),
        training_only("total_step"),
        refused("use_dora", "PEFT's AdaLoRA has no DoRA: remove it"),
        refused("loftq_config", "LoftQ changes the base weights: train without it"),
        *TOKEN_RULES,
        *TRAINING_RULES,
        *BASE_CHANGING_RULES,
        *VARIANT_RULES,
    ),
    parts=frozenset({_A, _E, _B}),
    read=_read,
    recorded=("init_r", "lora_alpha"),
    default_targets=DefaultTargets(
        ("q_proj", "v_proj"), frozenset({"llama", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"})
    ),
    allows_empty=True,
)
