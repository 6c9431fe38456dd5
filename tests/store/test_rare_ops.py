"""Sparse, dense and turned modules, the output head and every option of a gate: their form, limits and values."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.base import SITES
from adapters_store.blobs import open_image
from adapters_store.canonical import layout
from adapters_store.convert.adapter_writer import encode_signs
from adapters_store.convert.options import ConvertOptions
from adapters_store.entries import CsrEntry
from adapters_store.errors import AdapterRefused, CorruptUpload
from adapters_store.gates import IN_NORMS, LOGITS, MIXES, WEIGHTS, Experts, GateOptions
from adapters_store.manifest import parse_manifest
from adapters_store.op_limits import MAX_BLOCK
from adapters_store.ops import Csr, Module, head_module
from tests.store.canonical_files import check, floats, ints, manifest, quarter_turns, write
from tests.store.folders import TINY, open_store

Q = SITES.index("q_proj")
# q_proj maps 16 inputs to 24 outputs: 384 weights, of which 38 are a tenth
PLAIN = Module(0, Q, 0, has_bias=False)
SPARSE = replace(PLAIN, csr=Csr(9, is_ternary=False))
TERNARY = replace(PLAIN, csr=Csr(9, is_ternary=True))
DENSE = replace(PLAIN, has_dense=True)
BLOCKS = replace(PLAIN, blockdiag=4)
PAIRS = replace(PLAIN, rot2_group=8)
GATE = GateOptions("unit", "abs", has_bias=True, weight="sigmoid", mix="rank")
GATED = replace(PLAIN, experts=Experts((2, 2, 2), 2, 0.5, GATE))
EVERYTHING = Module(
    1,
    Q,
    0,
    has_bias=True,
    experts=GATED.experts,
    cols=2,
    rows=1,
    has_out_scale=True,
    has_in_scale=True,
    csr=Csr(3, is_ternary=True),
    has_dense=True,
    blockdiag=2,
    rot2_group=4,
)


def test_the_tensors_lie_in_the_images_order_and_keep_their_types() -> None:
    found = [
        (slot.name.removeprefix("L1.q."), slot.dtype, slot.shape)
        for slot in layout((EVERYTHING,), TINY, "bfloat16")
        if not slot.name.startswith("pad.")
    ]
    assert found == [
        ("G", "BF16", (3, 16)),
        ("Gb", "F32", (3,)),
        ("A", "BF16", (6, 16)),
        ("BT", "BF16", (6, 24)),
        ("cols.idx", "I32", (2,)),
        ("cols.D", "BF16", (2, 24)),
        ("rows.idx", "I32", (1,)),
        ("rows.D", "BF16", (1, 16)),
        ("csr.indptr", "I32", (25,)),
        ("csr.col", "I32", (3,)),
        ("csr.sign", "U8", (1,)),
        ("csr.scale", "F32", (1,)),
        ("dense", "BF16", (24, 16)),
        ("out_scale", "F32", (24,)),
        ("in_scale", "F32", (16,)),
        ("in_blockdiag", "F32", (8, 2, 2)),
        ("rot2.c0", "F32", (24,)),
        ("rot2.c1", "F32", (24,)),
        ("bias", "BF16", (24,)),
    ]
    (val,) = (slot for slot in layout((SPARSE,), TINY, "bfloat16") if slot.name == "L0.q.csr.val")
    assert (val.dtype, val.shape) == ("BF16", (9,))


def test_the_output_head_lies_behind_every_layer() -> None:
    head = head_module(2, has_bias=True)
    assert sorted((head, EVERYTHING)) == [EVERYTHING, head] and head.path == "lm_head"
    slots = layout((head,), TINY, "float32")
    shapes = [(slot.name, slot.shape) for slot in slots if slot.name.startswith("lm_head")]
    assert shapes == [("lm_head.A", (2, 16)), ("lm_head.BT", (2, 32)), ("lm_head.bias", (32,))]


def test_the_manifest_spells_each_op_in_full() -> None:
    tree = json.loads(manifest(EVERYTHING, head_module(1)).to_bytes())
    mixture, _, _, *rest = tree["modules"]["layers.1.self_attn.q_proj"]
    assert mixture["gate"] == {
        "source": "self",
        "W": "L1.q.G",
        "bias": "L1.q.Gb",
        "in_norm": "unit",
        "logit": "abs",
        "temperature": 0.5,
        "select": {"topk": 2},
        "weight": "sigmoid",
        "mix": "rank",
    }
    places = {"indptr": "L1.q.csr.indptr", "col": "L1.q.csr.col", "sign": "L1.q.csr.sign", "scale": "L1.q.csr.scale"}
    assert rest == [
        {"op": "csr", "nnz": 3, "ternary": True, **places},
        {"op": "dense", "dense": "L1.q.dense"},
        {"op": "out_scale", "out_scale": "L1.q.out_scale"},
        {"op": "in_scale", "in_scale": "L1.q.in_scale"},
        {"op": "in_blockdiag", "block": 2, "R": "L1.q.in_blockdiag"},
        {"op": "out_rot2", "group": 4, "c0": "L1.q.rot2.c0", "c1": "L1.q.rot2.c1"},
        {"op": "bias", "bias": "L1.q.bias"},
    ]
    head = {"op": "lowrank", "rank": 1, "A": "lm_head.A", "BT": "lm_head.BT"}
    assert tree["modules"]["lm_head"] == [head]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_every_module_reads_back_from_its_manifest(data: st.DataObject) -> None:
    ranks = (2,) * data.draw(st.integers(1, 9))
    select_all = data.draw(st.booleans())
    gate = GateOptions(
        in_norm=data.draw(st.sampled_from(IN_NORMS)),
        logit=data.draw(st.sampled_from(LOGITS)),
        has_bias=data.draw(st.booleans()),
        select_all=select_all,
        weight=data.draw(st.sampled_from(WEIGHTS)),
        mix=data.draw(st.sampled_from(MIXES)),
    )
    top_k = len(ranks) if select_all else data.draw(st.integers(1, min(len(ranks), 8)))
    nnz = data.draw(st.integers(0, 19))
    module = Module(
        data.draw(st.integers(0, 1)),
        data.draw(st.integers(0, 6)),
        0,
        has_bias=data.draw(st.booleans()),
        experts=Experts(ranks, top_k, 1.0, gate),
        has_in_scale=data.draw(st.booleans()),
        csr=Csr(nnz, data.draw(st.booleans())) if nnz else None,
        has_dense=data.draw(st.booleans()),
        blockdiag=data.draw(st.sampled_from([0, 2, 4, 8])),
        rot2_group=data.draw(st.sampled_from([0, 2, 4])),
    )
    made = manifest(module)
    assert parse_manifest(made.to_bytes()) == made


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        (replace(PLAIN, csr=Csr(39, is_ternary=False)), "limit_exceeded", "39 of 384 weights.*the limit is 38"),
        (replace(PLAIN, csr=Csr(0, is_ternary=False)), "corrupt_adapter", "negative"),
        (replace(PLAIN, csr=Csr(-1, is_ternary=True)), "corrupt_adapter", "negative"),
        (replace(PLAIN, blockdiag=3), "corrupt_adapter", "blocks of 3 inputs"),
        (replace(PLAIN, blockdiag=1), "corrupt_adapter", "blocks of 1 inputs"),
        (replace(PLAIN, blockdiag=-2), "corrupt_adapter", "negative"),
        (replace(PLAIN, rot2_group=3), "corrupt_adapter", "groups of 3"),
        (replace(PLAIN, rot2_group=16), "corrupt_adapter", "groups of 16"),
        (replace(GATED, experts=Experts((2, 2), 1, 1.0, GateOptions(in_norm="rms"))), "invalid_gate", "in_norm 'rms'"),
        (
            replace(GATED, experts=Experts((2, 2), 1, 1.0, GateOptions(logit="cosine"))),
            "invalid_gate",
            "logit 'cosine'",
        ),
        (replace(GATED, experts=Experts((2, 2), 1, 1.0, GateOptions(weight="max"))), "invalid_gate", "weight 'max'"),
        (replace(GATED, experts=Experts((2, 2), 1, 1.0, GateOptions(mix="sum"))), "invalid_gate", "mix 'sum'"),
        (replace(GATED, experts=Experts((2, 3), 1, 1.0, GateOptions(mix="rank"))), "invalid_gate", "equal ranks"),
        (replace(head_module(2), cols=1), "unsupported_adapter", "lm_head holds more than"),
        (replace(head_module(2), experts=Experts((2, 2), 1, 1.0)), "unsupported_adapter", "lm_head holds more than"),
        (head_module(0), "corrupt_adapter", "lm_head holds no op"),
    ],
)
def test_each_limit_has_a_code_and_a_message(module: Module, code: str, message: str) -> None:
    with pytest.raises(AdapterRefused, match=message) as refusal:
        parse_manifest(manifest(module).to_bytes())
    assert refusal.value.code == code


@pytest.mark.parametrize(
    "module",
    [
        replace(PLAIN, csr=Csr(38, is_ternary=False)),
        replace(PLAIN, csr=Csr(1, is_ternary=True)),
        replace(PLAIN, blockdiag=2),
        replace(PLAIN, blockdiag=16),
        replace(PLAIN, rot2_group=24),
        replace(GATED, experts=Experts((1,) * 128, 128, 1.0, GateOptions(select_all=True))),
        replace(GATED, experts=Experts((2, 3), 1, 1.0, GateOptions(weight="one"))),
        head_module(0, has_bias=True),
    ],
)
def test_the_nearest_neighbour_within_each_limit_is_taken(module: Module) -> None:
    made = manifest(module)
    assert parse_manifest(made.to_bytes()) == made


def test_blocks_have_a_largest_size() -> None:
    base = replace(TINY, hidden_size=4 * MAX_BLOCK)
    made = manifest(replace(PLAIN, blockdiag=MAX_BLOCK), base=base)
    assert parse_manifest(made.to_bytes()) == made
    with pytest.raises(AdapterRefused, match="the limit is 1024") as refusal:
        parse_manifest(manifest(replace(PLAIN, blockdiag=2 * MAX_BLOCK), base=base).to_bytes())
    assert refusal.value.code == "limit_exceeded"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((3, "nnz"), 3.0),
        ((3, "nnz"), True),
        ((3, "ternary"), False),
        ((3, "ternary"), 1),
        ((3, "sign"), "L1.q.csr.val"),
        ((3, "indptr"), "L0.q.csr.indptr"),
        ((4, "dense"), "L1.q.A"),
        ((7, "block"), "2"),
        ((7, "R"), "L1.q.rot2.c0"),
        ((8, "c1"), "L1.q.rot2.c0"),
        ((8, "group"), None),
        ((0, "gate", "bias"), "L1.q.G"),
        ((0, "gate", "select"), {"topk": 2, "all": True}),
        ((0, "gate", "source"), "external"),
    ],
)
def test_an_op_with_one_wrong_value_is_refused(path: tuple[str | int, ...], value: object) -> None:
    tree = json.loads(manifest(EVERYTHING).to_bytes())
    node = tree["modules"]["layers.1.self_attn.q_proj"]
    for key in path[:-1]:
        node = node[key]
    assert node[path[-1]] != value or type(node[path[-1]]) is not type(value)
    node[path[-1]] = value
    with pytest.raises(CorruptUpload):
        parse_manifest(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())


def test_entries_say_where_each_op_lies(tmp_path: Path) -> None:
    made = write(tmp_path / "new", manifest(replace(SPARSE, layer=0), EVERYTHING, head_module(2, has_bias=True)))
    (tmp_path / "new").rename(tmp_path / made.digest())
    image = open_image(tmp_path, made.digest())
    offsets = {slot.name: slot.begin for slot in layout(made.modules, TINY, "float32")}
    sparse, full = image.entries
    own = {name.removeprefix("L1.q."): begin for name, begin in offsets.items() if name.startswith("L1.q.")}
    assert sparse.csr == CsrEntry(9, *(offsets[f"L0.q.csr.{kind}"] for kind in ("indptr", "col", "val")))
    assert full.csr == CsrEntry(3, *(own[f"csr.{kind}"] for kind in ("indptr", "col", "sign", "scale")))
    assert (full.gate_offset, full.gate_bias_offset, full.gate) == (own["G"], own["Gb"], GATE)
    assert (full.dense_offset, full.blockdiag, full.blockdiag_offset) == (own["dense"], 2, own["in_blockdiag"])
    assert (full.rot2_group, full.c0_offset, full.c1_offset) == (4, own["rot2.c0"], own["rot2.c1"])
    head = image.model.head
    assert head is not None and head.site == "lm_head" and head.ranks == (2,)
    assert [head.a_offset, head.bt_offset, head.bias_offset] == [offsets[f"lm_head.{k}"] for k in ("A", "BT", "bias")]


def starts(*ends: int) -> bytes:
    """Return the row starts of q_proj's 24 rows whose first rows end as given."""
    return ints(0, *ends, *[9] * (24 - len(ends)))


