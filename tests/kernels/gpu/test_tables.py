"""The device tables: entries point at the image's rows, are changed in place, and refuse what a kernel cannot read."""

import dataclasses

import pytest
import torch

from adapter_kernels import reference
from adapter_kernels.gpu.tables import ALIGNMENT_BYTES, COLUMNS, LACKING, SITES, DeviceTables, first_site, table_entries
from adapter_kernels.image import AdapterImage, ImageError, SiteRows
from tests.kernels.gpu.batches import random_image, tables_of
from tests.kernels.gpu.bridges import DTYPES, SHAPES


def image_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> AdapterImage:
    """Two layers: q_proj and down_proj in the first; in the second o_proj with a bias, and up_proj's bias alone."""
    ranks = {(0, "q_proj"): 3, (0, "down_proj"): 17, (1, "o_proj"): 8}
    biased = frozenset({(1, "o_proj"), (1, "up_proj")})
    return random_image(SHAPES, ranks, torch.Generator().manual_seed(seed), dtype, biased)


def test_sites_are_counted_layer_by_layer() -> None:
    assert SITES == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert [first_site(0, site) for site in ("qkv", "o", "gate_up", "down")] == [0, 3, 4, 6]
    assert first_site(2, "gate_up") == 18


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_find_the_images_own_tensors(dtype: torch.dtype) -> None:
    images = [image_of(dtype, seed) for seed in range(3)]
    tables = tables_of(images, 2, dtype)
    assert tables.num_slots == 3
    for slot, image in enumerate(images):
        for rows in image.rows:
            out_dim, in_dim = SHAPES[rows.site]
            site = rows.layer * len(SITES) + SITES.index(rows.site)
            found = reference.table_site(tables, site, slot, in_dim, out_dim)
            expected = image.site(rows)
            assert found is not None
            assert torch.equal(found.a, expected.a)
            assert torch.equal(found.bt, expected.bt)
            assert (found.bias is None) == (expected.bias is None)
            if found.bias is not None and expected.bias is not None:
                assert torch.equal(found.bias, expected.bias)


def test_sites_that_the_adapter_lacks_say_so() -> None:
    tables = tables_of([image_of()], 2, torch.float32)
    acting = {0, 6, 7 + 3, 7 + 5}
    for site in range(2 * len(SITES)):
        assert (tuple(tables.rows[site, 0].tolist()) == LACKING) == (site not in acting)
    assert tables.rows[7 + 5, 0, 3] == 0
    assert tables.rows[7 + 5, 0, 2] > 0


def test_writing_and_clearing_stay_in_place_and_in_their_slot() -> None:
    image = image_of()
    arena = torch.zeros(64 + image.data.numel() // 4)
    tables = DeviceTables.build(2, 3, arena)
    place = tables.rows.data_ptr()
    tables.write(1, table_entries(image, 2, begin=64))
    assert tables.rows[0, 1].tolist()[3] == 3
    assert bool((tables.rows[:, [0, 2]] == torch.tensor(LACKING)).all())
    tables.clear(1)
    assert bool((tables.rows == torch.tensor(LACKING)).all())
    assert tables.rows.data_ptr() == place
    assert tables.rows.shape == (2 * len(SITES), 3, COLUMNS)
    assert tables.rows.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_offset_is_aligned(dtype: torch.dtype) -> None:
    entries = table_entries(image_of(dtype), 2, begin=ALIGNMENT_BYTES)
    offsets = entries[:, :3][entries[:, :3] >= 0]
    assert bool((offsets * dtype.itemsize % ALIGNMENT_BYTES == 0).all())


def test_unaligned_places_are_refused() -> None:
    with pytest.raises(ImageError, match="not aligned"):
        table_entries(image_of(), 2, begin=4)
    image = image_of()
    shifted = tuple(dataclasses.replace(rows, bt_offset=rows.bt_offset + 64) for rows in image.rows[:1])
    with pytest.raises(ImageError, match="not aligned"):
        table_entries(dataclasses.replace(image, rows=shifted), 2, begin=0)


def test_rows_outside_the_image_or_the_model_are_refused() -> None:
    image = image_of()
    beyond = SiteRows(0, "q_proj", (4096,), 0, 0, None)
    with pytest.raises(ImageError, match="do not fit"):
        table_entries(dataclasses.replace(image, rows=(beyond,)), 2, begin=0)
    with pytest.raises(ImageError, match="layer 1; this model has 1"):
        table_entries(image, 1, begin=0)
