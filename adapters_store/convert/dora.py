"""DoRA, LORA's `use_dora`: `y = c * (W x + s B A x) + b` with c = magnitude / |W + s B A|, one length per output row.

Owns the lengths and their refusal. Invariant: c multiplies the base's product and the low rank, never the base's own
bias b, as PEFT has it; lengths are summed in float64 from the base's weights as its files hold them.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.convert.base_weights import BaseWeights
from adapters_store.convert.peft_tensors import PeftModule
from adapters_store.convert.tuner import Delta, Factors, Float64
from adapters_store.errors import UnsupportedAdapter
from adapters_store.float_bits import Float32

# below this share of its terms a length is their rounding
_LEAST_LENGTH = 2.0**-20


@dataclass(frozen=True, slots=True)
class DoraDelta:
    """`lora` is the module's plain LoRA: a [r, in], b [out, r] times `scaling`; magnitude [out]."""

    lora: Delta
    a: Float32
    b: Float32
    scaling: float
    magnitude: Float32
    module: PeftModule
    weights: BaseWeights

    def factors(self) -> Factors:
        plain = self.lora.factors()
        scale = self.magnitude.astype(np.float64) / self._lengths()
        return Factors(plain.a, plain.b.astype(np.float64) * scale[:, None], out_scale=scale)

    def apply(self, x: Float64) -> Float64:
        scale, _ = self.scales()
        return self.lora.apply(x) * scale

    def scales(self) -> tuple[Float64, None]:
        """Return c, by PEFT's formula."""
        scale = np.zeros(len(self.b))
        for rows, weight in self.weights.rows(self.module.layer, self.module.sites):
            delta = self.b[rows].astype(np.float64) @ self.a.astype(np.float64)
            norm = np.linalg.norm(weight.astype(np.float64) + self.scaling * delta, axis=1)
            scale[rows] = self.magnitude[rows].astype(np.float64) / norm
        return scale, None

    def _lengths(self) -> Float64:
        """Return |W + s B A| per output row; raises UnsupportedAdapter where one is zero, or no more than rounding."""
        lengths = np.zeros(len(self.b))
        a = self.a.astype(np.float64) * self.scaling
        for rows, weight in self.weights.rows(self.module.layer, self.module.sites):
            delta = self.b[rows].astype(np.float64) @ a
            terms = np.sqrt(_squares(weight.astype(np.float64)) + _squares(delta))
            delta += weight
            lengths[rows] = np.sqrt(_squares(delta))
            if not np.all(lengths[rows] > _LEAST_LENGTH * terms):
                first = rows.start + int(np.argmin(lengths[rows] > _LEAST_LENGTH * terms))
                raise UnsupportedAdapter(
                    f"row {first} of the base's weight plus the LoRA of {self.module.path} is zero, and DoRA divides "
                    "by its length",
                    param=self.module.path,
                )
        return lengths


def _squares(values: Float64) -> Float64:
    """Return the sum of squares of every row."""
    total: Float64 = np.einsum("ij,ij->i", values, values)
    return total
