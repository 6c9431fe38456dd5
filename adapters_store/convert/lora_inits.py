"""LoRAs whose initialisation changed the base: PiSSA, OLoRA and KaSA, brought back to the base as it is.

Owns what each took away from the base's weight, `L R`, and when that can be computed again for certain. Invariant: the
served delta is `s B A - L R`, of rank r more than the file's; nothing is guessed where the singular values or columns
that decide lie too near to each other, or where the base's files are rounded.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.convert.base_weights import BaseWeights
from adapters_store.convert.peft_tensors import PeftModule
from adapters_store.convert.tuner import Delta, Factors, Float64
from adapters_store.errors import UnconvertedInit

PISSA, OLORA, KASA = "pissa", "olora", "kasa"
_WAY_OUT = {
    PISSA: "save the adapter with path_initial_model_for_weight_conversion, which turns it into a plain LoRA",
    OLORA: "save the adapter with path_initial_model_for_weight_conversion, which turns it into a plain LoRA",
    KASA: "merge it into the weights and extract a LoRA, or train a plain LoRA",
}
# PEFT decomposes in float32: nearer to each other than this, its parts differ by more than 1e-4 of the largest
_LEAST_GAP = 2.0**-10


@dataclass(frozen=True, slots=True)
class ChangedBaseDelta:
    """`lora` is the LoRA as the file holds it; `rank` and `scaling` are its; dims (out, in)."""

    lora: Delta
    kind: str
    rank: int
    scaling: float
    module: PeftModule
    weights: BaseWeights
    dims: tuple[int, int]

    def factors(self) -> Factors:
        """Return the LoRA's factors with those of what was taken away behind them."""
        plain, (left, right) = self.lora.factors(), self._taken(self._weight())
        a, b = np.concatenate([plain.a, right]), np.concatenate([plain.b, -left], axis=1)
        # the parts are sums over the whole weight
        terms = np.abs(a), np.abs(b) + np.abs(left).max(initial=0.0)
        return Factors(a, b, plain.bias, a_terms=terms[0], b_terms=terms[1])

    def apply(self, x: Float64) -> Float64:
        """Return what PEFT adds to the base as it was: its own answer less what it took away, by another way."""
        weight = self._weight()
        if self.kind == OLORA:
            columns = weight[:, : self.rank]
            kept = columns @ np.linalg.lstsq(columns, weight, rcond=None)[0] * self.scaling
            return self.lora.apply(x) - x @ kept.T
        # the leading parts of W lie in the leading directions of the smaller of W W^T and W^T W
        is_wide = self.dims[0] < self.dims[1]
        _, vectors = np.linalg.eigh(weight @ weight.T if is_wide else weight.T @ weight)
        count = self.rank if self.kind == PISSA else min(self.dims) - self.rank
        basis = vectors[:, -count:]
        main = basis @ (basis.T @ weight) if is_wide else (weight @ basis) @ basis.T
        return self.lora.apply(x) - x @ (main if self.kind == PISSA else weight - main).T

    def _taken(self, weight: Float64) -> tuple[Float64, Float64]:
        """Return L [out, r] and R [r, in]; raises UnconvertedInit where they cannot be told for certain."""
        most = min(self.dims)
        if self.rank > most or (self.kind == KASA and self.rank == most):
            raise self._refusal(f"rank {self.rank} is more than its weight of {self.dims[0]} by {self.dims[1]} has")
        if not self.weights.is_float32(self.module.layer, self.module.sites):
            raise self._refusal("the base's files are not float32, so nobody knows how the changed base was rounded")
        if self.kind == OLORA:
            q, upper = np.linalg.qr(weight[:, : self.rank])
            diagonal = np.abs(np.diag(upper))
            if not diagonal.min() > _LEAST_GAP * diagonal.max():
                raise self._refusal("the base's first columns nearly depend on each other")
            return q * self.scaling, q.T @ weight
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        count = self.rank if self.kind == PISSA else most - self.rank
        if count < most and not values[count - 1] - values[count] > _LEAST_GAP * values[count - 1]:
            raise self._refusal(f"the base's singular values {count} and {count + 1} lie too near to each other")
        part = slice(0, count) if self.kind == PISSA else slice(count, most)
        return left[:, part] * values[part], right[part]

    def _weight(self) -> Float64:
        weight = np.zeros(self.dims)
        for rows, values in self.weights.rows(self.module.layer, self.module.sites):
            weight[rows] = values
        return weight

    def _refusal(self, reason: str) -> UnconvertedInit:
        return UnconvertedInit(
            f"{self.kind} changed {self.module.path} of the base while training, and that cannot be computed again: "
            f"{reason}; {_WAY_OUT[self.kind]}",
            param="kasa_config" if self.kind == KASA else "init_lora_weights",
        )
