"""Every field of a stored entry reaches the kernels' table by the same name; the device path says what it lacks."""

from dataclasses import asdict, fields, replace

import pytest
import torch

from adapter_kernels.gate_options import GateOptions as KernelGate
from adapter_kernels.gpu.image_layout import StoredImage, lay_out
from adapter_kernels.image import ImageError, SiteRows
from adapters_store.entries import CsrEntry, SiteEntry, SparseEntry
from adapters_store.gates import GateOptions
from adapters_store.store import OpenAdapter
from serve.engine.site_rows import site_rows
from tests.engine.arena_adapters import BASE
from tests.kernels.random_adapters import SHAPES

GATE = GateOptions("unit", "abs", True, False, "sigmoid", "rank", "layers.1.mlp")
FULL = SiteEntry(
    *(1, "q_proj", (4, 2), 64, 128, 256, 384, 2, 1.5, SparseEntry(3, 1, 2), SparseEntry(4, 5, 6), 512, 640),
    *(GATE, 641, CsrEntry(7, 8, 9, 10, 11), 768, 12, 13, 14, 15, 16),
)
PLAIN = SiteEntry(1, "q_proj", (1,), 0, 128, None)


def adapter(*entries: SiteEntry) -> OpenAdapter:
    """Return an open adapter with these entries."""
    return OpenAdapter("0" * 64, "float32", 4, 1024, BASE, memoryview(bytes(1024)), entries)


def test_every_field_is_copied() -> None:
    assert all(value not in (None, 0, ()) for value in asdict(FULL).values())
    for entry, rows in zip((FULL, PLAIN), site_rows(adapter(FULL, PLAIN)), strict=True):
        wanted = asdict(entry)
        gate = wanted.pop("gate")
        # what top_k and the offset of the bias say anyway
        assert gate.pop("has_bias") == (entry is FULL) and not gate.pop("select_all")
        found = asdict(rows)
        assert KernelGate(**gate) == rows.gate_options and found.pop("gate_options") == gate
        assert found == wanted


def test_the_two_rooms_have_the_same_fields() -> None:
    renamed = {"gate": "gate_options"}
    assert [renamed.get(field.name, field.name) for field in fields(SiteEntry)] == [f.name for f in fields(SiteRows)]


@pytest.mark.parametrize(
    "entry",
    [
        replace(PLAIN, csr=CsrEntry(1, 0, 128, 256)),
        replace(PLAIN, dense_offset=0),
        replace(PLAIN, blockdiag=2, blockdiag_offset=0),
        replace(PLAIN, rot2_group=2, c0_offset=0, c1_offset=128),
        replace(PLAIN, gate_offset=0, top_k=1, gate=replace(GATE, group="")),
        replace(PLAIN, gate=GateOptions(group="layers.1.mlp")),
    ],
)
def test_the_device_path_refuses_what_it_does_not_compute(entry: SiteEntry) -> None:
    stored = StoredImage(memoryview(bytes(1024)), torch.float32, site_rows(adapter(entry)), SHAPES)
    with pytest.raises(ImageError, match="--device cpu"):
        lay_out(stored, torch.float32)
