"""Random adapter images for kernel tests: built here by hand, independent of the store's writer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.gate_options import METEORA, GateOptions
from adapter_kernels.image import AdapterImage, CsrRows, SiteRows, SparseRows

SHAPES = {
    "q_proj": (24, 16),
    "k_proj": (8, 16),
    "v_proj": (8, 16),
    "o_proj": (16, 24),
    "gate_proj": (40, 16),
    "up_proj": (40, 16),
    "down_proj": (16, 40),
}
ALL_SITES = tuple(SHAPES)
_ALIGNMENT = 128

Place = tuple[int, str]


@dataclass(frozen=True)
class Ops:
    """What an adapter does at one site; `cols` and `rows` are numbers of channels, `csr` of weights."""

    ranks: tuple[int, ...] = ()
    top_k: int = 0
    temperature: float = 1.0
    cols: int = 0
    rows: int = 0
    bias: bool = False
    out_scale: bool = False
    in_scale: bool = False
    gate: GateOptions = METEORA
    gate_bias: bool = False
    csr: int = 0
    is_ternary: bool = False
    dense: bool = False
    blockdiag: int = 0
    rot2_group: int = 0


class _Writer:
    def __init__(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        self.chunks: list[Tensor] = [torch.empty(0, dtype=torch.uint8)]
        self._generator = generator
        self._dtype = dtype

    def put(self, tensor: Tensor) -> int:
        begin = sum(chunk.numel() for chunk in self.chunks)
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        self.chunks += [raw, torch.zeros(-raw.numel() % _ALIGNMENT, dtype=torch.uint8)]
        return begin

    def normal(self, *shape: int) -> int:
        return self.put(torch.randn(*shape, generator=self._generator).to(self._dtype))

    def scale(self, width: int) -> int:
        return self.put(torch.randn(width, generator=self._generator) + 1.0)

    def sparse(self, count: int, num_channels: int, width: int) -> SparseRows | None:
        if not count:
            return None
        chosen = torch.randperm(num_channels, generator=self._generator)[:count].sort().values.int()
        return SparseRows(count, self.put(chosen), self.normal(count, width))

    def csr(self, own: Ops, out_dim: int, in_dim: int) -> CsrRows | None:
        if not own.csr:
            return None
        flat = torch.randperm(out_dim * in_dim, generator=self._generator)[: own.csr].sort().values
        counts = torch.bincount(flat // in_dim, minlength=out_dim)
        indptr = self.put(torch.cat((torch.zeros(1), counts.cumsum(0))).int())
        col = self.put((flat % in_dim).int())
        if not own.is_ternary:
            return CsrRows(own.csr, indptr, col, self.normal(own.csr))
        signs = torch.randint(0, 2, (-(-own.csr // 8), 8), generator=self._generator)
        signs.view(-1)[own.csr :] = 0
        packed = self.put((signs << torch.arange(8)).sum(1).to(torch.uint8))
        return CsrRows(own.csr, indptr, col, packed, self.put(torch.tensor([0.75])))

    def rotations(self, width: int, size: int) -> int | None:
        if not size:
            return None
        random = torch.randn(width // size, size, size, generator=self._generator)
        return self.put(torch.linalg.qr(random).Q)


def random_adapter(
    ops: dict[Place, Ops],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    shapes: dict[str, tuple[int, int]] = SHAPES,
) -> AdapterImage:
    """Build an image with the given ops per (layer, site)."""
    writer = _Writer(generator, dtype)
    rows = []
    for (layer, site), own in sorted(ops.items(), key=lambda item: (item[0][0], ALL_SITES.index(item[0][1]))):
        out_dim, in_dim = shapes[site]
        rows.append(
            SiteRows(
                layer=layer,
                site=site,
                ranks=own.ranks,
                gate_offset=writer.normal(len(own.ranks), in_dim) if own.top_k else None,
                top_k=own.top_k,
                temperature=own.temperature,
                a_offset=writer.normal(sum(own.ranks), in_dim) if own.ranks else 0,
                bt_offset=writer.normal(sum(own.ranks), out_dim) if own.ranks else 0,
                cols=writer.sparse(own.cols, in_dim, out_dim),
                rows=writer.sparse(own.rows, out_dim, in_dim),
                out_scale_offset=writer.scale(out_dim) if own.out_scale else None,
                in_scale_offset=writer.scale(in_dim) if own.in_scale else None,
                bias_offset=writer.normal(out_dim) if own.bias else None,
                gate_options=own.gate,
                gate_bias_offset=writer.scale(len(own.ranks)) if own.gate_bias else None,
                csr=writer.csr(own, out_dim, in_dim),
                dense_offset=writer.normal(out_dim, in_dim) if own.dense else None,
                blockdiag=own.blockdiag,
                blockdiag_offset=writer.rotations(in_dim, own.blockdiag),
                rot2_group=own.rot2_group,
                c0_offset=writer.scale(out_dim) if own.rot2_group else None,
                c1_offset=writer.scale(out_dim) if own.rot2_group else None,
            )
        )
    return AdapterImage(torch.cat(writer.chunks), dtype, tuple(rows), shapes)


def random_image(
    ranks: dict[Place, int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    biased: frozenset[Place] = frozenset(),
) -> AdapterImage:
    """Build a LoRA's image with the given rank per (layer, site); `biased` sites get a bias."""
    ops = {place: Ops((rank,) if rank else (), bias=place in biased) for place, rank in ranks.items()}
    return random_adapter(ops, generator, dtype)


def uniform_ranks(rank: int, num_layers: int = 2) -> dict[Place, int]:
    """The same rank at every site of every layer."""
    return {(layer, site): rank for layer in range(num_layers) for site in ALL_SITES}
