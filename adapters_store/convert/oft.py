"""PEFT's OFT: inputs rotate in blocks before the base's product, `y = W (x blocks) + b`.

Owns OFT's keys and formula. Invariant: blocks are made in float64 from the file's upper triangles; coft's limit on
their length is applied as PEFT applies it while it runs.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_flag, read_scale, read_whole
from adapters_store.convert.peft_keys import common_rules, refused, training_only, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.rotated_inputs import cayley, neumann, turn_cayley, turn_neumann
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.float_bits import Float32

_TRIANGLES = "oft_R.weight"
_SERIES = "use_cayley_neumann"


@dataclass(frozen=True, slots=True)
class _Options:
    """`num_terms` is None for the full Cayley transform; `reach` is coft's eps, None without coft."""

    num_terms: int | None
    reach: float | None
    is_shared: bool


@dataclass(frozen=True, slots=True)
class _Delta:
    """triangles [blocks, b (b - 1) / 2], or one block that all share."""

    triangles: Float32
    block: int
    options: _Options
    dims: tuple[int, int]

    def factors(self) -> Factors:
        num_out, num_in = self.dims
        skew, terms = self._skew(), self.options.num_terms
        blocks = cayley(skew) if terms is None else neumann(skew, terms)
        blocks = np.repeat(blocks, num_in // self.block, axis=0) if self.options.is_shared else blocks
        return Factors(np.zeros((0, num_in)), np.zeros((num_out, 0)), blocks=blocks)

    def apply(self, x: Float64) -> Float64:
        return np.zeros((len(x), self.dims[0]))

    def turned_inputs(self, x: Float64) -> Float64:
        """Return x with every block turned."""
        skew, terms = self._skew(), self.options.num_terms
        if self.options.is_shared:
            skew = np.concatenate([skew] * (self.dims[1] // self.block))
        return turn_cayley(x, skew) if terms is None else turn_neumann(x, skew, terms)

    def turned_outputs(self, u: Float64) -> Float64:
        """Return u: OFT leaves outputs alone."""
        return u

    def _skew(self) -> Float64:
        """Return skew-symmetric matrices [blocks, b, b], within coft's limit."""
        upper = np.zeros((len(self.triangles), self.block, self.block))
        rows, cols = np.triu_indices(self.block, 1)
        upper[:, rows, cols] = self.triangles
        skew: Float64 = upper - upper.swapaxes(1, 2)
        if self.options.reach is None:
            return skew
        limit = self.options.reach / np.sqrt(len(skew))
        lengths = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
        shrunk: Float64 = np.where(lengths <= limit, skew, limit * skew / np.maximum(lengths, limit))
        return shrunk


@dataclass(frozen=True, slots=True)
class _Tuner:
    """Either `num_blocks` or `block` is 0, as PEFT demands."""

    num_blocks: int
    block: int
    options: _Options

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return the triangles of every module."""
        tensors.take_shared()
        return {path: self._plan_module(module, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, base: BaseDims) -> PlannedModule:
        (slot,) = module.take(_TRIANGLES)
        num_out, num_in = module.dims(base)
        divisor = _nearest_divisor(num_in, self.block or self.num_blocks)
        block = divisor if self.block else num_in // divisor

        def load(file: TensorFile) -> _Delta:
            return _Delta(file.floats(slot), block, self.options, (num_out, num_in))

        shape = (1 if self.options.is_shared else num_in // block, block * (block - 1) // 2)
        return PlannedModule(module, 0, False, ((slot, shape),), load, block=block)


def _nearest_divisor(size: int, wanted: int) -> int:
    """Return the divisor of a size that PEFT takes for a number that is none: the nearest, rather the smaller."""
    if wanted >= size:
        return size
    higher = next(number for number in range(wanted, size + 1) if size % number == 0)
    lower = next(number for number in range(wanted, 0, -1) if size % number == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _read(config: Config) -> _Tuner:
    for key in ("oft_block_size", _SERIES):
        if key not in config:
            raise UnsupportedAdapter(
                f"the config does not say {key}: it is of a PEFT whose OFT was another one; train it again", param=key
            )
    num_blocks, block = read_whole(config, "r", 0, least=0), read_whole(config, "oft_block_size", 32, least=0)
    if (num_blocks == 0) == (block == 0):
        raise UnsupportedAdapter(
            f"r is {num_blocks} and oft_block_size {block}; one of them must be 0", param="oft_block_size"
        )
    num_terms = read_whole(config, "num_cayley_neumann_terms", 5)
    is_series = read_flag(config, _SERIES)
    if is_series and not isinstance(config.get("peft_version"), str):
        # PEFT writes its version since the very version that changed the series
        raise UnsupportedAdapter(
            f"{_SERIES} is true, but peft_version is missing: before PEFT 0.18 the series was another; train it again",
            param=_SERIES,
        )
    options = _Options(
        num_terms=num_terms if is_series else None,
        reach=read_scale(config, "eps", 6e-5) if read_flag(config, "coft") else None,
        is_shared=read_flag(config, "block_share"),
    )
    return _Tuner(num_blocks, block, options)


OFT = Served(
    title="OFT",
    served_as="rotation of inputs in blocks, kept in fp32",
    limits="blocks that are no rotation any more (a short series of large values): train with "
    "`use_cayley_neumann=False`. OFT of PEFT before 0.15, and its series before 0.18: train again",
    rules=(
        *common_rules(
            "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out", "init_weights"
        ),
        used("r", "number of blocks; 0 where oft_block_size says it"),
        used("oft_block_size", "size of a block; 0 where r says it"),
        used("block_share", "one block for all"),
        used("coft", "blocks no further from the identity than eps"),
        used("eps", "coft's limit"),
        used(_SERIES, "blocks by a series instead of an inverse"),
        used("num_cayley_neumann_terms", "length of that series"),
        training_only("module_dropout", 0.0),
        refused("rank_pattern", "OFT of PEFT before 0.15 was another one: train it again"),
        refused("alpha_pattern", "OFT of PEFT before 0.15 was another one: train it again"),
    ),
    parts=frozenset({_TRIANGLES}),
    read=_read,
    recorded=("r", "oft_block_size", "block_share", "coft", "eps", _SERIES, "num_cayley_neumann_terms"),
)
