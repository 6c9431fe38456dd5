"""PEFT's LOHA: `delta = alpha / r (W1a W1b) o (W2a W2b)`, the elementwise product of two rank-r matrices.

Owns LoHa's keys and formula. Invariant: by the Khatri-Rao identity the product is exactly of rank r^2: column (i, j) of
B is W1a[:, i] o W2a[:, j], row (i, j) of A is W1b[i] o W2b[j]. No value is a sum, so nothing but one rounding is lost.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import (
    Config,
    read_rank_pattern,
    read_scale,
    read_scale_pattern,
    read_whole,
)
from adapters_store.convert.peft_keys import Rules, common_rules, harmless, training_only, used
from adapters_store.convert.peft_patterns import Pattern
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served

_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
# rows of the delta that are held at once: a whole one has gigabytes on large bases
_BLOCK_ROWS = 512

# also LoKr's
LYCORIS_RULES: Rules = (
    *common_rules("exclude_modules", "layers_to_transform", "layers_pattern", "init_weights"),
    used("r", "rank of every module that rank_pattern does not name"),
    used("alpha", "scaling is alpha / r"),
    used("rank_pattern", "rank per module; plain dotted names only, first match wins as in PEFT"),
    used("alpha_pattern", "alpha per module; plain dotted names only, first match wins as in PEFT"),
    training_only("rank_dropout", 0.0),
    training_only("module_dropout", 0.0),
    harmless("use_effective_conv2d", "concerns convolutions; the bases here have none"),
)


@dataclass(frozen=True, slots=True)
class LycorisScaling:
    """Rank and scaling per module, as LoHa and LoKr share them."""

    rank: int
    alpha: float
    rank_pattern: Pattern[int]
    alpha_pattern: Pattern[float]

    def of(self, path: str) -> tuple[int, float]:
        """Return the module's rank r, and alpha / r."""
        rank = self.rank_pattern.of(path, self.rank)
        return rank, self.alpha_pattern.of(path, self.alpha) / rank

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return the pattern keys that decide nothing for these modules."""
        return self.rank_pattern.unused(paths) + self.alpha_pattern.unused(paths)


def read_lycoris_scaling(config: Config) -> LycorisScaling:
    """Read r, alpha and their patterns; raises UnsupportedAdapter."""
    return LycorisScaling(
        rank=read_whole(config, "r", 8),
        alpha=read_scale(config, "alpha", 8),
        rank_pattern=read_rank_pattern(config, "rank_pattern"),
        alpha_pattern=read_scale_pattern(config, "alpha_pattern"),
    )


@dataclass(frozen=True, slots=True)
class _Delta:
    """w1_a, w2_a [out, r]; w1_b, w2_b [r, in]."""

    w1_a: Float64
    w1_b: Float64
    w2_a: Float64
    w2_b: Float64
    scaling: float

    def factors(self) -> Factors:
        a = self.w1_b[:, None, :] * self.w2_b[None, :, :]
        b = self.w1_a[:, :, None] * self.w2_a[:, None, :] * self.scaling
        return Factors(a.reshape(-1, a.shape[2]), b.reshape(b.shape[0], -1))

    def apply(self, x: Float64) -> Float64:
        y = np.empty((len(x), len(self.w1_a)))
        for begin in range(0, len(self.w1_a), _BLOCK_ROWS):
            rows = slice(begin, begin + _BLOCK_ROWS)
            delta = (self.w1_a[rows] @ self.w1_b) * (self.w2_a[rows] @ self.w2_b) * self.scaling
            y[:, rows] = x @ delta.T
        return y


@dataclass(frozen=True, slots=True)
class _Tuner:
    scaling: LycorisScaling

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return the four factors of every module."""
        tensors.take_shared()
        return {path: self._plan_module(module, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return the pattern keys that decide nothing for these modules."""
        return self.scaling.unused(paths)

    def _plan_module(self, module: PeftModule, base: BaseDims) -> PlannedModule:
        slots = module.take(*_NAMES)
        rank, scaling = self.scaling.of(module.path)
        num_out, num_in = module.dims(base)
        shapes = [(num_out, rank), (rank, num_in)] * 2

        def load(file: TensorFile) -> _Delta:
            w1_a, w1_b, w2_a, w2_b = (file.floats(slot).astype(np.float64) for slot in slots)
            return _Delta(w1_a, w1_b, w2_a, w2_b, scaling)

        return PlannedModule(module, rank * rank, False, tuple(zip(slots, shapes, strict=True)), load)


def _read(config: Config) -> _Tuner:
    return _Tuner(read_lycoris_scaling(config))


LOHA = Served(
    title="LoHa",
    served_as="low rank r^2 by the Khatri-Rao identity",
    limits="r^2 above the limit on products of ranks: train with a smaller r. Convolutions (`hada_t1`) are not served",
    rules=LYCORIS_RULES,
    parts=frozenset(_NAMES),
    read=_read,
    recorded=("r", "alpha", "rank_pattern", "alpha_pattern"),
    is_product=True,
)
