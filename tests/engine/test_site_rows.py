"""Every field of a stored entry reaches the kernels' table by the same name; the device path says what it lacks."""

from dataclasses import asdict, replace

import pytest
import torch

from adapter_kernels.gpu.image_layout import StoredImage, lay_out
from adapter_kernels.image import ImageError
from adapters_store.store import OpenAdapter, SiteEntry, SparseEntry
from serve.engine.site_rows import site_rows
from tests.engine.arena_adapters import BASE
from tests.kernels.random_adapters import SHAPES

FULL = SiteEntry(1, "q_proj", (4, 2), 0, 128, 256, 384, 2, 1.5, SparseEntry(3, 1, 2), SparseEntry(4, 5, 6), 512, 640)
PLAIN = SiteEntry(1, "q_proj", (1,), 0, 128, None)


def adapter(*entries: SiteEntry) -> OpenAdapter:
    """Return an open adapter with these entries."""
    return OpenAdapter("0" * 64, "float32", 4, 1024, BASE, memoryview(bytes(1024)), entries)


def test_every_field_is_copied() -> None:
    assert [asdict(rows) for rows in site_rows(adapter(FULL, PLAIN))] == [asdict(FULL), asdict(PLAIN)]


@pytest.mark.parametrize(
    "entry",
    [
        replace(PLAIN, gate_offset=0, top_k=1),
        replace(PLAIN, cols=SparseEntry(1, 0, 128)),
        replace(PLAIN, rows=SparseEntry(1, 0, 128)),
        replace(PLAIN, out_scale_offset=0),
        replace(PLAIN, in_scale_offset=0),
    ],
)
def test_the_device_path_refuses_what_it_does_not_compute(entry: SiteEntry) -> None:
    stored = StoredImage(memoryview(bytes(1024)), torch.float32, site_rows(adapter(entry)), SHAPES)
    with pytest.raises(ImageError, match="--device cpu"):
        lay_out(stored, torch.float32)