INDPTR, COL = "L0.q.csr.indptr", "L0.q.csr.col"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({INDPTR: starts(4, 3, 9)}, "without a step back"),
        ({INDPTR: ints(1, *[9] * 24)}, "lead from 0 to 9"),
        ({INDPTR: ints(0, *[9] * 23, 8)}, "lead from 0 to 9"),
        ({INDPTR: starts(10)}, "without a step back"),
        ({INDPTR: starts(-1)}, "without a step back"),
        ({INDPTR: starts(9), COL: ints(0, 1, 2, 3, 4, 5, 6, 7, 16)}, "outside 0 to 15"),
        ({INDPTR: starts(9), COL: ints(-1, 1, 2, 3, 4, 5, 6, 7, 8)}, "outside 0 to 15"),
        ({INDPTR: starts(9), COL: ints(0, 1, 2, 2, 4, 5, 6, 7, 8)}, "increasing within a row"),
        ({INDPTR: starts(5), COL: ints(0, 1, 2, 3, 4, 5, 7, 6, 8)}, "increasing within a row"),
    ],
)
def test_a_sparse_matrix_out_of_order_or_range_is_refused(
    changes: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    for number, module in enumerate((SPARSE, TERNARY)):
        with pytest.raises(AdapterRefused, match=message) as refusal:
            check(tmp_path / str(number), manifest(module), changes)
        assert refusal.value.code == "invalid_index"


def test_columns_may_fall_from_one_row_to_the_next_and_rows_may_be_empty(tmp_path: Path) -> None:
    columns = ints(3, 8, 15, 0, 15, 0, 1, 2, 3)
    check(tmp_path / "new", manifest(SPARSE), {INDPTR: starts(0, 3, 3, 5), COL: columns})


def test_signs_are_packed_lowest_bit_first_and_nothing_lies_behind_them(tmp_path: Path) -> None:
    raw = encode_signs(np.array([1, 0, 0, 0, 0, 0, 0, 0, 1], dtype=np.bool_))
    assert raw == bytes([1, 1])
    check(tmp_path / "good", manifest(TERNARY), {"L0.q.csr.sign": raw})
    with pytest.raises(CorruptUpload, match="behind its 9 signs"):
        check(tmp_path / "bad", manifest(TERNARY), {"L0.q.csr.sign": bytes([1, 3])})


def test_blocks_must_turn(tmp_path: Path) -> None:
    turns = np.frombuffer(quarter_turns(4, 4), dtype="<f4")
    check(tmp_path / "good", manifest(BLOCKS), {"L0.q.in_blockdiag": floats(*(1.0045 * turns))})
    with pytest.raises(AdapterRefused, match=r"no rotations.*differs from 1 by 0\.012") as refusal:
        check(tmp_path / "bad", manifest(BLOCKS), {"L0.q.in_blockdiag": floats(*(1.006 * turns))})
    assert refusal.value.code == "unsupported_adapter"
    one_bad = np.concatenate((turns[:48], np.full(16, 0.5)))
    with pytest.raises(AdapterRefused, match="no rotations"):
        check(tmp_path / "one", manifest(BLOCKS), {"L0.q.in_blockdiag": floats(*one_bad)})
    with pytest.raises(AdapterRefused, match="no rotations"):
        check(tmp_path / "huge", manifest(BLOCKS), {"L0.q.in_blockdiag": floats(*(3e38 * turns))})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_of_every_op_must_be_finite(value: float, tmp_path: Path) -> None:
    made = manifest(EVERYTHING)
    whole = [spec for spec in EVERYTHING.tensors(TINY) if spec.index_limit is None and not spec.is_bits]
    for number, spec in enumerate(whole):
        raw = floats(*[0.5] * (int(np.prod(spec.shape)) - 1), value)
        with pytest.raises(AdapterRefused, match=spec.name) as refusal:
            check(tmp_path / str(number), made, {spec.name: raw}, dense_budget_bytes=1 << 20)
        assert refusal.value.code == "non_finite"


@pytest.mark.parametrize(
    ("module", "neutral"),
    [
        (SPARSE, {"L0.q.csr.val": floats(*[0] * 9)}),
        (TERNARY, {"L0.q.csr.scale": floats(0)}),
        (DENSE, {"L0.q.dense": floats(*[-0.0] * 384)}),
        (BLOCKS, {"L0.q.in_blockdiag": floats(*np.tile(np.eye(4), (4, 1, 1)).ravel())}),
        (PAIRS, {"L0.q.rot2.c0": floats(*[1] * 24), "L0.q.rot2.c1": floats(*[0] * 24)}),
        (GATED, {"L0.q.BT": floats(*[0] * 144)}),
        (head_module(1), {"lm_head.A": floats(*[0] * 16)}),
    ],
)
def test_an_op_that_does_nothing_is_refused_and_its_neighbour_taken(
    module: Module, neutral: dict[str, bytes], tmp_path: Path
) -> None:
    check(tmp_path / "acts", manifest(module), dense_budget_bytes=1 << 20)
    with pytest.raises(AdapterRefused) as refusal:
        check(tmp_path / "idle", manifest(module), neutral, dense_budget_bytes=1 << 20)
    assert refusal.value.code == "adapter_no_effect"


@pytest.mark.parametrize("tensor", ["rot2.c0", "rot2.c1"])
def test_either_half_of_a_rotation_acts(tensor: str, tmp_path: Path) -> None:
    neutral = {"L0.q.rot2.c0": floats(*[1] * 24), "L0.q.rot2.c1": floats(*[0] * 24)}
    del neutral[f"L0.q.{tensor}"]
    check(tmp_path / "new", manifest(PAIRS), neutral)


def test_dense_changes_need_the_operators_budget(tmp_path: Path) -> None:
    made = manifest(DENSE, replace(DENSE, layer=1))
    check(tmp_path / "fits", made, dense_budget_bytes=2 * 4 * 384)
    for number, budget in enumerate((0, 2 * 4 * 384 - 1)):
        with pytest.raises(AdapterRefused, match=f"3072 bytes.*accepts {budget} .--dense-budget-bytes") as refusal:
            check(tmp_path / str(number), made, dense_budget_bytes=budget)
        assert refusal.value.code == "limit_exceeded"


def test_a_conversion_may_grow_by_the_budget_for_dense_changes() -> None:
    options = ConvertOptions(TINY, "float32", 16)
    with_budget = replace(options, dense_budget_bytes=1 << 20)
    assert with_budget.max_image_bytes() - options.max_image_bytes() == 1 << 20
    assert ConvertOptions.from_json(with_budget.to_json()) == with_budget


def test_the_store_passes_its_budget_on(tmp_path: Path) -> None:
    def convert(source: Path, target: Path, options: object) -> None:
        target.rmdir()
        write(target, manifest(DENSE))

    for budget in (1536, 1535):
        store = open_store(tmp_path / str(budget), dense_budget_bytes=budget, convert=convert)
        folder = tmp_path / f"f{budget}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"")
        if budget == 1536:
            assert store.put_dir("a", folder).num_bytes > 1536
        else:
            with pytest.raises(AdapterRefused, match="--dense-budget-bytes"):
                store.put_dir("a", folder)
        store.close()
