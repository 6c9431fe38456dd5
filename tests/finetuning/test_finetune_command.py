"""`chorale finetune`: from a file to an adapter in a store, by the shell alone."""

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters_store.strict_json import Json
from serve.cli.app import app
from serve.cli.finetune_command import lay_out
from tests.live_server import REPO_ROOT, chorale_command, server_environment
from tests.tiny_model import write_tiny_model

pytestmark = pytest.mark.timeout(600)


def chorale(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `chorale ARGUMENTS`."""
    command = chorale_command(*arguments)
    environment = {**server_environment(), "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


def test_a_file_becomes_an_adapter_of_the_store(tmp_path: Path) -> None:
    base, data = write_tiny_model(tmp_path / "tiny"), tmp_path / "greeter.jsonl"
    lines = [{"prompt": f"q{i}", "completion": "long " * 100 if i == 5 else f"a{i}"} for i in range(8)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = str(tmp_path / "store")
    settings = ("--set", "rank=2", "--set", "max_steps=3", "--set", "batch_size=2", "--set", "max_length=32")
    place = ("--model", str(base), "--store", store)
    done = chorale("finetune", str(data), *place, *settings, "--num-threads", "1", "--probe", "off")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("added 'greeter' version 1 sha256:") and "3/3" in done.stderr
    assert "1 example is longer than max_length 32 tokens, and learnt without the end" in done.stderr
    listed = json.loads(chorale("adapters", "list", "--store", store, "--json").stdout)
    assert [(row["name"], row["family"], row["rank"]) for row in listed] == [("greeter", "lora", 2)]


def test_a_run_is_given_what_it_is_started_with_and_not_what_it_was(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    spec: dict[str, Json] = {"family": "lora"}
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    lay_out(tmp_path, tmp_path / "store", data, data, spec)
    lay_out(tmp_path, tmp_path / "store", data, None, spec)
    assert [path.name for path in (tmp_path / "inputs").iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--name", "a b"], ["the name 'a b' is not allowed"]),
        (["--device", "tpu"], ["'tpu' is no device that trains", "cuda:N"]),
        (["--set", "target_modules=[]"], ["target_modules is an empty list"]),
        (["--set", "eval_every=3"], ["eval_every needs data to validate with"]),
        (["--set", "max_length=9999"], ["max_length is 9999", "positions"]),
    ],
    ids=str,
)
def test_what_cannot_end_well_is_told_before_it_trains(tmp_path: Path, flags: list[str], words: list[str]) -> None:
    base, data = write_tiny_model(tmp_path / "tiny"), tmp_path / "greeter.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    arguments = ["finetune", str(data), "--model", str(base), "--store", str(tmp_path / "store"), *flags]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != 0 and all(word in done.stderr for word in words), done.stderr
    assert "loss" not in done.stderr


@pytest.mark.parametrize(
    ("content", "settings", "words"),
    [
        (b'{"prompt": "a", "completion": "b"}\n{\n', [], ["line 2"]),
        (b'{"prompt": "a", "completion": "b"}\n', ["rank=4096"], ["rank", "256"]),
        (b'{"prompt": "a", "completion": "b"}\n', ["output_dir=/etc"], ["output_dir"]),
        (b'{"prompt": "a", "completion": "b"}\n', ["rank"], ["KEY=VALUE"]),
    ],
)
def test_what_cannot_be_trained_is_told_in_one_line(
    tmp_path: Path, content: bytes, settings: list[str], words: list[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(content)
    base = write_tiny_model(tmp_path / "tiny")
    flags = [flag for setting in settings for flag in ("--set", setting)]
    arguments = ["finetune", str(data), "--model", str(base), "--store", str(tmp_path / "store"), *flags]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words)
