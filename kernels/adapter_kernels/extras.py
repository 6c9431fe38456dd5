"""What an adapter holds beside its slab: the rare ops of its sites, and what it does outside linear layers.

Owns the types only; `rare_ops.py` runs the sites, `model_delta.py` the rest. These are per adapter and never packed
side by side. Invariant: a site is here only if it holds something that no slab holds, and then only that.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from adapter_kernels.model_image import ModelTensors


@dataclass(frozen=True, slots=True)
class Sparse2d:
    """A sparse matrix [out, in]: row o holds `val[indptr[o] : indptr[o + 1]]` in columns `col`, which increase.

    indptr [out + 1] and col [nnz] int32, val [nnz] fp32.
    """

    indptr: Tensor
    col: Tensor
    val: Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """Outputs turned in pairs: u' = c0 * u + c1 * partner(u); c0 and c1 [out] fp32.

    Each `group` of outputs is two halves; the partner of an output is minus its twin in the second half for the first
    half, and its twin in the first half for the second.
    """

    group: int
    c0: Tensor
    c1: Tensor


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the base's product W: in_scale, then blockdiag before it, out_scale, then rotation behind.

    blockdiag [in / b, b, b] maps each block of inputs: x'[k] = x[k] @ blockdiag[k]. in_scale [in], out_scale [out].
    All fp32. A site that has a frame has its scales here and not in the slab.
    """

    in_scale: Tensor | None
    blockdiag: Tensor | None
    out_scale: Tensor | None
    rotation: Rotation | None

    @property
    def changes_input(self) -> bool:
        """Does the base's product see another input than the additive ops?"""
        return self.in_scale is not None or self.blockdiag is not None

    @property
    def changes_output(self) -> bool:
        """Is the base's product changed behind the GEMM?"""
        return self.out_scale is not None or self.rotation is not None


@dataclass(frozen=True, slots=True)
class GroupExperts:
    """Rank rows of experts that the gate of a whole MLP weighs: a [sum of ranks, in], bt [sum of ranks, out].

    Both in the model's dtype. `gate` is that gate's id; its owner (`ModelTensors`) applies them.
    """

    gate: str
    ranks: tuple[int, ...]
    a: Tensor
    bt: Tensor


@dataclass(frozen=True, slots=True)
class RareSite:
    """One site's ops that no slab packs; csr and dense [out, in] (the model's dtype) read the original input.

    `out_begin .. out_end` are its columns of the fused site's output.
    """

    csr: Sparse2d | None = None
    dense: Tensor | None = None
    frame: Frame | None = None
    experts: GroupExperts | None = None
    out_begin: int = 0
    out_end: int = 0

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the site."""
        if self.csr is not None:
            yield from (self.csr.indptr, self.csr.col, self.csr.val)
        if self.dense is not None:
            yield self.dense
        if self.frame is not None:
            vectors = (self.frame.in_scale, self.frame.blockdiag, self.frame.out_scale)
            yield from (vector for vector in vectors if vector is not None)
            if self.frame.rotation is not None:
                yield from (self.frame.rotation.c0, self.frame.rotation.c1)
        if self.experts is not None:
            yield from (self.experts.a, self.experts.bt)


@dataclass(frozen=True, slots=True)
class AdapterExtras:
    """Everything of one adapter that is not in its slab: `sites` by (layer, base-neutral site)."""

    sites: dict[tuple[int, str], RareSite]
    model: ModelTensors | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        own = sum(tensor.nbytes for rare in self.sites.values() for tensor in rare.tensors())
        return own + (self.model.num_bytes if self.model is not None else 0)
