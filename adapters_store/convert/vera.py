"""PEFT's VERA and PVERA: `delta = diag(b) B diag(d) A`, with random A and B shared by all modules and saved once.

Owns their keys and formula. PVeRA's A and d have twice the rows: the second half is a log-variance, which acts only
while training (or with `sample_at_inference`, which is refused). Invariant: A and B come out of the file; random
numbers are never drawn again here, because other versions and machines draw other ones.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_flag, read_whole
from adapters_store.convert.peft_keys import Rules, common_rules, harmless, training_only, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile, check_shape
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.safetensors_header import TensorSlot

_WAY_OUT = "; save it with save_projection=True"


@dataclass(frozen=True, slots=True)
class _Delta:
    """a [r, in], b [out, r], cut to the module; lambda_d [r], lambda_b [out]."""

    a: Float64
    b: Float64
    lambda_d: Float64
    lambda_b: Float64

    def factors(self) -> Factors:
        return Factors(self.a, self.lambda_b[:, None] * self.b * self.lambda_d)

    def apply(self, x: Float64) -> Float64:
        return self.lambda_b * ((self.lambda_d * (x @ self.a.T)) @ self.b.T)


@dataclass(frozen=True, slots=True)
class _Tuner:
    """`stem` is "vera" or "pvera"; A and lambda_d have `folds` times r rows, of which the first r act."""

    stem: str
    folds: int
    rank: int

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return lambda_b [out] and lambda_d [r] of every module, over A [r, largest in] and B [largest out, r]."""
        shared_a, shared_b = tensors.take_shared(f"{self.stem}_A", f"{self.stem}_B", way_out=_WAY_OUT)
        dims = [module.dims(base) for module in tensors.modules.values()]
        check_shape(shared_a, (self.folds * self.rank, max(num_in for _, num_in in dims)))
        check_shape(shared_b, (max(num_out for num_out, _ in dims), self.rank))
        return {path: self._plan_module(module, shared_a, shared_b, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(
        self, module: PeftModule, shared_a: TensorSlot, shared_b: TensorSlot, base: BaseDims
    ) -> PlannedModule:
        slot_b, slot_d = module.take(f"{self.stem}_lambda_b", f"{self.stem}_lambda_d")
        num_out, num_in = module.dims(base)

        def load(file: TensorFile) -> _Delta:
            return _Delta(
                a=file.shared(shared_a)[: self.rank, :num_in].astype(np.float64),
                b=file.shared(shared_b)[:num_out].astype(np.float64),
                lambda_d=file.floats(slot_d)[: self.rank].astype(np.float64),
                lambda_b=file.floats(slot_b).astype(np.float64),
            )

        shapes = ((slot_b, (num_out,)), (slot_d, (self.folds * self.rank,)))
        return PlannedModule(module, self.rank, False, shapes, load)


def refuse_unsaved(config: Config, field: str) -> None:
    """Raise UnsupportedAdapter if `field` says that random tensors were left out of the file."""
    if not read_flag(config, field, default=True):
        raise UnsupportedAdapter(
            f"{field} is false: the file leaves out random tensors, which would be drawn differently by other versions "
            f"of PyTorch; save the adapter with {field}=True",
            param=field,
        )


def _read_vera(config: Config) -> _Tuner:
    refuse_unsaved(config, "save_projection")
    return _Tuner("vera", 1, read_whole(config, "r", 256))


def _read_pvera(config: Config) -> _Tuner:
    refuse_unsaved(config, "save_projection")
    if read_flag(config, "sample_at_inference"):
        raise UnsupportedAdapter(
            "sample_at_inference is true: the adapter answers differently each time; save it with false, which uses "
            "the mean",
            param="sample_at_inference",
        )
    return _Tuner("pvera", 2, read_whole(config, "r", 256))


def _rules(stem: str) -> Rules:
    return (
        *common_rules("layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out", "init_weights"),
        used("r", "rank of every module"),
        used("save_projection", f"must be true: {stem}_A and {stem}_B are read from the file"),
        harmless("projection_prng_key", f"{stem}_A and {stem}_B are in the file", 0),
        training_only(f"{stem}_dropout", 0.0),
        training_only("d_initial", 0.1),
    )


_PARTS = ("_lambda_b", "_lambda_d")
_SHARED = ("_A", "_B")

VERA = Served(
    title="VeRA",
    served_as="low rank r: A of the file, diag(lambda_b) B diag(lambda_d)",
    limits="projections that are not in the file: save with `save_projection=True`",
    rules=_rules("vera"),
    parts=frozenset(f"vera{part}" for part in _PARTS),
    shared=frozenset(f"vera{part}" for part in _SHARED),
    read=_read_vera,
    recorded=("r",),
)
PVERA = Served(
    title="PVeRA",
    served_as="low rank r of the mean, as PEFT serves it",
    limits="as VeRA; `sample_at_inference`: save with false",
    rules=(
        *_rules("pvera"),
        used("sample_at_inference", "must be false: the mean is served"),
        harmless("generator_seed", "means nothing without sample_at_inference"),
    ),
    parts=frozenset(f"pvera{part}" for part in _PARTS),
    shared=frozenset(f"pvera{part}" for part in _SHARED),
    read=_read_pvera,
    recorded=("r",),
)
