"""Finding the compiled library: what is absent, broken or of other sources is passed over, and said."""

import platform
import subprocess
from pathlib import Path

import pytest

from adapter_kernels import native_cpu
from adapter_kernels.native_cpu import CpuKernels, cpu_kernels, why_absent
from adapter_kernels.native_layouts import ABI
from tests.kernels.compiled import kernels as kernels


def test_where_there_are_kernels_nothing_is_said(kernels: CpuKernels) -> None:
    assert why_absent() is None
    assert cpu_kernels() is kernels


@pytest.mark.parametrize(("content", "reason"), [(None, "no C compiler"), (b"not a library", "cannot be loaded")])
def test_a_library_that_is_absent_or_broken_is_passed_over(
    tmp_path: Path, content: bytes | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpu_kernels.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(native_cpu, "LIBRARY", path)
    assert cpu_kernels.__wrapped__() is None
    said = why_absent()
    assert said is not None
    assert reason in said
    assert "installation" in said


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the sources are for x86-64")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("int chorale_abi(void) { return 0; }", "ABI 0"),
        ("int something_else(void) { return 1; }", "chorale_abi"),
        (
            f"int chorale_abi(void) {{ return {ABI}; }} int chorale_is_supported(void) {{ return 0; }}",
            "AVX-512-BF16",
        ),
    ],
)
def test_a_library_of_other_sources_or_for_another_processor_is_passed_over(
    tmp_path: Path, source: str, reason: str, kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpu_kernels.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)], input=source.encode(), check=True, timeout=60
    )
    monkeypatch.setattr(native_cpu, "LIBRARY", path)
    assert cpu_kernels.__wrapped__() is None
    assert reason in str(why_absent())
