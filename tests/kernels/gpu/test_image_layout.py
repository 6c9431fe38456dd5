"""Laying an image out in the model's dtype: every tensor bit by bit, in buffers of any size, and what is refused."""

import pytest
import torch
from torch import Tensor

from adapter_kernels.gate_options import GateOptions
from adapter_kernels.gpu.copies import InlineCopies
from adapter_kernels.gpu.image_layout import ImageLayout, StoredImage, lay_out
from adapter_kernels.gpu.image_upload import ImageUpload, UploadCancelled
from adapter_kernels.gpu.placed_adapter import PlacedAdapter
from adapter_kernels.gpu.tables import EXPERT_OF_RANK, GATE, SITES
from adapter_kernels.image import AdapterImage, ImageError, SiteRows
from tests.kernels.gpu.family_cases import family_images
from tests.kernels.random_adapters import SHAPES, Ops, random_adapter, random_image, uniform_ranks

UNEVEN = {(0, "q_proj"): 3, (0, "o_proj"): 17, (1, "gate_proj"): 1, (1, "down_proj"): 8}
BIASED = frozenset({(0, "q_proj"), (1, "down_proj")})


def _stored(image: AdapterImage) -> StoredImage:
    data = memoryview(image.data.numpy().tobytes())
    return StoredImage(data, image.dtype, image.rows, image.shapes)


def _image(dtype: torch.dtype, seed: int = 0) -> AdapterImage:
    return random_image(UNEVEN, torch.Generator().manual_seed(seed), dtype, BIASED)


def _uploaded(layout: ImageLayout, buffer_bytes: int) -> Tensor:
    extent = torch.full((layout.num_bytes,), 255, dtype=torch.uint8)
    upload = ImageUpload(InlineCopies(), num_buffers=2, buffer_bytes=buffer_bytes)
    upload.upload(layout, extent, None, lambda: False)
    return extent


@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("buffer_bytes", [128, 640, 1 << 20])
def test_every_tensor_arrives_bit_by_bit(stored_dtype: torch.dtype, dtype: torch.dtype, buffer_bytes: int) -> None:
    image = _image(stored_dtype)
    layout = lay_out(_stored(image), dtype)
    data = _uploaded(layout, buffer_bytes)
    laid_out = AdapterImage(data, dtype, layout.rows, SHAPES)
    for stored_rows, rows in zip(image.rows, layout.rows, strict=True):
        assert (stored_rows.layer, stored_rows.site, stored_rows.rank) == (rows.layer, rows.site, rows.rank)
        expected, found = image.site(stored_rows), laid_out.site(rows)
        assert torch.equal(found.a, expected.a.to(dtype)) and torch.equal(found.bt, expected.bt.to(dtype))
        assert (found.bias is None) == (expected.bias is None)
        if found.bias is not None and expected.bias is not None:
            assert torch.equal(found.bias, expected.bias.to(dtype))
        offsets = [rows.a_offset, rows.bt_offset, *([] if rows.bias_offset is None else [rows.bias_offset])]
        assert all(offset % 128 == 0 for offset in offsets)


def test_an_image_of_the_models_dtype_is_one_copy_and_stays_byte_for_byte() -> None:
    image = _image(torch.bfloat16)
    layout = lay_out(_stored(image), torch.bfloat16)
    assert len(layout.spans) == 1 and layout.rows == image.rows
    assert torch.equal(_uploaded(layout, 256), image.data)


def test_tensors_that_lie_in_another_order_in_the_file_arrive_too() -> None:
    values = torch.arange(1, 16 + 24 + 1, dtype=torch.float32)
    data = torch.zeros(384, dtype=torch.uint8)
    data[256:320] = values[:16].view(torch.uint8)
    data[:96] = values[16:].view(torch.uint8)
    rows = (SiteRows(0, "q_proj", (1,), 256, 0, None),)
    layout = lay_out(StoredImage(memoryview(data.numpy().tobytes()), torch.float32, rows, SHAPES), torch.float32)
    found = AdapterImage(_uploaded(layout, 128), torch.float32, layout.rows, SHAPES).site(layout.rows[0])
    assert found.a.flatten().tolist() == values[:16].tolist() and found.bt.flatten().tolist() == values[16:].tolist()


def test_an_image_without_sites_has_a_place() -> None:
    layout = lay_out(StoredImage(memoryview(b""), torch.float32, (), SHAPES), torch.bfloat16)
    assert layout.num_bytes == 128
    assert _uploaded(layout, 128).tolist() == [0] * 128


