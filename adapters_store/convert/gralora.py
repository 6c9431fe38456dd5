"""PEFT's GRALORA: k by k blocks of the layer, each with a low rank r / k of its own, and perhaps a plain LoRA beside.

Owns GraLoRA's keys and formula. Invariant: rank row (j, n, s) of the served factors belongs to input block n, output
block j and s-th rank of that block, so k r rows of factors that are zero outside their block.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_scale, read_whole
from adapters_store.convert.peft_keys import common_rules, training_only, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter

_BLOCKS = ("gralora_A", "gralora_B")
_GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")


@dataclass(frozen=True, slots=True)
class _Delta:
    """a [k, in / k, r], b [k, r, out / k]; the LoRA beside: a [h, in], b [out, h], with h perhaps 0."""

    a: Float64
    b: Float64
    general_a: Float64
    general_b: Float64
    scaling: float

    def factors(self) -> Factors:
        num_blocks, in_width, rank = self.a.shape
        out_width, share = self.b.shape[2], rank // num_blocks
        a = np.zeros((num_blocks, num_blocks, share, num_blocks, in_width))
        b = np.zeros((num_blocks, out_width, num_blocks, num_blocks, share))
        for n in range(num_blocks):
            # [in, j, s] -> [j, s, in]
            a[:, n, :, n, :] = self.a[n].reshape(in_width, num_blocks, share).transpose(1, 2, 0)
        for j in range(num_blocks):
            b[j, :, j, :, :] = self.b[j].reshape(num_blocks, share, out_width).transpose(2, 0, 1)
        rows = num_blocks * rank
        return Factors(
            np.concatenate([a.reshape(rows, -1), self.general_a]),
            np.concatenate([b.reshape(-1, rows), self.general_b], axis=1) * self.scaling,
        )

    def apply(self, x: Float64) -> Float64:
        num_blocks, in_width, rank = self.a.shape
        blocks = x.reshape(len(x), num_blocks, in_width)
        hidden = np.einsum("tni,nir->tnr", blocks, self.a)
        shared = hidden.reshape(len(x), num_blocks, num_blocks, -1).transpose(0, 2, 1, 3)
        y = np.einsum("tjr,jro->tjo", shared.reshape(len(x), num_blocks, rank), self.b).reshape(len(x), -1)
        total: Float64 = (y + (x @ self.general_a.T) @ self.general_b.T) * self.scaling
        return total


@dataclass(frozen=True, slots=True)
class _Tuner:
    rank: int
    num_blocks: int
    hybrid_rank: int
    alpha: float

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return the blocks' factors, and the LoRA's with a hybrid rank, of every module."""
        tensors.take_shared()
        return {path: self._plan_module(module, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, base: BaseDims) -> PlannedModule:
        slots = module.take(*_BLOCKS, *(_GENERAL if self.hybrid_rank else ()))
        num_out, num_in = module.dims(base)
        k = self.num_blocks
        if num_in % k or num_out % k:
            raise UnsupportedAdapter(
                f"gralora_k {k} does not divide the sizes of {module.path}, {num_out} and {num_in}", param="gralora_k"
            )
        shapes = [(k, num_in // k, self.rank), (k, self.rank, num_out // k)]
        general: list[tuple[int, ...]] = [(self.hybrid_rank, num_in), (num_out, self.hybrid_rank)]
        pairs = zip(slots, [*shapes, *general][: len(slots)], strict=True)

        def load(file: TensorFile) -> _Delta:
            values = [file.floats(slot).astype(np.float64) for slot in slots]
            beside = values[2:] or [np.zeros((0, num_in)), np.zeros((num_out, 0))]
            return _Delta(values[0], values[1], beside[0], beside[1], self.alpha / (self.rank + self.hybrid_rank))

        return PlannedModule(module, k * self.rank + self.hybrid_rank, False, tuple(pairs), load)


def _read(config: Config) -> _Tuner:
    rank, num_blocks = read_whole(config, "r", 32), read_whole(config, "gralora_k", 2)
    if rank % num_blocks:
        raise UnsupportedAdapter(f"r is {rank}, which gralora_k {num_blocks} does not divide", param="gralora_k")
    return _Tuner(rank, num_blocks, read_whole(config, "hybrid_r", 0, least=0), read_scale(config, "alpha", 64))


GRALORA = Served(
    title="GraLoRA",
    served_as="low rank k r + hybrid_r, zero outside the blocks",
    limits="k r + hybrid_r above `--max-rank`: train with a smaller r",
    rules=(
        *common_rules("layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out", "init_weights"),
        used("r", "rank of a row of blocks"),
        used("gralora_k", "blocks in each direction"),
        used("hybrid_r", "rank of the plain LoRA beside"),
        used("alpha", "scaling is alpha / (r + hybrid_r)"),
        training_only("gralora_dropout", 0.0),
    ),
    parts=frozenset({*_BLOCKS, *_GENERAL}),
    read=_read,
    recorded=("r", "gralora_k", "hybrid_r", "alpha"),
)
