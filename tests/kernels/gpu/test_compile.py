"""Every kernel compiles for every target, small enough, without spills, and streams rank rows 16 bytes at a time.

Owns the limits; what is compiled is in `launch_cases.py`, how in `compile_targets.py`, which runs as a child. By
default one dtype and the widths that exercise each form of a kernel; the whole matrix is slow.
"""

import ast
import json
import os
import subprocess
import sys

import pytest

from tests.live_server import REPO_ROOT, server_environment

# the first run of a fresh clone compiles everything
pytestmark = pytest.mark.timeout(900)

KERNEL_DIR = REPO_ROOT / "kernels" / "adapter_kernels" / "gpu"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# what one block may have at most, in bytes
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# these run beside the base GEMM and must leave it room (KERNELS 4)
SIDE_KERNELS = {"_shrink_kernel", "_expand_kernel"}
SIDE_SHARED_LIMIT, SIDE_MAX_WARPS = 32 << 10, 4
# pointer names under which kernels read rank rows, A or BT
RANK_ROW_POINTERS = {"arena_ptr", "a_rows"}
RANK_ROW_READERS = {"_shrink_kernel", "_expand_kernel", "_qkv_sink_kernel", "_swiglu_sink_kernel", "_compose_kernel"}
VECTOR_BYTES = 16

Fact = dict[str, object]


def compile_cases(request: pytest.FixtureRequest, *arguments: str) -> list[Fact]:
    """Compile in a child without TRITON_INTERPRET; products are cached by source, so a second run is quick."""
    environment = {name: value for name, value in server_environment().items() if name != "TRITON_INTERPRET"}
    assert request.config.cache is not None
    environment["TRITON_CACHE_DIR"] = str(request.config.cache.mkdir("triton"))
    command = [sys.executable, "-m", "tests.kernels.gpu.compile_targets", *arguments]
    child = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return [json.loads(line) for line in child.stdout.splitlines()]


@pytest.fixture(scope="module")
def facts(request: pytest.FixtureRequest) -> list[Fact]:
    return compile_cases(request)


def violations(fact: Fact) -> list[str]:
    """Return what is wrong with one kernel on one target."""
    if "error" in fact:
        return [str(fact["error"])]
    found = []
    target, shared, loads = str(fact["target"]), fact["shared_bytes"], fact["load_bytes"]
    assert isinstance(shared, int) and isinstance(loads, dict)
    is_side = fact["kernel"] in SIDE_KERNELS
    limit = SIDE_SHARED_LIMIT if is_side else SHARED_LIMITS[target]
    if shared > limit:
        found.append(f"{shared} bytes of shared memory; the limit is {limit}")
    if is_side and int(str(fact["num_warps"])) > SIDE_MAX_WARPS:
        found.append(f"{fact['num_warps']} warps beside the base GEMM; the limit is {SIDE_MAX_WARPS}")
    if fact["spill_bytes"]:
        found.append(f"spills {fact['spill_bytes']} bytes")
    for pointer in RANK_ROW_POINTERS & set(loads):
        if narrow := [num_bytes for num_bytes in loads[pointer] if num_bytes < VECTOR_BYTES]:
            found.append(f"{len(narrow)} of {len(loads[pointer])} loads of {pointer} are narrower than 16 bytes")
    return found


def report(facts: list[Fact]) -> str:
    return "\n".join(f"{fact['case']} {fact['target']}: {text}" for fact in facts for text in violations(fact))


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_fits_the_target(target: str, facts: list[Fact]) -> None:
    own = [fact for fact in facts if fact["target"] == target]
    assert {fact["kernel"] for fact in own} == defined_kernels()
    assert report(own) == ""


def test_rank_rows_are_read_where_they_should_be(facts: list[Fact]) -> None:
    # in each form on each target, else the check of their width would look at nothing
    for fact in facts:
        is_reader = fact["kernel"] in RANK_ROW_READERS and "/plain/" not in str(fact["case"])
        loads = fact["load_bytes"]
        assert isinstance(loads, dict) and bool(RANK_ROW_POINTERS & set(loads)) == is_reader, fact
    assert {fact["kernel"] for fact in facts} >= RANK_ROW_READERS


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_width_and_dtype_fits_every_target(request: pytest.FixtureRequest) -> None:
    assert report(compile_cases(request, "--all")) == ""


def test_a_limit_that_is_broken_is_seen() -> None:
    good: Fact = {"case": "c", "kernel": "_shrink_kernel", "target": "gfx942", "shared_bytes": 32 << 10}
    good |= {"num_warps": 4, "spill_bytes": 0, "load_bytes": {"arena_ptr": [16, 16], "x_ptr": [4]}}
    assert violations(good) == []
    assert "shared memory" in violations(good | {"shared_bytes": (32 << 10) + 1})[0]
    assert violations(good | {"kernel": "_add_norm_kernel", "shared_bytes": 64 << 10, "num_warps": 16}) == []
    assert "warps" in violations(good | {"num_warps": 8})[0]
    assert violations(good | {"spill_bytes": 8}) == ["spills 8 bytes"]
    assert "1 of 2 loads" in violations(good | {"load_bytes": {"arena_ptr": [16, 8]}})[0]
    assert violations({"case": "c", "target": "sm_80", "error": "no"}) == ["no"]


def defined_kernels() -> set[str]:
    """Return the names of all kernels in the package."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in KERNEL_DIR.glob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {node.name for node in functions if node.name.endswith("_kernel") and node.decorator_list}


def test_the_child_runs_without_the_interpreter() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
