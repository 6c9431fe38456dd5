"""Where the adapters of a step act, and which forms of the adapter kernels that takes.

Owns the union over a step's adapters; pure. Invariant: a step may run with more sites, more families and more scaled
inputs than its adapters have: the result is the same, only launches and reads are more.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.image import SiteRows

Site = tuple[int, str]


@dataclass(frozen=True, slots=True)
class ActingSites:
    """The sites of one adapter or of all adapters of a step."""

    # (layer, key of `FUSED_SITES`); at others nothing is launched
    fused: frozenset[Site] = frozenset()
    # is there more than low rank and bias? Else the kernels are compiled without the other families' code
    has_families: bool = False
    # (layer, base-neutral site) whose input some adapter scales before the base's product
    in_scaled: frozenset[Site] = frozenset()

    @classmethod
    def of(cls, rows: Iterable[SiteRows]) -> "ActingSites":
        """Read one adapter's."""
        every = tuple(rows)
        return cls(
            frozenset((own.layer, fused_site_of(own.site)) for own in every),
            not all(own.is_lora for own in every),
            frozenset((own.layer, own.site) for own in every if own.in_scale_offset is not None),
        )

    @classmethod
    def union(cls, several: Iterable["ActingSites"]) -> "ActingSites":
        """Join those of a step's adapters; equal ones cost once."""
        distinct = set(several)
        return cls(
            frozenset().union(*(sites.fused for sites in distinct)),
            any(sites.has_families for sites in distinct),
            frozenset().union(*(sites.in_scaled for sites in distinct)),
        )


def fused_site_of(site: str) -> str:
    """Return the fused site that holds a base-neutral one."""
    return next(name for name, members in FUSED_SITES.items() if site in members)
