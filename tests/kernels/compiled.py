"""The compiled CPU kernels for tests: skipped where the processor cannot run them, never where they should exist."""

import platform
import shutil

import pytest

from adapter_kernels.native_cpu import LIBRARY, CpuKernels, cpu_kernels


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    """The kernels; a missing library is a failure where it could have been built."""
    if platform.machine() == "x86_64" and (shutil.which("cc") or shutil.which("gcc")):
        assert LIBRARY.exists(), "there is a C compiler, so the installation should have left the library here"
    found = cpu_kernels()
    if found is None:
        pytest.skip("needs x86-64 with AVX-512-BF16 and a C compiler at installation")
    return found
