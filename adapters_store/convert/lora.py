"""PEFT's LORA: `delta = s B A`, with s = alpha / r or alpha / sqrt(r) per module, and s times a bias of lora_B; DoRA.

Owns LoRA's keys, its refusals of what changes the base, and its formula. Invariant: the scaling is folded into B (and
the bias) in float32 exactly once.
"""

import math
from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.base_weights import BaseWeights
from adapters_store.convert.config_values import (
    Config,
    read_flag,
    read_rank_pattern,
    read_scale,
    read_scale_pattern,
    read_whole,
)
from adapters_store.convert.dora import DoraDelta
from adapters_store.convert.peft_keys import common_rules, harmless, refused, training_only, used
from adapters_store.convert.peft_patterns import Pattern
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import CorruptUpload, UnsupportedAdapter
from adapters_store.float_bits import Float32

_A, _B, _BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
# the second: PEFT of 2024
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_KEEPS_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})

# also AdaLoRA's, which inherits LoRA's config
BASE_CHANGING_RULES = (
    refused("trainable_token_indices", "trained token rows are not served yet: train without them"),
    refused("alora_invocation_tokens", "aLoRA is not served yet: train a plain LoRA"),
    refused("layer_replication", "a base with repeated layers is another model: train without it"),
    refused("target_parameters", "LoRA on parameters of expert layers is not served yet: target linear layers"),
    refused("megatron_config", "Megatron's parallel layers are not served: save the adapter without them"),
    refused("monteclora_config", "MonteCLoRA samples while it runs: train a plain LoRA"),
    refused("arrow_config", "Arrow mixtures are not served yet: upload the LoRAs one by one"),
    refused("kasa_config", "KaSA changes the base weights: train a plain LoRA"),
    refused("use_bdlora", "block-diagonal LoRA is not served yet: train without use_bdlora"),
    refused("use_qalora", "QA-LoRA is not served yet: train without use_qalora"),
)
TRAINING_RULES = (
    training_only("lora_dropout", 0.0),
    training_only("eva_config"),
    training_only("corda_config"),
    training_only("lora_ga_config"),
    training_only("velora_config"),
    harmless("megatron_core", "means nothing without megatron_config", "megatron.core"),
    harmless("qalora_group_size", "means nothing without use_qalora", 16),
    harmless("ensure_weight_tying", "means nothing without modules_to_save"),
    harmless("runtime_config", "says how PEFT runs it"),
)


@dataclass(frozen=True, slots=True)
class _Delta:
    """The values of one module, unscaled."""

    a: Float32
    b: Float32
    bias: Float32 | None
    scaling: float

    def factors(self) -> Factors:
        bias = None if self.bias is None else folded(self.bias, self.scaling)
        return Factors(self.a, folded(self.b, self.scaling), bias)

    def apply(self, x: Float64) -> Float64:
        b = self.b.astype(np.float64)
        y = (x @ self.a.astype(np.float64).T) @ b.T * self.scaling
        return y if self.bias is None else y + self.bias.astype(np.float64) * self.scaling


@dataclass(frozen=True, slots=True)
class LoraTuner:
    """How a LoRA acts: rank and scaling per module."""

    rank: int
    alpha: float
    use_rslora: bool
    lora_bias: bool
    rank_pattern: Pattern[int]
    alpha_pattern: Pattern[float]
    use_dora: bool = False

    def scaling_of(self, path: str) -> float:
        """Return what PEFT multiplies B A with."""
        alpha, rank = self.alpha_pattern.of(path, self.alpha), self.rank_pattern.of(path, self.rank)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return A [r, in], B [out, r] and perhaps a bias [out] or a magnitude [out] for every module."""
        tensors.take_shared()
        plan = self._plan_dora if self.use_dora else self._plan_module
        return {path: plan(module, base, tensors.weights) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return the pattern keys that decide nothing for these modules."""
        return self.rank_pattern.unused(paths) + self.alpha_pattern.unused(paths)

    def _plan_dora(self, module: PeftModule, base: BaseDims, weights: BaseWeights) -> PlannedModule:
        spelling = next((name for name in _MAGNITUDES if name in module.parts), _MAGNITUDES[0])
        a, b, magnitude = module.take(_A, _B, spelling)
        rank, scaling = self.rank_pattern.of(module.path, self.rank), self.scaling_of(module.path)
        num_out, num_in = module.dims(base)

        def load(file: TensorFile) -> DoraDelta:
            values = file.floats(a), file.floats(b)
            plain = _Delta(*values, None, scaling)
            return DoraDelta(plain, *values, scaling, file.floats(magnitude), module, weights)

        shapes = ((a, (rank, num_in)), (b, (num_out, rank)), (magnitude, (num_out,)))
        return PlannedModule(module, rank, False, shapes, load, has_out_scale=True)

    def _plan_module(self, module: PeftModule, base: BaseDims, _: BaseWeights) -> PlannedModule:
        path = module.path
        if not self.lora_bias and _BIAS in module.parts:
            raise UnsupportedAdapter(f"the file has a {_BIAS} for {path} but lora_bias is not true", param="lora_bias")
        if self.lora_bias and _BIAS not in module.parts:
            raise CorruptUpload(f"lora_bias is true but the file has no {_BIAS} for {path}", param=path)
        a, b, *biases = module.take(*(_A, _B, _BIAS) if self.lora_bias else (_A, _B))
        rank, scaling = self.rank_pattern.of(path, self.rank), self.scaling_of(path)
        num_out, num_in = module.dims(base)
        bias_shapes = [(slot, (num_out,)) for slot in biases]

        def load(file: TensorFile) -> _Delta:
            bias = file.floats(biases[0]) if biases else None
            return _Delta(file.floats(a), file.floats(b), bias, scaling)

        return PlannedModule(
            module, rank, self.lora_bias, ((a, (rank, num_in)), (b, (num_out, rank)), *bias_shapes), load
        )


