"""The build hook: a compiler gives the library, none or a broken one a reason, and what was there stays."""

import platform
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.live_server import REPO_ROOT

sys.path.insert(0, str(REPO_ROOT / "kernels"))
from build_native import NativeKernelHook

SOURCES = REPO_ROOT / "kernels" / "adapter_kernels" / "native"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "kernels" / "adapter_kernels" / "native"
    folder.mkdir(parents=True)
    for source in (*SOURCES.glob("*.c"), *SOURCES.glob("*.h")):
        shutil.copy(source, folder)
    return tmp_path


def run_hook(root: Path) -> tuple[dict[str, Any], list[str]]:
    """Run the hook as hatchling does; returns build_data and the warnings shown."""
    warnings: list[str] = []
    app = SimpleNamespace(display_warning=warnings.append)
    hook = NativeKernelHook(str(root), {}, None, None, "", "editable", app)  # type: ignore[arg-type]
    build_data: dict[str, Any] = {"artifacts": []}
    hook.initialize("editable", build_data)
    return build_data, warnings


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not (shutil.which("cc") or shutil.which("gcc")), reason="needs a C compiler"
)
def test_the_library_is_built_and_goes_into_the_wheel(tree: Path) -> None:
    build_data, warnings = run_hook(tree)
    assert warnings == []
    (path,) = build_data["artifacts"]
    assert (tree / path).read_bytes().startswith(b"\x7fELF")
    assert build_data["pure_python"] is False, "a wheel with machine code must not claim every platform"
    assert [file.name for file in (tree / path).parent.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("compiler", "reason"), [("false", "status 1"), ("/no/such/compiler", "No such file"), ("", "C compiler")]
)
def test_without_a_working_compiler_the_installation_goes_on_and_says_why(
    tree: Path, compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(tree))
    library = tree / "kernels" / "adapter_kernels" / "native" / "cpu_kernels.so"
    library.write_bytes(b"an earlier one")
    build_data, warnings = run_hook(tree)
    assert build_data == {"artifacts": []}
    assert len(warnings) == 1
    assert reason in warnings[0]
    assert library.read_bytes() == b"an earlier one"


def test_another_kind_of_processor_is_no_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    build_data, warnings = run_hook(tree)
    assert build_data == {"artifacts": []}
    assert "aarch64" in warnings[0]
