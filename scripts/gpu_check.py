"""`make gpu-check`: kernels, engine, benchmark grid and loads on a GPU, in one command of under nine minutes.

Owns the order of the parts, their time and the summary; each part is a process of its own, so that one which hangs or
dies costs no other. Imports nothing that is not in the standard library. Run it again to go on where it stopped.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from scripts.gpu_check_report import NO_GPU, PARTS, PartResult, read_part, result_path, table

REPO_ROOT = Path(__file__).resolve().parents[1]
# what each part gets of the nine minutes; the rest is for starting processes
BUDGETS_S = {"kernels": 110.0, "engine": 90.0, "grid": 230.0, "loads": 60.0}
# over its budget a part may finish the unit it is in, then it is killed
GRACE_S = 45.0
# all that is imported beside the standard library
PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers")
KILLED = 124
_NO_GPU_TEXT = """gpu-check: nothing was measured and no file was written.
With a GPU: make gpu-check GPU_PYTHON=PATH, a Python whose torch sees it
Without: make gpu-check GPU_PYTHON=PATH ARGS='--device interpreter' tries each part, tiny, on the CPU"""
_TRIAL_TEXT = "gpu-check: no GPU here: every part is tried, tiny, under Triton's interpreter; nothing is measured"
DEFAULT_OUT = {"cuda": REPO_ROOT / "docs" / "benchmarks", "interpreter": REPO_ROOT / ".chorale" / "gpu-check"}


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    parts: list[str]
    device: str
    out: Path
    commit: str
    is_fresh: bool


def main() -> int:
    """Run the parts; 0 when every part ran whole and no target was missed, `NO_GPU` where there is none, else 1."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        print(f"gpu-check: {sys.executable} lacks {', '.join(missing)}; name a Python that has them: GPU_PYTHON=...")
        return 1
    options = _options()
    begin = time.monotonic()
    statuses: dict[str, int] = {}
    for part in options.parts:
        statuses[part] = run_part(part, options)
        if statuses[part] == NO_GPU:
            print(_NO_GPU_TEXT)
            return NO_GPU
    # parts may be run one by one: the table shows all that lie there, each with its commit
    found = {part: result for part in PARTS if (result := read_part(options.out, part)) is not None}
    summary = table(found.values())
    (options.out / "gpu-check.txt").write_text(summary + "\n", encoding="utf-8")
    print(f"\n{summary}\n{time.monotonic() - begin:.0f} s; JSON and this table are in {options.out}")
    for part, status in statuses.items():
        if status:
            end = "was over its time and killed" if status == KILLED else f"ended with status {status}"
            print(f"{part}: {end}; the units it had finished are kept, run it again to go on")
    return 0 if not any(statuses.values()) and all(part in found and is_clean(found[part]) for part in statuses) else 1


def is_clean(result: PartResult) -> bool:
    """Did every unit run, and no measure miss its target?"""
    measures = [measure for unit in result.units for measure in unit.measures]
    return (
        not result.not_run
        and all(unit.error is None for unit in result.units)
        and all(m.is_met is not False for m in measures)
    )


def run_part(part: str, options: Options) -> int:
    """Run one part as a child in this interpreter; returns its status, `KILLED` when it had to be killed."""
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"== {part} -> {result_path(options.out, part)}", flush=True)
    command = [sys.executable, "-m", f"scripts.gpu_check_{part}", "--device", options.device]
    command += ["--out", str(options.out), "--commit", options.commit, "--budget-s", str(BUDGETS_S[part])]
    command += ["--fresh"] if options.is_fresh else []
    try:
        return subprocess.run(
            command, cwd=REPO_ROOT, env=environment(options.device), timeout=BUDGETS_S[part] + GRACE_S
        ).returncode
    except subprocess.TimeoutExpired:
        return KILLED


def environment(device: str) -> dict[str, str]:
    """Return the child's environment: our packages on the path, kernels interpreted only where that is asked for."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(REPO_ROOT), str(REPO_ROOT / "kernels"), own.get("PYTHONPATH", "")]
    own["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return own | ({"TRITON_INTERPRET": "1"} if device == "interpreter" else {})


def _options() -> Options:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="repeatable; default: all, in order")
    parser.add_argument(
        "--device",
        choices=["auto", *DEFAULT_OUT],
        default="auto",
        help="interpreter: tiny, no times; auto: as there is",
    )
    parser.add_argument("--out", type=Path, help="folder of the results; default on a GPU: docs/benchmarks")
    parser.add_argument("--commit", default="", help="commit id, where the checkout has no git")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    args = parser.parse_args()
    device = args.device
    if device == "auto":
        device = "cuda" if _has_gpu() else "interpreter"
        if device == "interpreter":
            print(_TRIAL_TEXT, flush=True)
    out = (args.out or DEFAULT_OUT[device]).absolute()
    return Options(args.part or list(PARTS), device, out, args.commit, args.fresh)


def _has_gpu() -> bool:
    # asked of a child: this process imports no torch
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], stderr=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
