"""`chorale tune` where it cannot measure: one clear line, status 2, no file."""

import subprocess
from pathlib import Path

import pytest
import torch

from tests.live_server import REPO_ROOT, chorale_command, server_environment
from tests.tiny_model import write_tiny_model


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `chorale tune ARGUMENTS` to its end."""
    return subprocess.run(
        chorale_command("tune", *arguments), cwd=REPO_ROOT, env=server_environment(), capture_output=True, text=True
    )


def assert_refused(result: "subprocess.CompletedProcess[str]", word: str) -> None:
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("chorale: ") and word in line


def test_the_cpu_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    assert_refused(run("--model", str(tmp_path), "--out", str(out), "--device", "cpu"), "--device cpu")
    assert_refused(run("--model", str(tmp_path), "--out", str(tmp_path / "no" / "t.json")), "folder does not exist")
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    model = write_tiny_model(tmp_path / "tiny")
    assert_refused(run("--model", str(model), "--out", str(out)), "on a GPU")
    assert not out.exists()
