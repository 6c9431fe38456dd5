"""What every part of `make gpu-check` starts with: its command line, the device, and what the results are filed under.

Owns the child's side of `gpu_check.py`. Invariant: `--device cuda` without a GPU is one line and status 2, and
`--device interpreter` is the same code on the CPU with tiny shapes, whose times mean nothing.
"""

import argparse
import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from scripts.gpu_check_report import NO_GPU, Unit, describe_environment, run_units

_Value = TypeVar("_Value")
_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a part runs: `is_tiny` on the CPU, through Triton's interpreter."""

    device: torch.device
    name: str
    is_tiny: bool

    def wait(self) -> None:
        """Return when the current stream has done all it was given; what other streams copy goes on."""
        if not self.is_tiny:
            torch.cuda.current_stream(self.device).synchronize()


def run_part(part: str, units: Callable[[Place], list[Unit]], arguments: list[str]) -> int:
    """Run a part as the command line says; 0 unless there is nothing to run on."""
    parser = argparse.ArgumentParser(prog=f"gpu_check_{part}")
    parser.add_argument("--device", choices=["cuda", "interpreter"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="")
    parser.add_argument("--budget-s", type=float, required=True)
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"gpu-check {part}: torch {torch.__version__} sees no GPU; --device interpreter checks what a CPU can")
        return NO_GPU
    place = _place(args.device)
    environment = describe_environment(place.name, torch.__version__, triton.__version__, _driver(place), args.commit)
    run_units(part, units(place), environment, args.out, budget_s=args.budget_s, is_fresh=args.fresh)
    return 0


def moved(value: _Value, device: torch.device) -> _Value:
    """Return a copy of a dataclass of tensors, dataclasses and tuples of them, on the device."""
    return _moved(value, device)  # type: ignore[no-any-return]


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected|| in fp64; NaN in `out` gives NaN, which meets no target."""
    difference = out.to(_CPU).double() - expected.to(_CPU).double()
    return float(difference.norm() / expected.to(_CPU).double().norm().clamp(min=1e-30))


def largest(errors: Iterable[float]) -> float:
    """Return the largest error; NaN when any of them is, which `max` passes over unless it comes first."""
    found = list(errors)
    return math.nan if any(map(math.isnan, found)) else max(found)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _moved(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _place(device: str) -> Place:
    if device == "interpreter":
        return Place(_CPU, "interpreter", is_tiny=True)
    return Place(torch.device("cuda", 0), torch.cuda.get_device_name(0), is_tiny=False)


def _driver(place: Place) -> str:
    if place.is_tiny:
        return "none"
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        driver = ""
    return f"{driver or 'unknown'}, CUDA {torch.version.cuda}"


def main_of(part: str, units: Callable[[Place], list[Unit]]) -> None:
    """End this process as the part ends."""
    raise SystemExit(run_part(part, units, sys.argv[1:]))
