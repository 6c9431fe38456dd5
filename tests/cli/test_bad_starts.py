"""`chorale serve` that cannot work: one clear line on stderr, nothing on stdout, a status that is not 0."""

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.cli import serve_command
from serve.cli.app import app
from serve.config import ServeConfig
from tests.live_server import REPO_ROOT, chorale_command, server_environment
from tests.tiny_model import write_tiny_model


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `chorale ARGUMENTS` to its end."""
    return subprocess.run(
        chorale_command(*arguments),
        cwd=REPO_ROOT,
        env=server_environment(),
        capture_output=True,
        text=True,
        timeout=600.0,
    )


def assert_one_line(result: "subprocess.CompletedProcess[str]", *words: str) -> None:
    """Fail unless the command ended with status 2 and one line that says all the words."""
    assert result.stdout == ""
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("chorale: ")
    for word in words:
        assert word in line


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the folder of a model that could be served."""
    return write_tiny_model(tmp_path / "tiny")


def change_config(model: Path, **fields: object) -> None:
    """Overwrite fields of the model's config."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def spoil_architecture(model: Path) -> list[str]:
    change_config(model, architectures=["MysteryForCausalLM"], model_type="mystery")
    return ["MysteryForCausalLM", "LlamaForCausalLM"]


def remove_config(model: Path) -> list[str]:
    (model / "config.json").unlink()
    return ["config.json"]


def remove_tokenizer(model: Path) -> list[str]:
    (model / "tokenizer.json").unlink()
    return ["tokenizer"]


@pytest.mark.parametrize("spoil", [spoil_architecture, remove_config, remove_tokenizer])
def test_a_model_folder_that_cannot_be_served_is_named(
    model: Path, store_dir: Path, spoil: Callable[[Path], list[str]]
) -> None:
    words = spoil(model)
    flags = ("--model", str(model), "--store", str(store_dir), "--port", "0")
    assert_one_line(run("serve", *flags), *words)


def test_a_model_that_is_no_folder_is_named(tmp_path: Path, store_dir: Path) -> None:
    missing = str(tmp_path / "missing")
    flags = ("--model", missing, "--store", str(store_dir))
    assert_one_line(run("serve", *flags), missing, "--model")


def test_a_port_in_use_is_named(model: Path, store_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = ("--model", str(model), "--store", str(store_dir), "--port", port)
        assert_one_line(run("serve", *flags), port, "in use", "--port")


def test_a_store_that_cannot_be_written_is_told(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    flags = ("--model", str(model), "--store", str(tmp_path / "file" / "store"))
    assert_one_line(run("serve", *flags), f"--store {tmp_path / 'file' / 'store'}", "Not a directory")


def test_what_the_engine_process_refuses_is_told_in_its_own_words(model: Path, store_dir: Path) -> None:
    flags = ("--model", str(model), "--store", str(store_dir), "--port", "0")
    assert_one_line(run("serve", *flags, "--max-model-len", "99999"), "--max-model-len 99999", "4096")


@pytest.mark.parametrize(("flags", "has_aliases"), [([], True), (["--metrics-compat", "none"], False)])
def test_the_metric_aliases_can_be_left_out(
    model: Path, store_dir: Path, flags: list[str], has_aliases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[ServeConfig] = []
    monkeypatch.setattr(serve_command, "run_server", lambda config, **_: started.append(config))
    result = CliRunner().invoke(app, ["serve", "--model", str(model), "--store", str(store_dir), *flags])
    assert result.exit_code == 0, result.output
    assert [config.api.metrics_compat_vllm for config in started] == [has_aliases]


def test_the_budget_for_dense_changes_reaches_the_server_and_is_none_by_default(
    model: Path, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[ServeConfig] = []
    monkeypatch.setattr(serve_command, "run_server", lambda config, **_: started.append(config))
    for flags in ([], ["--dense-budget-bytes", "123"]):
        command = ["serve", "--model", str(model), "--store", str(store_dir), *flags]
        assert CliRunner().invoke(app, command).exit_code == 0
    assert [config.api.limits.dense_budget_bytes for config in started] == [0, 123]


def test_flags_beat_the_environment_and_the_environment_beats_the_file(tmp_path: Path, store_dir: Path) -> None:
    file = tmp_path / "chorale.toml"
    file.write_text(f'model = "from-file"\nstore = "{store_dir}"\n')
    flags = ["serve", "--config", str(file)]
    environment = {"CHORALE_MODEL": "from-environment"}
    for more, env, winner in (
        ([], {}, "from-file"),
        ([], environment, "from-environment"),
        (["--model", "from-flag"], environment, "from-flag"),
    ):
        result = CliRunner().invoke(app, [*flags, *more], env=env)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"chorale: {winner} does not exist")


@pytest.mark.parametrize(
    ("text", "words"),
    [('modle = "x"', ["unknown key 'modle'", "max_num_seqs"]), ("model =", ["chorale.toml"])],
    ids=["unknown key", "not TOML"],
)
def test_a_config_file_with_a_mistake_is_refused_by_name(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "chorale.toml"
    file.write_text(text)
    result = CliRunner().invoke(app, ["serve", "--config", str(file), "--model", "m", "--store", "s"])
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words)
