"""PEFT's TINYLORA: `delta = B R A`, A and B from the base's SVD, `R = sum_u v[u] P[u]`, v shared by groups of modules.

Owns TinyLoRA's keys and formula, and which module uses which v. A, B and P are saved, so neither base nor random
numbers are needed. Invariant: groups count the targeted modules in the order in which transformers lists them.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import SITE_PATHS, BaseDims
from adapters_store.convert.config_values import Config, read_whole
from adapters_store.convert.peft_keys import common_rules, harmless, training_only, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile, check_shape
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.convert.vera import refuse_unsaved
from adapters_store.errors import UnsupportedAdapter
from adapters_store.safetensors_header import TensorSlot

_NAMES = ("tinylora_A", "tinylora_B", "tinylora_P")
_V = "tinylora_v"

# linear layers of one decoder layer as transformers lists them; Phi-3 names its output projection first
MODULE_ORDER = (*SITE_PATHS.values(),)
FUSED_MODULE_ORDER = ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True)
class _Delta:
    """a [r, in], b [out, r], p [u, r, r], v [u]."""

    a: Float64
    b: Float64
    p: Float64
    v: Float64

    def factors(self) -> Factors:
        core = np.tensordot(self.v, self.p, axes=1)
        magnitudes = np.abs(self.b) @ np.tensordot(np.abs(self.v), np.abs(self.p), axes=1)
        return Factors(self.a, self.b @ core, b_terms=magnitudes)

    def apply(self, x: Float64) -> Float64:
        hidden = x @ self.a.T
        y = np.zeros((len(x), len(self.b)))
        for weight, projection in zip(self.v, self.p, strict=True):
            y += weight * ((hidden @ projection.T) @ self.b.T)
        return y


@dataclass(frozen=True, slots=True)
class _Tuner:
    rank: int
    length: int
    tying: float

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return A [r, in], B [out, r], P [u, r, r] of every module, over the groups' v [u]."""
        is_fused = any(len(module.sites) > 1 for module in tensors.modules.values())
        order = FUSED_MODULE_ORDER if is_fused else MODULE_ORDER
        strangers = [module.path for module in tensors.modules.values() if module.module not in order]
        if strangers:
            raise UnsupportedAdapter(
                f"the file holds fused projections beside {strangers[0]}: no model that is served has both",
                param=strangers[0],
            )
        modules = sorted(tensors.modules.values(), key=lambda module: (module.layer, order.index(module.module)))
        groups = self._groups(len(modules))
        names = [f"{_V}.{number}" for number in range(groups[-1] + 1)]
        vectors = tensors.take_shared(*names)
        for vector in vectors:
            check_shape(vector, (self.length,))
        return {
            module.path: self._plan_module(module, vectors[group], base)
            for module, group in zip(modules, groups, strict=True)
        }

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _groups(self, num_modules: int) -> list[int]:
        """Return each module's group, as PEFT deals them out."""
        num_groups = max(1, round(num_modules * (1.0 - self.tying)))
        size = max(1, num_modules // num_groups)
        return [min(index // size, num_groups - 1) for index in range(num_modules)]

    def _plan_module(self, module: PeftModule, vector: TensorSlot, base: BaseDims) -> PlannedModule:
        slots = module.take(*_NAMES)
        num_out, num_in = module.dims(base)
        rank = min(self.rank, num_out, num_in)
        shapes = ((rank, num_in), (num_out, rank), (self.length, rank, rank))

        def load(file: TensorFile) -> _Delta:
            a, b, p, v = (file.floats(slot).astype(np.float64) for slot in (*slots, vector))
            return _Delta(a, b, p, v)

        return PlannedModule(module, rank, False, tuple(zip(slots, shapes, strict=True)), load)


def _read(config: Config) -> _Tuner:
    refuse_unsaved(config, "save_projection")
    tying = config.get("weight_tying", 0.0)
    if isinstance(tying, bool) or not isinstance(tying, int | float) or not 0 <= tying <= 1:
        raise UnsupportedAdapter(
            f"weight_tying is {ascii(tying)[:40]}; it must be a number from 0 to 1", param="weight_tying"
        )
    return _Tuner(read_whole(config, "r", 2), read_whole(config, "u", 64), float(tying))


TINYLORA = Served(
    title="TinyLoRA",
    served_as="low rank r: A, B sum(v P)",
    limits="projections that are not in the file: save with `save_projection=True`",
    rules=(
        *common_rules("layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out"),
        used("r", "rank of every module, or its smaller side"),
        used("u", "length of the trained vectors"),
        used("weight_tying", "how many modules share a vector"),
        used("save_projection", "must be true: P is read from the file"),
        harmless("projection_seed", "P is in the file", 42),
        training_only("init_weights", True),
        training_only("init_v_bound", 0.02),
        training_only("tinylora_dropout", 0.0),
    ),
    parts=frozenset(_NAMES),
    shared=frozenset({_V}),
    read=_read,
    recorded=("r", "u", "weight_tying"),
)
