"""PEFT's BOFT with one factor: inputs rotate in blocks and outputs are scaled, `y = s * W (x blocks) + b`.

Owns BOFT's keys and formula. More than one butterfly factor permutes the inputs between rotations and is refused.
Invariant: blocks are Cayley transforms of the file's matrices less their transposes, halved.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_whole
from adapters_store.convert.peft_keys import common_rules, training_only, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.rotated_inputs import cayley, turn_cayley
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.float_bits import Float32

_NAMES = ("boft_R", "boft_s")


@dataclass(frozen=True, slots=True)
class _Delta:
    """matrices [blocks, b, b], scale [out]."""

    matrices: Float32
    scale: Float32
    dims: tuple[int, int]

    def factors(self) -> Factors:
        num_out, num_in = self.dims
        blocks = cayley(self._skew())
        return Factors(np.zeros((0, num_in)), np.zeros((num_out, 0)), out_scale=self.scale, blocks=blocks)

    def apply(self, x: Float64) -> Float64:
        return np.zeros((len(x), self.dims[0]))

    def scales(self) -> tuple[Float64, None]:
        """Return s."""
        return self.scale.astype(np.float64), None

    def turned_inputs(self, x: Float64) -> Float64:
        """Return x with every block turned."""
        return turn_cayley(x, self._skew())

    def turned_outputs(self, u: Float64) -> Float64:
        """Return u: outputs are scaled only."""
        return u

    def _skew(self) -> Float64:
        matrices = self.matrices.astype(np.float64)
        skew: Float64 = (matrices - matrices.swapaxes(1, 2)) / 2
        return skew


@dataclass(frozen=True, slots=True)
class _Tuner:
    """Either `num_blocks` or `block` is 0, as PEFT demands."""

    num_blocks: int
    block: int

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return the matrices and the scale of every module."""
        tensors.take_shared()
        return {path: self._plan_module(module, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, base: BaseDims) -> PlannedModule:
        matrices, scale = module.take(*_NAMES)
        num_out, num_in = module.dims(base)
        divisor = self.block or self.num_blocks
        if num_in % divisor:
            key = "boft_block_size" if self.block else "boft_block_num"
            raise UnsupportedAdapter(f"{key} {divisor} does not divide the {num_in} inputs of {module.path}", param=key)
        if matrices.shape[:1] not in ((), (1,)):
            raise UnsupportedAdapter(
                f"{matrices.name} holds {matrices.shape[0]} butterfly factors; one is served: train with "
                "boft_n_butterfly_factor=1, or merge it into the weights and extract a LoRA",
                param=matrices.name,
            )
        block = self.block or num_in // self.num_blocks

        def load(file: TensorFile) -> _Delta:
            return _Delta(file.floats(matrices)[0], file.floats(scale).reshape(-1), (num_out, num_in))

        shapes = ((matrices, (1, num_in // block, block, block)), (scale, (num_out, 1)))
        return PlannedModule(module, 0, False, shapes, load, has_out_scale=True, block=block)


def _read(config: Config) -> _Tuner:
    block = read_whole(config, "boft_block_size", 4, least=0)
    num_blocks = read_whole(config, "boft_block_num", 0, least=0)
    if (num_blocks == 0) == (block == 0):
        raise UnsupportedAdapter(
            f"boft_block_size is {block} and boft_block_num {num_blocks}; one of them must be 0",
            param="boft_block_size",
        )
    return _Tuner(num_blocks, block)


BOFT = Served(
    title="BOFT",
    served_as="rotation of inputs in blocks and scale of outputs, both kept in fp32",
    limits="more than one butterfly factor in the file: train with `boft_n_butterfly_factor=1`",
    rules=(
        *common_rules(
            "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out", "init_weights"
        ),
        used("boft_block_size", "size of a block; 0 where boft_block_num says it"),
        used("boft_block_num", "number of blocks; 0 where boft_block_size says it"),
        # PEFT falls back to one factor where its extension is missing: the file says how many there are
        training_only("boft_n_butterfly_factor", 1),
        training_only("boft_dropout", 0.0),
    ),
    parts=frozenset(_NAMES),
    read=_read,
    recorded=("boft_block_size", "boft_block_num"),
)