def folded(values: Float32, scaling: float) -> Float32:
    """Return values times scaling, multiplied in float32; overflow is infinity, refused by the writer."""
    with np.errstate(over="ignore"):
        scaled: Float32 = values * np.float32(scaling)
    return scaled


def _read(config: Config) -> LoraTuner:
    init = config.get("init_lora_weights", True)
    keeps_base = isinstance(init, bool) or init is None or (isinstance(init, str) and init.lower() in _KEEPS_BASE)
    if not keeps_base:
        raise UnsupportedAdapter(
            f"init_lora_weights is {ascii(init)[:40]}, which changed the base weights while training; save the adapter "
            "with path_initial_model_for_weight_conversion, which turns it into a plain LoRA of twice the rank",
            param="init_lora_weights",
        )
    lora_bias, use_dora = read_flag(config, "lora_bias"), read_flag(config, "use_dora")
    if lora_bias and use_dora:
        raise UnsupportedAdapter("lora_bias is true beside use_dora, which PEFT does not define", param="lora_bias")
    return LoraTuner(
        rank=read_whole(config, "r", 8),
        alpha=read_scale(config, "lora_alpha", 8),
        use_rslora=read_flag(config, "use_rslora"),
        lora_bias=lora_bias,
        rank_pattern=read_rank_pattern(config, "rank_pattern"),
        alpha_pattern=read_scale_pattern(config, "alpha_pattern"),
        use_dora=use_dora,
    )


LORA = Served(
    title="LoRA, rsLoRA, DoRA",
    served_as="low rank r, scaling alpha / r or alpha / sqrt(r) folded into B; bias of lora_B. DoRA: its scale of the "
    "outputs is computed from the base's weights and kept in fp32",
    limits="inits that change the base (`pissa`, `olora`, `corda`, `lora_ga`, `loftq`): save with "
    "`path_initial_model_for_weight_conversion`. DoRA without the base's weights at hand, or with lora_bias. aLoRA, "
    "KaSA, QA-LoRA, BD-LoRA, Arrow: not yet, see the keys",
    rules=(
        *common_rules("exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out"),
        used("r", "rank of every module that rank_pattern does not name"),
        used("lora_alpha", "scaling is lora_alpha / r, folded into B once"),
        used("use_rslora", "scaling is lora_alpha / sqrt(r)"),
        used("rank_pattern", "rank per module; plain dotted names only, first match wins as in PEFT"),
        used("alpha_pattern", "lora_alpha per module; plain dotted names only, first match wins as in PEFT"),
        used("lora_bias", "bias of lora_B, scaled like B"),
        used("use_dora", "scale of the outputs: the magnitude by the length of each row of W + s B A"),
        used(
            "init_lora_weights", "kinds that leave the base as it is; pissa, olora, corda, lora_ga, loftq are refused"
        ),
        *TRAINING_RULES,
        training_only("loftq_config"),
        harmless("merge_weights", "PEFT of 2023; says how it was run"),
        refused(
            "enable_lora", "LoRA on slices of a fused layer (PEFT of 2023) is not served: save it with a newer PEFT"
        ),
        *BASE_CHANGING_RULES,
    ),
    parts=frozenset({_A, _B, _BIAS, *_MAGNITUDES}),
    read=_read,
    recorded=("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "use_dora"),
)
