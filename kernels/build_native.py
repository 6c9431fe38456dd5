"""The build hook that compiles the CPU's kernels when the project is installed, editable or as a wheel.

Invariant: without a working C compiler the installation succeeds all the same, says so, and the CPU computes in torch.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FLAGS = ("-O3", "-std=c11", "-Wall", "-fPIC", "-shared")
_LIBRARY = "cpu_kernels.so"


class NativeKernelHook(BuildHookInterface):
    """Puts `cpu_kernels.so` beside its sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and have the wheel carry the library and this platform's tag."""
        folder = Path(self.root) / "kernels" / "adapter_kernels" / "native"
        problem = _compile(folder)
        if problem is not None:
            self.app.display_warning(f"CPU kernels not compiled ({problem}): a CPU will compute in torch alone, slower")
            return
        build_data["artifacts"].append(f"kernels/adapter_kernels/native/{_LIBRARY}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def _compile(folder: Path) -> str | None:
    """Return what went wrong, or None; a library that is there already is replaced only by a whole one."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"they are for x86-64, this is {platform.machine()}"
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc") if shutil.which(name)), None)
    if compiler is None:
        return "no C compiler was found"
    fresh = folder / f".{_LIBRARY}.{os.getpid()}"
    command = [*compiler.split(), *_FLAGS, "-o", str(fresh), *(str(path) for path in sorted(folder.glob("*.c")))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler}: {error}"
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        return f"{compiler} ended with status {done.returncode}"
    fresh.replace(folder / _LIBRARY)
    return None
