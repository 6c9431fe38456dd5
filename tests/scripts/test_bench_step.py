"""The bare steps' benchmark on a small base: what it says is of one process, whole and in proportion."""

import json
import sys
from pathlib import Path

import pytest

from scripts import bench_step
from scripts.bench_model import RANK, Shape, build_base

SHAPE = Shape(hidden=64, intermediate=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, vocab=300)


def test_steps_and_their_byte_floor_on_a_small_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_base(tmp_path / "base", SHAPE)
    monkeypatch.setattr(bench_step, "start_threads", lambda _: None)
    monkeypatch.setattr(bench_step, "bound_kernel_cache", lambda: None)
    monkeypatch.setattr(bench_step, "_STREAM_BYTES", 1 << 20)
    arguments = ["--prompt", "9", "--context", "20", "--decodes", "3", "--adapters", "2", "3", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_step", "--base", str(tmp_path / "base"), *arguments])
    bench_step.main()
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_per_adapter"] == 2 * RANK * SHAPE.num_layers * sum(map(sum, SHAPE.linears().values()))
    assert set(found["decode_s"]) == {"0", "2", "3"}
    assert found["prompt_s"] > 0
    for count in ("2", "3"):
        bytes_s = int(count) * found["bytes_per_adapter"] / found["bandwidth_gb_per_s"] / 1e9
        assert found["byte_floor_s"][count] == pytest.approx(found["decode_s"]["0"] + bytes_s)
        assert found["of_byte_floor"][count] == pytest.approx(found["decode_s"][count] / found["byte_floor_s"][count])
