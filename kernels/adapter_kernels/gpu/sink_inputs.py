"""What the sinks are told about norms, heads and deltas: small frozen values that the fused decoder fills.

Owns no kernel and no memory. Invariant: a norm's weight comes in the dtype that its rounding asks for: the model's
where the cast comes first, fp32 otherwise (Gemma's `1 +` is already in it).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from adapter_kernels.gpu.step import SiteInput
    from adapter_kernels.gpu.tables import DeviceTables


@dataclass(frozen=True, slots=True)
class NormWeights:
    """One RMSNorm over the hidden size."""

    # [D]; the model's dtype when `cast_first`, else fp32
    weight: Tensor
    eps: float
    # True: round to the model's dtype, then scale (Llama); False: scale in fp32, then round (OLMo2, Gemma)
    cast_first: bool


@dataclass(frozen=True, slots=True)
class QkNormWeights:
    """RMSNorm over each head: one weight [E] for all query heads, one for all key heads; dtypes as `NormWeights`."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    cast_first: bool


@dataclass(frozen=True, slots=True)
class QkvDims:
    """Heads of the fused projection q | k | v, [T, (H + 2 K) * E]."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class DeltaInput:
    """A delta that `expand` left in a buffer; rows whose adapter lacks the site hold garbage and are never read."""

    # [T, D] in the model's dtype
    delta: Tensor
    tables: "DeviceTables"
    # [T] int32 adapter slot of each row, -1: none
    slots: Tensor
    # site index, layer * 7 + position
    site: int
    # None: all adapters of the step are low rank and bias
    families: "SiteInput | None" = None