@pytest.mark.parametrize("offset", [-128, 1 << 20])
def test_rows_outside_the_stored_image_are_refused(offset: int) -> None:
    image = _image(torch.float32)
    rows = (SiteRows(1, "up_proj", (4,), offset, 0, None),)
    with pytest.raises(ImageError, match=r"layer 1, up_proj.*upload the adapter again"):
        lay_out(StoredImage(_stored(image).data, torch.float32, rows, SHAPES), torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_weight_that_is_not_finite_in_the_models_dtype_is_named(value: float) -> None:
    image = random_image(uniform_ranks(2), torch.Generator().manual_seed(0))
    place = next(rows for rows in image.rows if (rows.layer, rows.site) == (1, "gate_proj"))
    image.site(place).bt[1, 7] = value
    layout = lay_out(_stored(image), torch.float16)
    with pytest.raises(ImageError, match=r"layer 1, gate_proj: a weight is not finite in torch.float16.*--dtype"):
        _uploaded(layout, 256)


def test_padding_is_no_weight() -> None:
    image = _image(torch.float32)
    end = image.rows[0].a_offset + 3 * SHAPES["q_proj"][1] * 4
    image.data[end : end + 4] = torch.tensor([float("nan")]).view(torch.uint8)
    # taken, and copied as it lies: the NaN is no weight and is refused nowhere
    extent = _uploaded(lay_out(_stored(image), torch.float32), 128)
    assert torch.equal(extent[: end + 4], image.data[: end + 4])


def test_a_cancelled_upload_stops_between_two_buffers() -> None:
    layout = lay_out(_stored(_image(torch.float32)), torch.float32)
    extent = torch.full((layout.num_bytes,), 255, dtype=torch.uint8)
    answers = iter([False, False, True])
    with pytest.raises(UploadCancelled):
        ImageUpload(InlineCopies(), num_buffers=2, buffer_bytes=128).upload(layout, extent, None, answers.__next__)
    assert (extent[256:] == 255).all()


@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_indices_and_scales_keep_their_own_types(stored_dtype: torch.dtype, dtype: torch.dtype) -> None:
    for image in family_images(stored_dtype):
        layout = lay_out(_stored(image), dtype)
        laid_out = AdapterImage(_uploaded(layout, 256), dtype, layout.rows, SHAPES)
        for stored_rows, rows in zip(image.rows, layout.rows, strict=True):
            expected, found = image.site(stored_rows), laid_out.site(rows)
            pairs = [(expected.out_scale, found.out_scale), (expected.in_scale, found.in_scale)]
            for mine, theirs in ((expected.cols, found.cols), (expected.rows, found.rows)):
                assert (mine is None) == (theirs is None)
                if mine is not None and theirs is not None:
                    pairs += [(mine.idx, theirs.idx), (mine.d.to(dtype), theirs.d)]
            if expected.gate is not None and found.gate is not None:
                pairs.append((expected.gate.weight.to(dtype), found.gate.weight))
            for wanted, got in pairs:
                assert (wanted is None) == (got is None)
                assert wanted is None or got is None or torch.equal(wanted, got)


def test_each_rank_of_a_mixture_knows_its_expert() -> None:
    ops = {
        (0, "q_proj"): Ops((1, 3, 2), top_k=1),
        (0, "o_proj"): Ops((2, 2), top_k=1),
        (0, "v_proj"): Ops((1, 3, 2), 2),
    }
    layout = lay_out(_stored(random_adapter(ops, torch.Generator().manual_seed(0))), torch.float32)
    extent = _uploaded(layout, 128)
    lists = {ranks: extent[at : at + 4 * sum(ranks)].view(torch.int32) for ranks, at in layout.expert_lists.items()}
    assert {ranks: experts.tolist() for ranks, experts in lists.items()} == {
        (1, 3, 2): [0, 1, 1, 1, 2, 2],
        (2, 2): [0, 0, 1, 1],
    }
    adapter = PlacedAdapter.of(layout, extent, 1)
    # moved tensor by tensor, the lists with them
    assert {*layout.expert_lists.values()} <= {*adapter.cuts} and list(adapter.cuts) == sorted(adapter.cuts)
    entries = adapter.entries_under_way(4096, 1024, max(layout.expert_lists.values()))
    assert entries[SITES.index("o_proj"), EXPERT_OF_RANK] * 4 == layout.expert_lists[2, 2] + 4096
    assert entries[SITES.index("q_proj"), EXPERT_OF_RANK] * 4 == layout.expert_lists[1, 3, 2] + 1024
    assert entries[SITES.index("q_proj"), GATE] * 4 == (layout.rows[0].gate_offset or 0) + 1024


def test_what_the_kernels_do_not_compute_is_refused_by_name() -> None:
    generator = torch.Generator().manual_seed(0)
    found = []
    for ops in (Ops(csr=3), Ops((2, 2), top_k=1, gate=GateOptions(weight="sigmoid"))):
        with pytest.raises(ImageError, match=r"layer 0, q_proj: the adapter has .*; serve with --device cpu") as caught:
            lay_out(_stored(random_adapter({(0, "q_proj"): ops}, generator)), torch.float32)
        found.append(str(caught.value))
    assert "a sparse matrix (csr)" in found[0] and "a gate with options" in found[1]


@pytest.mark.parametrize("idx", [[3, 3], [5, 2], [-1, 0], [0, 40]], ids=["twice", "falling", "negative", "beyond"])
def test_channels_that_a_kernel_could_not_read_are_refused(idx: list[int]) -> None:
    image = random_adapter({(0, "down_proj"): Ops(cols=2)}, torch.Generator().manual_seed(1))
    cols = image.rows[0].cols
    assert cols is not None
    image.data[cols.idx_offset : cols.idx_offset + 8].view(torch.int32)[:] = torch.tensor(idx)
    with pytest.raises(ImageError, match="not increasing below 40"):
        lay_out(_stored(image), torch.float32)
