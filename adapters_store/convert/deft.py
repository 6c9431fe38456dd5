"""PEFT's DEFT: `W' = W - P f(P)^T W + s P R`, a low rank once the base is known; PaRa leaves R out.

Owns DEFT's keys and formula. Invariant: `B = Q` (P, or its orthonormal basis) and `A = s R - right^T W`.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.base_weights import BaseWeights
from adapters_store.convert.config_values import Config, read_flag, read_scale, read_whole
from adapters_store.convert.peft_keys import common_rules, training_only, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.float_bits import Float32

_P, _R = "deft_P", "deft_R"
# columns of P nearer to each other than this have no basis that two machines agree on
_LEAST_INDEPENDENCE = 2.0**-10


@dataclass(frozen=True, slots=True)
class _Delta:
    """p [out, r]; r [r, in] with its scaling, None for PaRa."""

    p: Float32
    r: Float64 | None
    is_qr: bool
    num_in: int
    module: PeftModule
    weights: BaseWeights

    def factors(self) -> Factors:
        left, right = self._projector()
        a, terms = (np.zeros((left.shape[1], self.num_in)) for _ in range(2))
        if self.r is not None:
            a, terms = self.r.copy(), np.abs(self.r)
        for rows, weight in self.weights.rows(self.module.layer, self.module.sites):
            a -= right[rows].T @ weight.astype(np.float64)
            terms += np.abs(right[rows]).T @ np.abs(weight).astype(np.float64)
        return Factors(a=a, b=left, a_terms=terms)

    def apply(self, x: Float64) -> Float64:
        left, right = self._projector()
        product = np.zeros((len(x), len(left)))
        for rows, weight in self.weights.rows(self.module.layer, self.module.sites):
            product[:, rows] = x @ weight.astype(np.float64).T
        y = -(product @ right) @ left.T
        return y if self.r is None else y + (x @ self.r.T) @ left.T

    def _projector(self) -> tuple[Float64, Float64]:
        p = self.p.astype(np.float64)
        if not self.is_qr:
            return p, np.maximum(p, 0.0)
        q, upper = np.linalg.qr(p)
        diagonal = np.abs(np.diag(upper))
        if not diagonal.min() > _LEAST_INDEPENDENCE * np.abs(p).max() * np.sqrt(len(p)):
            raise UnsupportedAdapter(
                f"the columns of {self.module.path}.{_P} nearly depend on each other; decomposition_method 'qr' has no "
                "certain basis of them",
                param=self.module.path,
            )
        return q, q


@dataclass(frozen=True, slots=True)
class _Tuner:
    rank: int
    scaling: float
    is_qr: bool
    is_para: bool

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return P [out, r] and R [r, in] of every module."""
        tensors.take_shared()
        return {path: self._plan_module(module, tensors, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, tensors: PeftTensors, base: BaseDims) -> PlannedModule:
        p, *others = module.take(_P) if self.is_para else module.take(_P, _R)
        num_out, num_in = module.dims(base)
        if self.rank > num_out:
            raise UnsupportedAdapter(f"r is {self.rank}; {module.path} has {num_out} outputs", param="r")

        def load(file: TensorFile) -> _Delta:
            r = file.floats(others[0]).astype(np.float64) * self.scaling if others else None
            return _Delta(file.floats(p), r, self.is_qr, num_in, module, tensors.weights)

        shapes = ((p, (num_out, self.rank)), *((slot, (self.rank, num_in)) for slot in others))
        return PlannedModule(module, self.rank, False, shapes, load)


def _read(config: Config) -> _Tuner:
    method = config.get("decomposition_method", "relu")
    if method not in ("relu", "qr"):
        raise UnsupportedAdapter(
            f"decomposition_method is {ascii(method)[:40]}; read here: relu, qr", param="decomposition_method"
        )
    is_para = read_flag(config, "para")
    if method == "qr" and not is_para:
        raise UnsupportedAdapter(
            "decomposition_method is 'qr': R belongs to a basis whose signs are not in the file; train with 'relu'",
            param="decomposition_method",
        )
    rank = read_whole(config, "r", 8)
    alpha = float(rank) if config.get("alpha") is None else read_scale(config, "alpha", 1.0)
    return _Tuner(rank, alpha / rank, method == "qr", is_para)


DEFT = Served(
    title="DEFT, PaRa",
    served_as="low rank r: B of the projection, A = s R - right^T W computed from the base's weights",
    limits="needs the base's weights at hand; 'qr' but for PaRa, because the signs of its basis are not in the file: "
    "train with 'relu'",
    rules=(
        *common_rules(
            "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out", "init_weights"
        ),
        used("r", "rank of every module"),
        used("alpha", "scaling of R is alpha / r; 1 where it is null"),
        used("decomposition_method", "'relu', or for PaRa 'qr': how P projects"),
        used("para", "PaRa: without R"),
        training_only("init_scale", 1.0),
        training_only("deft_dropout", 0.0),
    ),
    parts=frozenset({_P, _R}),
    read=_read,
    recorded=("r", "alpha", "decomposition_method", "para"),
)
