"""PEFT's MISS, and BONE, its name until 2025: every run of r inputs is multiplied by one block [r, out], and summed.

Owns their keys and formula. `mini` repeats a block of fewer columns over the outputs; `bat` multiplies the base's
weights and is refused. Invariant: A is fixed: row j has a one at every input i with i mod r = j.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_whole
from adapters_store.convert.peft_keys import Rules, common_rules, training_only, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.float_bits import Float32

_BLOCK_NAMES = ("miss_block", "bone_block")


@dataclass(frozen=True, slots=True)
class _Delta:
    """block [r, mini_r], repeated over the outputs: [r, out]."""

    block: Float32
    num_in: int
    num_out: int

    def factors(self) -> Factors:
        rank = len(self.block)
        a = np.zeros((rank, self.num_in), np.float32)
        inputs = np.arange(self.num_in)
        a[inputs % rank, inputs] = 1
        return Factors(a, np.tile(self.block, (1, self.num_out // self.block.shape[1])).T)

    def apply(self, x: Float64) -> Float64:
        rank, width = self.block.shape
        padded = np.pad(x, ((0, 0), (0, -self.num_in % rank)))
        y = padded.reshape(len(x), -1, rank).sum(axis=1) @ self.block.astype(np.float64)
        return np.concatenate([y] * (self.num_out // width), axis=1)


@dataclass(frozen=True, slots=True)
class _Tuner:
    """`mini_rank` is None where the block has all outputs."""

    rank: int
    mini_rank: int | None

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return the block of every module."""
        tensors.take_shared()
        return {path: self._plan_module(module, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, base: BaseDims) -> PlannedModule:
        (block,) = module.take(*(name for name in _BLOCK_NAMES if name in module.parts))
        num_out, num_in = module.dims(base)
        width = num_out if self.mini_rank is None else self.mini_rank
        if self.rank > num_in or num_out % width:
            raise UnsupportedAdapter(
                f"{module.path} of size {num_out} by {num_in} cannot have r {self.rank} and mini_r {width}",
                param="r" if self.rank > num_in else "mini_r",
            )

        def load(file: TensorFile) -> _Delta:
            return _Delta(file.floats(block), num_in, num_out)

        return PlannedModule(module, self.rank, False, ((block, (self.rank, width)),), load)


def _read(config: Config) -> _Tuner:
    init = config.get("init_weights", True)
    if init not in (True, False, None, "mini"):
        raise UnsupportedAdapter(
            f"init_weights is {ascii(init)[:40]}: 'bat' multiplies the base's weights, so its delta is no low-rank "
            "matrix; train with init_weights=True or 'mini'",
            param="init_weights",
        )
    mini_rank = read_whole(config, "mini_r", 1) if init == "mini" else None
    return _Tuner(read_whole(config, "r", 64), mini_rank)


def _rules() -> Rules:
    return (
        *common_rules("exclude_modules", "layers_to_transform", "layers_pattern", "bias"),
        used("r", "rank of every module"),
        used("init_weights", "true, false or 'mini'; 'bat' is refused"),
    )


MISS = Served(
    title="MiSS",
    served_as="low rank r with a fixed A of zeros and ones",
    limits="`init_weights='bat'` depends on the base's weights: train with true or 'mini'",
    rules=(
        *_rules(),
        used("mini_r", "columns of the block with init_weights 'mini'"),
        training_only("miss_dropout", 0.0),
    ),
    parts=frozenset({"miss_block"}),
    read=_read,
    recorded=("r", "mini_r", "init_weights"),
)
BONE = Served(
    title="Bone (MiSS in PEFT until 0.17)",
    served_as="as MiSS",
    limits="`init_weights='bat'`: as MiSS",
    rules=_rules(),
    parts=frozenset({"bone_block"}),
    read=_read,
    recorded=("r", "init_weights"),
)
