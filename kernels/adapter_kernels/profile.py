"""What adapters must share to lie in one slab: the sizes and kinds of their tensors at every site.

Invariant: adapters of equal profiles differ in nothing but the values of their weights and indices.
"""

from dataclasses import dataclass

from adapter_kernels.gate_options import METEORA, GateOptions
from adapter_kernels.image import AdapterImage, SiteRows

# adapters whose selections differ by less than this still share a slab; a whole vector of an AVX-512 product
_SPARSE_STEP = 16


@dataclass(frozen=True, slots=True)
class SiteProfile:
    """One (layer, site) that the adapters act on; see `SiteRows`. `num_cols` and `num_rows` are rounded up."""

    layer: int
    site: str
    ranks: tuple[int, ...] = ()
    # 0: no gate
    top_k: int = 0
    temperature: float = 1.0
    gate: GateOptions = METEORA
    has_gate_bias: bool = False
    num_cols: int = 0
    num_rows: int = 0
    has_bias: bool = False
    has_out_scale: bool = False
    has_in_scale: bool = False

    @classmethod
    def of(cls, rows: SiteRows) -> "SiteProfile":
        """Read what a slab packs of one site: not the experts of an MLP's gate, no scales within a frame."""
        is_gated = rows.gate_offset is not None
        return cls(
            layer=rows.layer,
            site=rows.site,
            ranks=() if rows.has_group_gate else rows.ranks,
            top_k=rows.top_k if is_gated else 0,
            temperature=rows.temperature if is_gated else 1.0,
            gate=rows.gate_options if is_gated else METEORA,
            has_gate_bias=rows.gate_bias_offset is not None,
            num_cols=_rounded(0 if rows.cols is None else rows.cols.count),
            num_rows=_rounded(0 if rows.rows is None else rows.rows.count),
            has_bias=rows.bias_offset is not None,
            has_out_scale=rows.out_scale_offset is not None and not rows.has_frame,
            has_in_scale=rows.in_scale_offset is not None and not rows.has_frame,
        )

    @property
    def is_empty(self) -> bool:
        """Is there nothing to pack?"""
        return self == SiteProfile(self.layer, self.site)

    @property
    def rank(self) -> int:
        """Rank rows of all experts together."""
        return sum(self.ranks)


@dataclass(frozen=True, slots=True)
class Profile:
    """The sites in the order of the image, without those of which nothing is packed."""

    sites: tuple[SiteProfile, ...]

    @classmethod
    def of(cls, image: AdapterImage) -> "Profile":
        """Read the profile of an image."""
        sites = (SiteProfile.of(rows) for rows in image.rows)
        return cls(tuple(site for site in sites if not site.is_empty))


def _rounded(count: int) -> int:
    return -(-count // _SPARSE_STEP) * _SPARSE_STEP
