"""Every op of the canonical format: its place in the image, its limits, its form in the manifest, and old LoRAs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.base import SITES, BaseDims
from adapters_store.blobs import open_image
from adapters_store.canonical import ALIGNMENT, check_adapter, is_padding, layout
from adapters_store.convert.adapter_writer import encode_indices, encode_values, write_image, write_manifest
from adapters_store.errors import AdapterCorrupt, AdapterRefused, CorruptUpload
from adapters_store.gates import Experts
from adapters_store.manifest import Manifest, Source, parse_manifest
from adapters_store.ops import Module
from tests.store.folders import TINY, lora_config, lora_tensors, open_store, write_folder

DOWN, UP, Q = SITES.index("down_proj"), SITES.index("up_proj"), SITES.index("q_proj")
MIXED = Experts((2, 3), 2, 1.5)
EVERYTHING = Module(0, Q, 0, has_bias=True, experts=MIXED, cols=3, rows=2, has_out_scale=True, has_in_scale=True)
SOURCE = Source("test", {}, {}, (), 0.0)


def manifest(*modules: Module, experts: tuple[str, ...] = (), base: BaseDims = TINY) -> Manifest:
    """Return a manifest of these modules, its file made up."""
    return Manifest("meteora", base, "float32", 1000, "0" * 64, modules, SOURCE, experts=experts)


def write_adapter(folder: Path, module: Module, changes: dict[str, bytes] | None = None) -> Manifest:
    """Write an adapter of one module with values of 1 and positions 0, 1, 2 ...; `changes` are of encoded tensors."""
    specs = {spec.name: spec for spec in module.tensors(TINY)}

    def encoded(name: str) -> bytes:
        if changes is not None and name in changes:
            return changes[name]
        spec = specs[name]
        if spec.index_limit is not None:
            return encode_indices(np.arange(spec.shape[0]))
        return encode_values(np.full(spec.shape, 0.5, dtype=np.float32), "float32", name)

    folder.mkdir()
    written = write_image(folder, (module,), TINY, "float32", encoded)
    names = ("a", "b") if module.experts is not None else ()
    made = replace(manifest(module, experts=names), file_bytes=written.num_bytes, file_sha256=written.sha256)
    write_manifest(folder, made)
    return made


def floats(*values: float) -> bytes:
    """Return float32 values as the image holds them."""
    return np.array(values, dtype="<f4").tobytes()


def test_a_lora_of_before_keeps_its_bytes_and_digest(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", lora_config(lora_bias=True), lora_tensors(bias=True))
    golden = {
        "float32": "60ccd145dae7a75bb126357ad5f187814dad4ba864b56445f431297b68b189a6",
        "bfloat16": "7b17f3cc6ac0e30e4f998f12b0dd66959637e9e8bb15c4cf8a3f072d17541060",
    }
    for dtype, digest in golden.items():
        store = open_store(tmp_path / dtype, image_dtype=dtype)
        # the digest covers the manifest, which holds the SHA-256 of the file
        assert store.put_dir("a", folder).digest == digest
        store.close()


def test_the_ops_of_a_module_lie_in_the_images_order() -> None:
    slots = layout((EVERYTHING,), TINY, "bfloat16")
    tensors = [slot for slot in slots if not is_padding(slot)]
    kinds = ["G", "A", "BT", "cols.idx", "cols.D", "rows.idx", "rows.D", "out_scale", "in_scale", "bias"]
    assert [slot.name for slot in tensors] == [f"L0.q.{kind}" for kind in kinds]
    assert [slot.shape for slot in tensors] == [
        (2, 16),
        (5, 16),
        (5, 24),
        (3,),
        (3, 24),
        (2,),
        (2, 16),
        (24,),
        (16,),
        (24,),
    ]
    assert [slot.dtype for slot in tensors if slot.dtype != "BF16"] == ["I32", "I32", "F32", "F32"]
    assert all(slot.begin % ALIGNMENT == 0 for slot in tensors)


def test_entries_say_where_each_op_lies(tmp_path: Path) -> None:
    made = write_adapter(tmp_path / "new", EVERYTHING)
    assert check_adapter(tmp_path / "new", TINY, "float32", 16) == made
    (tmp_path / "new").rename(tmp_path / made.digest())
    image = open_image(tmp_path, made.digest())
    (entry,) = image.entries
    offsets = {slot.name.removeprefix("L0.q."): slot.begin for slot in layout((EVERYTHING,), TINY, "float32")}
    assert entry.cols is not None and entry.rows is not None
    assert (entry.ranks, entry.rank, entry.top_k, entry.temperature) == ((2, 3), 5, 2, 1.5)
    assert (entry.cols.count, entry.cols.idx_offset) == (3, offsets["cols.idx"])
    assert (entry.rows.count, entry.rows.d_offset) == (2, offsets["rows.D"])
    assert (entry.gate_offset, entry.a_offset, entry.bt_offset) == (0, offsets["A"], offsets["BT"])
    assert (entry.out_scale_offset, entry.in_scale_offset) == (offsets["out_scale"], offsets["in_scale"])
    assert entry.bias_offset == offsets["bias"]


def test_the_manifest_spells_a_mixture_and_a_selection_in_full() -> None:
    tree = json.loads(manifest(EVERYTHING, experts=("a", "b")).to_bytes())
    mixture, cols, rows, *scales = tree["modules"]["layers.0.self_attn.q_proj"]
    assert mixture == {
        "op": "moe_lowrank",
        "ranks": [2, 3],
        "A": "L0.q.A",
        "BT": "L0.q.BT",
        "gate": {
            "source": "self",
            "W": "L0.q.G",
            "in_norm": "none",
            "logit": "linear",
            "temperature": 1.5,
            "select": {"topk": 2},
            "weight": "softmax_selected",
            "mix": "output",
        },
    }
    assert cols == {"op": "cols", "count": 3, "idx": "L0.q.cols.idx", "D": "L0.q.cols.D"}
    assert rows == {"op": "rows", "count": 2, "idx": "L0.q.rows.idx", "D": "L0.q.rows.D"}
    assert [op["op"] for op in scales] == ["out_scale", "in_scale", "bias"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_every_module_reads_back_from_its_manifest(data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))
    has_experts = data.draw(st.booleans())
    experts = Experts(tuple(ranks), data.draw(st.integers(1, min(len(ranks), 8))), data.draw(st.floats(1e-3, 1e3)))
    module = Module(
        data.draw(st.integers(0, 1)),
        data.draw(st.integers(0, 6)),
        0 if has_experts else data.draw(st.integers(0, 5)),
        has_bias=data.draw(st.booleans()),
        experts=experts if has_experts else None,
        cols=data.draw(st.integers(0, 4)),
        rows=data.draw(st.integers(0, 3)),
        has_out_scale=data.draw(st.booleans()),
        has_in_scale=data.draw(st.booleans()),
    )
    made = manifest(module, experts=tuple(str(i) for i in range(len(ranks))) if has_experts else ())
    if module.ops():
        assert parse_manifest(made.to_bytes()) == made
    else:
        with pytest.raises(CorruptUpload):
            parse_manifest(made.to_bytes())


def mixed(ranks: tuple[int, ...], top_k: int = 1, temperature: float = 1.0) -> Module:
    """Return a module that is a mixture."""
    return Module(0, Q, 0, has_bias=False, experts=Experts(ranks, top_k, temperature))


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        (mixed((1,) * 129), "limit_exceeded", "129 experts; the limit is 128"),
        (mixed((1024, 1025)), "limit_exceeded", "2049 together; the limit is 2048"),
        (mixed((2, 0)), "corrupt_adapter", "rank 0"),
        (mixed(()), "corrupt_adapter", "no experts"),
        (mixed((2,) * 9, top_k=9), "invalid_gate", "allows 1 to 8"),
        (mixed((2, 2), top_k=3), "invalid_gate", "allows 1 to 2"),
        (mixed((2, 2), top_k=0), "invalid_gate", "top 0"),
        (mixed((2, 2), temperature=0.0), "invalid_gate", "temperature 0"),
        (mixed((2, 2), temperature=-1.0), "invalid_gate", "temperature -1"),
        (mixed((2, 2), temperature=1e9), "invalid_gate", "temperature"),
        (Module(0, DOWN, 0, has_bias=False, cols=7), "limit_exceeded", "selects 7 of 24; the limit is 6"),
        (Module(0, UP, 0, has_bias=False, rows=7), "limit_exceeded", "selects 7 of 24; the limit is 6"),
        (Module(0, Q, 0, has_bias=True, cols=5), "limit_exceeded", "selects 5 of 16"),
        (Module(0, Q, 0, has_bias=True, rows=-1), "corrupt_adapter", "negative"),
        (Module(9, Q, 2, has_bias=False), "corrupt_adapter", "2 layers"),
    ],
)
def test_each_limit_has_a_code_and_a_message(module: Module, code: str, message: str) -> None:
    names = tuple(str(i) for i in range(len(module.ranks))) if module.experts is not None else ()
    with pytest.raises(AdapterRefused, match=message) as refusal:
        parse_manifest(manifest(module, experts=names).to_bytes())
    assert refusal.value.code == code


@pytest.mark.parametrize(
    "module",
    [
        mixed((16,) * 128),
        mixed((2,) * 9, top_k=8),
        mixed((2, 2), temperature=1e-6),
        Module(0, DOWN, 0, has_bias=False, cols=6),
        Module(0, UP, 0, has_bias=False, rows=6),
    ],
)
def test_the_nearest_neighbour_within_each_limit_is_taken(module: Module) -> None:
    names = tuple(str(i) for i in range(len(module.ranks))) if module.experts is not None else ()
    made = manifest(module, experts=names)
    assert parse_manifest(made.to_bytes()) == made


@pytest.mark.parametrize("names", [(), ("a",), ("a", "a"), ("a", ""), ("a", "x" * 201), ("a", "b\n")])
def test_the_experts_names_must_fit_the_gates(names: tuple[str, ...]) -> None:
    with pytest.raises(CorruptUpload, match="experts"):
        parse_manifest(manifest(mixed((2, 2)), experts=names).to_bytes())


def test_names_of_experts_without_a_mixture_are_refused() -> None:
    with pytest.raises(CorruptUpload, match="names 1 experts"):
        parse_manifest(manifest(Module(0, Q, 2, has_bias=False), experts=("a",)).to_bytes())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((0, "gate", "source"), "external"),
        ((0, "gate", "logit"), 1),
        ((0, "gate", "source"), "group:layers.0.mlp"),
        ((0, "gate", "weight"), None),
        ((0, "gate", "W"), "L1.q.G"),
        ((0, "gate", "bias"), "L0.q.g"),
        ((0, "gate", "temperature"), 1),
        ((0, "gate", "select"), "some"),
        ((0, "ranks"), [2, 3.0]),
        ((0, "ranks"), [2, True]),
        ((1, "idx"), "L0.q.rows.idx"),
        ((1, "count"), "3"),
        ((1, "op"), "csr"),
        ((2, "op"), "cols"),
        ((3, "out_scale"), "L0.q.bias"),
        ((0, "op"), "lowrank"),
    ],
)
def test_an_op_with_one_wrong_value_is_refused(path: tuple[str | int, ...], value: object) -> None:
    tree = json.loads(manifest(EVERYTHING, experts=("a", "b")).to_bytes())
    node = tree["modules"]["layers.0.self_attn.q_proj"]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(CorruptUpload):
        parse_manifest(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())


def test_two_low_rank_ops_on_one_module_exclude_each_other() -> None:
    tree = json.loads(manifest(EVERYTHING, experts=("a", "b")).to_bytes())
    plain = {"op": "lowrank", "rank": 5, "A": "L0.q.A", "BT": "L0.q.BT"}
    tree["modules"]["layers.0.self_attn.q_proj"].insert(1, plain)
    with pytest.raises(CorruptUpload):
        parse_manifest(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())


COLS = Module(0, DOWN, 0, has_bias=False, cols=3)
IDX = "L0.down.cols.idx"


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ((0, 0, 1), "strictly increasing"),
        ((2, 1, 3), "strictly increasing"),
        ((-1, 0, 1), "outside 0 to 23"),
        ((0, 1, 24), "outside 0 to 23"),
        ((0, -(1 << 31), 5), "strictly increasing"),
    ],
)
def test_positions_out_of_order_or_range_are_refused(indices: tuple[int, ...], message: str, tmp_path: Path) -> None:
    raw = np.array(indices, dtype="<i4").tobytes()
    write_adapter(tmp_path / "new", COLS, {IDX: raw})
    with pytest.raises(AdapterRefused, match=message) as refusal:
        check_adapter(tmp_path / "new", TINY, "float32", 16)
    assert refusal.value.code == "invalid_index"


def test_the_last_position_of_a_dimension_is_taken(tmp_path: Path) -> None:
    made = write_adapter(tmp_path / "new", COLS, {IDX: np.array((0, 5, 23), dtype="<i4").tobytes()})
    assert check_adapter(tmp_path / "new", TINY, "float32", 16) == made


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_of_every_op_must_be_finite(value: float, tmp_path: Path) -> None:
    for number, spec in enumerate(spec for spec in EVERYTHING.tensors(TINY) if spec.index_limit is None):
        values = [1.0] * int(np.prod(spec.shape) - 1) + [value]
        write_adapter(tmp_path / str(number), EVERYTHING, {spec.name: floats(*values)})
        with pytest.raises(AdapterRefused, match=spec.name) as refusal:
            check_adapter(tmp_path / str(number), TINY, "float32", 16)
        assert refusal.value.code == "non_finite"


@pytest.mark.parametrize(
    ("module", "neutral"),
    [
        (COLS, {"L0.down.cols.D": floats(*[0] * 48)}),
        (Module(0, UP, 0, has_bias=False, rows=2), {"L0.up.rows.D": floats(*[0] * 32)}),
        (Module(0, Q, 0, has_bias=False, has_out_scale=True), {"L0.q.out_scale": floats(*[1] * 24)}),
        (Module(0, Q, 0, has_bias=False, has_in_scale=True), {"L0.q.in_scale": floats(*[1] * 16)}),
        (mixed((2, 2)), {"L0.q.BT": floats(*[0] * 96)}),
    ],
)
def test_an_op_that_does_nothing_is_refused_and_its_neighbour_taken(
    module: Module, neutral: dict[str, bytes], tmp_path: Path
) -> None:
    write_adapter(tmp_path / "acts", module)
    check_adapter(tmp_path / "acts", TINY, "float32", 16)
    write_adapter(tmp_path / "idle", module, neutral)
    with pytest.raises(AdapterRefused) as refusal:
        check_adapter(tmp_path / "idle", TINY, "float32", 16)
    assert refusal.value.code == "adapter_no_effect"


def test_the_rank_limit_is_each_experts_own(tmp_path: Path) -> None:
    made = write_adapter(tmp_path / "new", mixed((2, 3)))
    assert made.rank == 5 and check_adapter(tmp_path / "new", TINY, "float32", 3) == made
    with pytest.raises(AdapterRefused, match="rank 3"):
        check_adapter(tmp_path / "new", TINY, "float32", 2)


def test_a_flipped_bit_of_a_stored_selection_is_never_served(tmp_path: Path) -> None:
    made = write_adapter(tmp_path / "new", COLS)
    folder = (tmp_path / "new").rename(tmp_path / made.digest())
    whole = (folder / "adapter.safetensors").read_bytes()
    for position in range(0, len(whole), 37):
        raw = bytearray(whole)
        raw[position] ^= 1
        (folder / "adapter.safetensors").write_bytes(raw)
        with pytest.raises(AdapterCorrupt):
            open_image(tmp_path, made.digest())


def test_scales_keep_float32_in_a_bfloat16_image(tmp_path: Path) -> None:
    learnt = np.full(24, 1.0009765625, dtype=np.float32)
    module = Module(0, Q, 0, has_bias=False, has_out_scale=True)
    (tmp_path / "new").mkdir()
    written = write_image(tmp_path / "new", (module,), TINY, "bfloat16", lambda _: learnt.tobytes())
    made = replace(manifest(module), dtype="bfloat16", file_bytes=written.num_bytes, file_sha256=written.sha256)
    write_manifest(tmp_path / "new", made)
    assert check_adapter(tmp_path / "new", TINY, "bfloat16", 16) == made
    (tmp_path / "new").rename(tmp_path / made.digest())
    image = open_image(tmp_path, made.digest())
    (entry,) = image.entries
    offset = entry.out_scale_offset
    assert offset is not None and image.data[offset : offset + 96] == learnt.tobytes()
