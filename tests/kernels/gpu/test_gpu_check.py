"""`make gpu-check` where there is no GPU: every part runs tiny through the interpreter, and what it found is kept.

Owns the command as a child process and the report's rules; the numbers of an interpreter mean nothing and are not
looked at, errors and differing tokens are.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.gpu_check import environment, is_clean, main
from scripts.gpu_check_part import largest
from scripts.gpu_check_report import (
    NO_GPU,
    PARTS,
    Measure,
    PartResult,
    Unit,
    UnitResult,
    read_part,
    result_path,
    run_units,
    table,
)
from tests.live_server import REPO_ROOT

HERE = {"device": "d", "commit": "c"}
# enough for the first unit of each part, and for all of most
SECONDS = {"kernels": 600.0, "engine": 1.0, "grid": 600.0, "loads": 600.0}


def run_part(part: str, out: Path, device: str = "interpreter") -> "subprocess.CompletedProcess[str]":
    """Run one part as `gpu_check.py` does."""
    command = [sys.executable, "-m", f"scripts.gpu_check_{part}", "--device", device, "--out", str(out)]
    command += ["--commit", "abc", "--budget-s", str(SECONDS[part])]
    return subprocess.run(command, cwd=REPO_ROOT, env=environment(device), capture_output=True, text=True)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_tiny(part: str, tmp_path: Path) -> None:
    child = run_part(part, tmp_path)
    assert child.returncode == 0, child.stderr
    result = read_part(tmp_path, part)
    assert result is not None and result.environment["device"] == "interpreter"
    assert result.environment["commit"] == "abc"
    assert result.units and all(unit.measures and unit.error is None for unit in result.units), child.stdout
    # errors against references and differing tokens have targets here too; times have none
    assert all(measure.is_met is not False for unit in result.units for measure in unit.measures), child.stdout
    assert part == "engine" or result.not_run == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_says_what_it_did_and_keeps_old_results(tmp_path: Path) -> None:
    run_units("kernels", [unit("a", Measure("m", 1.0, "us"))], HERE, tmp_path, budget_s=5.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    command = [sys.executable, "-m", "scripts.gpu_check", "--device", "cuda", "--out", str(tmp_path)]
    child = subprocess.run(command, cwd=REPO_ROOT, env=environment("cuda"), capture_output=True, text=True)
    assert child.returncode == NO_GPU
    assert "nothing was measured" in child.stdout and "ARGS='--device interpreter'" in child.stdout
    assert "== kernels" in child.stdout and "sees no GPU" in child.stdout and "no misses" not in child.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_where_there_is_no_gpu_the_parts_are_tried_under_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.gpu_check", "--part", "kernels", "--out", str(tmp_path)]
    child = subprocess.run(command, cwd=REPO_ROOT, env=environment("cuda"), capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    assert "no GPU here" in child.stdout and "nothing is measured" in child.stdout and "no misses" in child.stdout
    assert (tmp_path / "gpu-check.txt").is_file()


def test_a_python_without_the_libraries_is_named_with_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scripts.gpu_check.find_spec", lambda name: None if name in ("torch", "triton") else name)
    monkeypatch.setattr(sys, "argv", ["gpu-check"])
    assert main() == 1
    said = capsys.readouterr().out
    assert f"{sys.executable} lacks torch, triton;" in said and "GPU_PYTHON" in said


def test_an_error_that_is_no_number_hides_behind_no_other() -> None:
    assert largest([1.0, 3.0, 2.0]) == 3.0
    for errors in ([math.nan, 1.0], [1.0, math.nan], [1.0, math.nan, 2.0]):
        assert math.isnan(largest(errors))


def unit(name: str, *measures: Measure, log: list[str] | None = None, error: str = "") -> Unit:
    def run() -> list[Measure]:
        if log is not None:
            log.append(name)
        if error:
            raise RuntimeError(error)
        return list(measures)

    return Unit(name, run)


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    log: list[str] = []
    times = iter([0.0, 0.0, 0.0, 10.0, 10.0])
    units = [unit("a", Measure("m", 1.0, "us"), log=log), unit("b", log=log)]
    first = run_units("grid", units, HERE, tmp_path, budget_s=5.0, clock=lambda: next(times))
    assert (log, first.not_run) == (["a"], ["b"])
    second = run_units("grid", units, HERE, tmp_path, budget_s=5.0)
    assert log == ["a", "b"] and second.not_run == []
    assert read_part(tmp_path, "grid") == second


def test_what_failed_is_tried_again_and_what_is_of_another_commit_too(tmp_path: Path) -> None:
    log: list[str] = []
    run_units("grid", [unit("a", log=log), unit("b", log=log, error="gone")], HERE, tmp_path, budget_s=5.0)
    run_units("grid", [unit("a", log=log), unit("b", log=log)], HERE, tmp_path, budget_s=5.0)
    assert log == ["a", "b", "b"]
    run_units("grid", [unit("a", log=log)], HERE | {"commit": "other"}, tmp_path, budget_s=5.0)
    run_units("grid", [unit("a", log=log)], HERE | {"commit": "other"}, tmp_path, budget_s=5.0, is_fresh=True)
    assert log == ["a", "b", "b", "a", "a"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"part": "grid"}', '{"units": [{"unit": 1}]}'])
def test_a_file_that_is_no_result_is_measured_anew(content: str, tmp_path: Path) -> None:
    result_path(tmp_path, "grid").write_text(content)
    assert read_part(tmp_path, "grid") is None


def test_a_file_is_json_for_everyone(tmp_path: Path) -> None:
    run_units("grid", [unit("a", Measure("m", None, "error", target=1.0))], HERE, tmp_path, budget_s=5.0)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads(result_path(tmp_path, "grid").read_text(), parse_constant=refuse)
    assert read["units"][0]["measures"][0]["value"] is None


def test_misses_are_listed_by_name_with_their_cause(tmp_path: Path) -> None:
    measures = (
        Measure("quick", 1.0, "us", 0.5, 2.0),
        Measure("slow", 3.0, "%", 0.5, 2.0, cause="the side stream waits"),
        Measure("odd", None, "error", target=1.0),
        Measure("free", 9.0, "us"),
    )
    ran = run_units("grid", [unit("a", *measures), unit("b", error="no memory")], HERE, tmp_path, budget_s=5.0)
    text = table([PartResult("grid", HERE, ran.units, ["c"])])
    rows, misses = text.split("misses:\n")
    assert [line.split()[0] for line in rows.splitlines() if line.endswith(("us", "%", "error"))] == [
        "quick",
        "slow",
        "odd",
        "free",
    ]
    assert misses.splitlines() == [
        "slow: 3 %, target 2; the side stream waits",
        "odd: - error, target 1; cause unknown",
        "grid: b: RuntimeError: no memory",
        "grid: c: not run, the time was up",
    ]
    assert not is_clean(ran)
    assert "no misses" in table([PartResult("grid", HERE, [UnitResult("a", 1.0, [])], [])])
    assert "nothing was measured" in table([])
