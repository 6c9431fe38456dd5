"""Pinned launch tables: every shipped one is whole, every broken one is refused by file and key."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_kernels.gpu.launch_config import (
    CONFIG_DIR,
    LaunchConfig,
    LaunchConfigError,
    LaunchConfigs,
    row_key,
    shape_class,
    table_text,
)

ROW = {"block_k": 128, "block_r": 16, "block_o": 64, "num_warps": 2, "num_stages": 3}
PINNED = LaunchConfig(**ROW)


def table(**changes: object) -> dict[str, object]:
    return {"devices": ["GPU A"], "measured": "by nobody", "ops": {"shrink": {"middle/16": ROW}}} | changes


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_every_shipped_table_is_whole() -> None:
    paths = sorted(CONFIG_DIR.glob("*.json"))
    assert paths
    for path in paths:
        assert LaunchConfigs.from_file(path).rows
    # for_device reads them all, whatever the name
    assert LaunchConfigs.for_device(None).rows == {}


def test_a_table_is_found_by_the_gpus_name_alone(tmp_path: Path) -> None:
    write(tmp_path, "a.json", table())
    configs = LaunchConfigs.for_device("GPU A", tmp_path)
    assert configs.pick("shrink", 4096, 16) == PINNED
    assert configs.pick("shrink", 4096, 1) is None
    assert configs.pick("expand", 4096, 16) is None
    assert LaunchConfigs.for_device("GPU B", tmp_path).pick("shrink", 4096, 16) is None


@pytest.mark.parametrize(
    ("width", "block_rows", "expected"),
    [
        (1, 1, "narrow/1"),
        (2047, 16, "narrow/16"),
        (2048, 16, "middle/16"),
        (8191, 64, "middle/64"),
        (9000, 1, "wide/1"),
    ],
)
def test_widths_fall_into_three_classes(width: int, block_rows: int, expected: str) -> None:
    assert shape_class(width, block_rows) == expected


def test_other_block_rows_have_no_class() -> None:
    with pytest.raises(LaunchConfigError, match="block_rows is 32"):
        shape_class(64, 32)


def test_a_broken_table_stops_every_start_also_of_other_gpus(tmp_path: Path) -> None:
    write(tmp_path, "broken.json", _with_row(num_warps=3))
    for name in ("GPU A", "GPU B", None):
        with pytest.raises(LaunchConfigError, match=r"broken\.json: ops\.shrink\.middle/16\.num_warps is 3"):
            LaunchConfigs.for_device(name, tmp_path)


def test_two_tables_for_one_gpu_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.json", table())
    write(tmp_path, "b.json", table())
    with pytest.raises(LaunchConfigError, match=r"b\.json: devices: 'GPU A' is in a\.json"):
        LaunchConfigs.for_device("GPU A", tmp_path)


def _with_row(**changes: object) -> dict[str, object]:
    return table(ops={"shrink": {"middle/16": ROW | changes}})


BROKEN: dict[str, tuple[Callable[[], object], str]] = {
    "not json": (lambda: "{", "Expecting"),
    "not an object": (list, "exactly the keys"),
    "a key too many": (lambda: table(note=1), "exactly the keys"),
    "no device": (lambda: table(devices=[]), "devices: a list"),
    "a device without name": (lambda: table(devices=[""]), "devices: a list"),
    "measured is no text": (lambda: table(measured=None), "measured: say"),
    "an op that is none": (lambda: table(ops={"merge": {}}), "ops.merge: no such op"),
    "ops is a list": (lambda: table(ops=[]), "ops: an object"),
    "no shape class": (lambda: table(ops={"shrink": {"huge/16": ROW}}), "ops.shrink.huge/16: a shape class"),
    "a field missing": (lambda: table(ops={"shrink": {"wide/1": {"block_k": 64}}}), "ops.shrink.wide/1: exactly"),
    "a field too many": (lambda: _with_row(block_m=16), "ops.shrink.middle/16: exactly"),
    "no power of two": (lambda: _with_row(block_k=96), "middle/16.block_k is 96; a power of two"),
    "too many warps": (lambda: _with_row(num_warps=32), "num_warps is 32; an integer from 1 to 16"),
    "warps that are no power of two": (lambda: _with_row(num_warps=3), "num_warps is 3; a power of two"),
    "a tile too small for tensor cores": (lambda: _with_row(block_r=8), "block_r is 8; an integer from 16 to 1024"),
    "no stages": (lambda: _with_row(num_stages=0), "num_stages is 0"),
    "a bool": (lambda: _with_row(num_stages=True), "num_stages is True"),
    "a float": (lambda: _with_row(block_o=64.0), r"block_o is 64\.0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_table_names_file_and_key(case: str, tmp_path: Path) -> None:
    content, message = BROKEN[case]
    path = write(tmp_path, "broken.json", content())
    with pytest.raises(LaunchConfigError, match=rf"broken\.json.*{message}"):
        LaunchConfigs.from_file(path)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = {("shrink", "middle/16"): PINNED, ("expand", "wide/1"): LaunchConfig(), ("shrink", "narrow/1"): PINNED}
    path = write(tmp_path, "new.json", table_text(["GPU C"], "here", rows))
    assert LaunchConfigs.from_file(path).rows == rows
    assert LaunchConfigs.for_device("GPU C", tmp_path).rows == rows


def test_attention_has_the_same_tiles_however_many_rows_a_step_has() -> None:
    for op in ("paged_decode", "paged_prefill"):
        assert len({row_key(op, 128, block_rows) for block_rows in (1, 16, 64)}) == 1
    assert len({row_key("shrink", 128, block_rows) for block_rows in (1, 16, 64)}) == 3
