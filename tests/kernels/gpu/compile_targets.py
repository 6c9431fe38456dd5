"""Compile what the launchers launch for four GPUs that are not here: `python -m tests.kernels.gpu.compile_targets`.

Owns the compilation and what is read from its products: shared memory, spills, how wide each line of source loads.
Runs in a process of its own, since TRITON_INTERPRET must not be set when triton is imported. Prints one JSON object
per kernel and target; judges nothing, that is `test_compile.py`. Invariant: a kernel is compiled once per target and
signature, however many cases launch it.
"""

import argparse
import json
import linecache
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adapter_kernels.gpu.launch_config import LaunchConfigs
from tests.kernels.gpu.launch_cases import CASES, DEFAULT_CASES
from tests.kernels.gpu.recorded_launches import Launch, recorded_launches

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# whose pinned tables each target is compiled with
GPU_NAMES = {
    "sm_80": "NVIDIA A100-SXM4-80GB",
    "sm_90": "NVIDIA H200",
    "sm_100": "NVIDIA B200",
    "gfx942": "AMD Instinct MI300X",
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# `.file NUMBER "PATH"` or `.file NUMBER "FOLDER" "NAME"`, then `.loc FILE LINE COLUMN`; ptx and amdgcn alike
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s")
_CUDA_LOAD = re.compile(r"\bld\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[a-z]+(\d+)\b")
_CUDA_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global(?:\.\S+)? \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+|\d+)")
_AMD_LOAD = re.compile(r"\b(?:global|buffer)_load_(?:dword(?:x(\d))?|[us]?(?:byte|short|b\d+)\w*)\b")


def facts(launch: Launch, target: str) -> dict[str, object]:
    """Compile one launch for one target and say what came out."""
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attributes())
    compiled = triton.compile(source, target=TARGETS[target], options=dict(launch.options))
    is_cuda = TARGETS[target].backend == "cuda"
    return {
        "kernel": launch.name,
        "target": target,
        "shared_bytes": int(compiled.metadata.shared),
        "num_warps": int(compiled.metadata.num_warps),
        "spill_bytes": _cuda_spills(compiled.asm["cubin"]) if is_cuda else _amd_spills(compiled.asm["amdgcn"]),
        "load_bytes": _loads(compiled.asm["ptx" if is_cuda else "amdgcn"], is_cuda=is_cuda),
    }


def launches_of(case: str, target: str) -> list[Launch]:
    """Return what one case launches with the pinned tables of a target's GPU."""
    with recorded_launches() as launches:
        CASES[case](LaunchConfigs.for_device(GPU_NAMES[target]))
    return launches


def main() -> None:
    """Compile the named cases (all by default) for all targets; a failure is a line too."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", help="their names; default: those that cover every kernel")
    parser.add_argument("--all", action="store_true", help="every width and dtype")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    args = parser.parse_args()
    for target in args.targets:
        seen: set[str] = set()
        for case in args.cases or (CASES if args.all else DEFAULT_CASES):
            for launch in launches_of(case, target):
                if launch.key not in seen:
                    seen.add(launch.key)
                    print(json.dumps({"case": case} | _attempt(launch, target)), flush=True)


def _attempt(launch: Launch, target: str) -> dict[str, object]:
    try:
        return facts(launch, target)
    # whatever the compiler raises is this kernel's result on this target
    except Exception as error:
        return {"kernel": launch.name, "target": target, "error": f"{type(error).__name__}: {error}"[-2000:]}


def _cuda_spills(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(number) for number in re.findall(r"\b(?:STACK|LOCAL):(\d+)", text))


def _amd_spills(assembly: str) -> int:
    counts = [int(number) for number in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly)]
    scratch = [int(number) for number in re.findall(r"; ScratchSize: (\d+)", assembly)]
    return sum(counts) + sum(scratch)


def _loads(assembly: str, *, is_cuda: bool) -> dict[str, list[int]]:
    """Bytes that one thread loads at once from global memory, by the pointer that the line of source names first."""
    files = {number: str(Path(path) / (name or "")) for number, path, name in _FILE.findall(assembly)}
    found: dict[str, list[int]] = {}
    for file, line, num_bytes in _located_loads(assembly, is_cuda=is_cuda):
        text = linecache.getline(files.get(file, ""), line)
        name = re.search(r"tl\.load\(\s*(\w+)", text)
        found.setdefault(name.group(1) if name else text.strip(), []).append(num_bytes)
    return found


def _located_loads(assembly: str, *, is_cuda: bool) -> Iterator[tuple[str, int, int]]:
    file, line = "", 0
    for row in assembly.splitlines():
        if location := _LOCATION.search(row):
            file, line = location.group(1), int(location.group(2))
        elif is_cuda:
            if load := _CUDA_LOAD.search(row):
                yield file, line, int(load.group(1) or 1) * int(load.group(2)) // 8
            elif copy := _CUDA_ASYNC.search(row):
                yield file, line, int(copy.group(1), 0)
        elif load := _AMD_LOAD.search(row):
            yield file, line, 4 * int(load.group(1) or 1) if "dword" in load.group(0) else 2


if __name__ == "__main__":
    main()
