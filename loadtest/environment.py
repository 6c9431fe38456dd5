"""On what and with what a load was run: the record without which no figure says anything.

Owns the reading of the tester's own machine. Invariant: no secret and no environment variable goes in; the command line
is recorded with the values of `--api-key` left out.
"""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

Facts = dict[str, object]
_PACKAGES = ("chorale", "aiohttp", "torch", "uvicorn", "uvloop")
_ISA = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_SECRET = "--api-key"


def read_environment(arguments: Sequence[str], program: str = "loadtest") -> Facts:
    """Return what is known of machine, versions and command; what cannot be found out is left out."""
    facts: Facts = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m {program} " + " ".join(_without_secrets(arguments)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "packages": _versions(),
    }
    return facts | _processor() | _memory() | _commit()


def _without_secrets(arguments: Sequence[str]) -> list[str]:
    shown, is_secret = [], False
    for argument in arguments:
        shown.append("..." if is_secret else _SECRET + "=..." if argument.startswith(_SECRET + "=") else argument)
        is_secret = argument == _SECRET
    return shown


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> Facts:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {"processor": platform.processor()}
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = set(next((line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")), []))
    return {"processor": names[0] if names else platform.processor(), "isa": [isa for isa in _ISA if isa in flags]}


def _memory() -> Facts:
    try:
        return {"memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)}
    except (OSError, ValueError):
        return {}


def _commit() -> Facts:
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": found.stdout.strip() + (" with changes" if dirty.stdout.strip() else "")}
