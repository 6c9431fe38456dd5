"""Adapters for arena tests: random images as a store would hand them out, and reading them back through the tables."""

import torch
from torch import Tensor

from adapter_kernels.gpu.tables import BIAS, LACKING, NONE, RANK, SITES, DeviceTables
from adapter_kernels.image import AdapterImage, CsrRows, SiteRows, SparseRows
from adapters_store.base import BaseDims
from adapters_store.entries import NO_MODEL_ENTRIES, CsrEntry, ModelEntries, SiteEntry, SparseEntry
from adapters_store.errors import AdapterCorrupt
from adapters_store.gates import METEORA_GATE, GateOptions
from adapters_store.store import OpenAdapter
from tests.kernels.random_adapters import SHAPES, random_image

NUM_LAYERS = 2
BASE = BaseDims("llama", 16, 40, NUM_LAYERS, 3, 1, 8, 32, True, "sha256:0")
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def small_image(seed: int, dtype: torch.dtype = torch.float32, num_sites: int | None = None) -> AdapterImage:
    """A random image: some sites of some layers, ranks that differ, here and there a bias."""
    generator = torch.Generator().manual_seed(seed)
    places = [(layer, site) for layer in range(NUM_LAYERS) for site in SITES]
    chosen = torch.randperm(len(places), generator=generator)[: num_sites or 1 + seed % len(places)].tolist()
    ranks = {places[i]: 1 + (i * 7 + seed) % 9 for i in chosen}
    biased = frozenset(places[i] for i in chosen[::3])
    return random_image(ranks, generator, dtype, biased)


class Images:
    """What `open_image` finds, by digest; `models` says where ops outside the sites lie in the same bytes."""

    def __init__(self, images: dict[str, AdapterImage]) -> None:
        self.images = images
        self.models: dict[str, ModelEntries] = {}
        self.num_opened = 0

    def open(self, digest: str) -> OpenAdapter:
        """Open an image, or fail as the store does when its files are gone."""
        self.num_opened += 1
        if digest not in self.images:
            raise AdapterCorrupt(f"the files of adapter {digest[:12]} cannot be read; upload it again")
        image = self.images[digest]
        entries = tuple(_entry(rows) for rows in image.rows)
        data = memoryview(image.data.numpy().tobytes()).toreadonly()
        rank = max((rows.rank for rows in image.rows), default=0)
        model = self.models.get(digest, NO_MODEL_ENTRIES)
        return OpenAdapter(digest, _NAMES[image.dtype], rank, len(data), BASE, data, entries, model=model)


def _entry(rows: SiteRows) -> SiteEntry:
    return SiteEntry(
        layer=rows.layer,
        site=rows.site,
        ranks=rows.ranks,
        a_offset=rows.a_offset,
        bt_offset=rows.bt_offset,
        bias_offset=rows.bias_offset,
        gate_offset=rows.gate_offset,
        top_k=rows.top_k,
        temperature=rows.temperature,
        cols=_sparse_entry(rows.cols),
        rows=_sparse_entry(rows.rows),
        out_scale_offset=rows.out_scale_offset,
        in_scale_offset=rows.in_scale_offset,
        gate=_gate_options(rows),
        gate_bias_offset=rows.gate_bias_offset,
        csr=_csr_entry(rows.csr),
        dense_offset=rows.dense_offset,
        blockdiag=rows.blockdiag,
        blockdiag_offset=rows.blockdiag_offset,
        rot2_group=rows.rot2_group,
        c0_offset=rows.c0_offset,
        c1_offset=rows.c1_offset,
    )


def _gate_options(rows: SiteRows) -> GateOptions:
    options = rows.gate_options
    has_bias, select_all = rows.gate_bias_offset is not None, rows.top_k == len(rows.ranks)
    own = (options.in_norm, options.logit, has_bias, select_all, options.weight, options.mix, options.group)
    return GateOptions(*own) if rows.gate_offset is not None else METEORA_GATE


def _csr_entry(rows: CsrRows | None) -> CsrEntry | None:
    if rows is None:
        return None
    return CsrEntry(rows.nnz, rows.indptr_offset, rows.col_offset, rows.val_offset, rows.scale_offset)


def _sparse_entry(rows: SparseRows | None) -> SparseEntry | None:
    return None if rows is None else SparseEntry(rows.count, rows.idx_offset, rows.d_offset)


def mismatch(tables: DeviceTables, slot: int, image: AdapterImage | None) -> str | None:
    """Read a slot through the tables as a kernel does, and compare every tensor bit by bit; no image: it lacks all."""
    expected = {(rows.layer, rows.site): rows for rows in image.rows} if image is not None else {}
    for index, entry in enumerate(tables.rows[:, slot].tolist()):
        place = (index // len(SITES), SITES[index % len(SITES)])
        rows = expected.get(place)
        if rows is None or image is None:
            if [entry[BIAS], entry[RANK]] != [LACKING[BIAS], LACKING[RANK]]:
                return f"{place} of slot {slot} is {entry}, and should lack"
            continue
        out_dim, in_dim = SHAPES[place[1]]
        stored = image.site(rows)
        found = [
            _read(tables.arena, entry[0], stored.a) if rows.rank else stored.a.to(tables.arena.dtype),
            _read(tables.arena, entry[1], stored.bt) if rows.rank else stored.bt.to(tables.arena.dtype),
        ]
        wanted = [stored.a, stored.bt]
        if entry[RANK] != rows.rank or (entry[BIAS] == NONE) != (stored.bias is None):
            return f"{place} of slot {slot} is {entry}; the image says rank {rows.rank}"
        if stored.bias is not None:
            found.append(_read(tables.arena, entry[2], stored.bias))
            wanted.append(stored.bias)
        if not all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, wanted, strict=True)):
            return f"{place} of slot {slot} ({in_dim} to {out_dim}) holds other bytes than its image"
    return None


def _read(arena: Tensor, offset: int, like: Tensor) -> Tensor:
    return arena[offset : offset + like.numel()].view(like.shape)
