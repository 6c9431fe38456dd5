"""Tile sizes and launch widths of the kernels: one frozen value per launch.

Owns: `LaunchConfig`. Invariant: a config changes how fast a kernel is, never what it computes.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tiles of one kernel launch: along the reduction, along the rank, along the output; warps; pipeline stages."""

    block_k: int = 64
    block_r: int = 16
    block_o: int = 64
    num_warps: int = 4
    num_stages: int = 2
