"""The converter process: limits, clean environment, refusals that arrive whole, and deaths that harm nobody."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapters_store import converter
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft import convert_peft
from adapters_store.converter import convert_in_child
from adapters_store.errors import AdapterRefused, ConversionFailed, CorruptUpload, StorageFailed, StoreFull
from tests.live_server import REPO_ROOT
from tests.store.folders import TINY, lora_config, lora_tensors, open_store, write_folder

OPTIONS = ConvertOptions(TINY, "bfloat16", 16)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Return an empty folder as the upload prepares it."""
    folder = tmp_path / "staging" / "object"
    folder.mkdir(parents=True)
    return folder


def test_the_child_writes_the_same_bytes_as_a_conversion_in_this_process(good_folder: Path, target: Path) -> None:
    convert_in_child(good_folder, target, OPTIONS)
    aside = target.parent / "aside"
    aside.mkdir()
    convert_peft(good_folder, aside, OPTIONS)
    for name in ("adapter.json", "adapter.safetensors"):
        assert (target / name).read_bytes() == (aside / name).read_bytes()


def test_a_whole_upload_through_the_child_is_served(good_folder: Path, store_dir: Path) -> None:
    store = open_store(store_dir, convert=convert_in_child)
    version = store.put_dir("a", good_folder)
    image = store.open_image(version.digest)
    assert (image.digest, image.rank) == (version.digest, version.rank)
    assert len(image.entries) == len(version.report.applied) > 0
    store.close()


@pytest.mark.parametrize("code", ["unsupported_adapter", "corrupt_adapter", "non_finite", "unsupported_format"])
def test_a_refusal_of_the_child_arrives_with_code_message_and_param(code: str, tmp_path: Path, target: Path) -> None:
    tensors = lora_tensors()
    name = next(iter(tensors))
    config = lora_config(task_type="SEQ_CLS") if code == "unsupported_adapter" else lora_config()
    if code == "corrupt_adapter":
        del tensors[name]
    if code == "non_finite":
        dtype, shape, raw = tensors[name]
        tensors[name] = (dtype, shape, b"\xff" * len(raw))
    folder = write_folder(tmp_path / "bad", config, b"PK\x03\x04zip" * 9 if code == "unsupported_format" else tensors)
    with pytest.raises(AdapterRefused) as refusal:
        convert_in_child(folder, target, OPTIONS)
    with pytest.raises(AdapterRefused) as wanted:
        convert_peft(folder, target.parent, OPTIONS)
    assert type(refusal.value) is type(wanted.value)
    assert (refusal.value.code, refusal.value.message, refusal.value.param) == (
        code,
        wanted.value.message,
        wanted.value.param,
    )


def stand_in(folder: Path, script: str) -> str:
    """Return an executable that runs instead of Python."""
    path = folder / "stand_in"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize(
    "script",
    ["kill -9 $$", "exit 3", "exit 0", "echo nonsense", 'echo \'{"code":"no_such_code","message":"m","param":null}\''],
)
def test_a_child_that_dies_or_babbles_is_a_failed_conversion(
    script: str, good_folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", stand_in(target.parent, script))
    with pytest.raises(ConversionFailed) as failure:
        convert_in_child(good_folder, target, OPTIONS)
    assert failure.value.http_status == 500 and str(target) not in failure.value.message


def test_a_child_that_hangs_is_stopped(good_folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    begin = subprocess.Popen.__init__

    def noted(process: subprocess.Popen[bytes], *arguments: object, **options: object) -> None:
        begin(process, *arguments, **options)  # type: ignore[call-overload]
        started.append(process)

    monkeypatch.setattr(subprocess.Popen, "__init__", noted)
    monkeypatch.setattr(sys, "executable", stand_in(target.parent, "exec sleep 3600"))
    monkeypatch.setattr(converter, "_START_SECONDS", 1)
    with pytest.raises(ConversionFailed, match="1 s"):
        convert_in_child(good_folder, target, OPTIONS)
    (child,) = started
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_the_child_gets_no_environment_no_input_and_no_descriptors(
    good_folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    secret = os.open(good_folder / "adapter_config.json", os.O_RDONLY)
    script = "env > ../env; ls -l /proc/self/fd > ../fds; cat > ../stdin; echo '{}'"
    monkeypatch.setattr(sys, "executable", stand_in(target.parent, script))
    convert_in_child(good_folder, target, OPTIONS)
    os.close(secret)
    environment = (target.parent / "env").read_text()
    assert "secret" not in environment and "HOME" not in environment
    assert "adapter_config.json" not in (target.parent / "fds").read_text()
    assert (target.parent / "stdin").read_bytes() == b""


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, StoreFull), (errno.EIO, StorageFailed), (errno.EFBIG, CorruptUpload)]
)
def test_a_disk_error_of_the_child_becomes_the_stores_own(
    number: int, kind: type[Exception], good_folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", stand_in(target.parent, f"echo '{{\"errno\":{number}}}'"))
    with pytest.raises(kind):
        convert_in_child(good_folder, target, OPTIONS)


def run_child(source: Path, target: Path, *limits: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "adapters_store.convert", str(source), str(target), OPTIONS.to_json(), *limits]
    return subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_the_child_cannot_write_more_than_its_limit(good_folder: Path, target: Path) -> None:
    finished = run_child(good_folder, target, "100", "60")
    assert json.loads(finished.stdout)["errno"] == errno.EFBIG
    assert sum(path.stat().st_size for path in target.iterdir()) <= 100


def test_the_child_imports_neither_torch_nor_a_network_client(good_folder: Path, target: Path) -> None:
    script = (
        "import sys; from adapters_store.convert.__main__ import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'ssl', 'http.client', 'urllib.request', 'multiprocessing'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", script, str(good_folder), str(target), OPTIONS.to_json(), str(1 << 30), "60"]
    finished = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=240, check=True)
    assert finished.stdout.endswith("}[]\n") and "code" not in finished.stdout
