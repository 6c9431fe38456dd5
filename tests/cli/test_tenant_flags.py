"""The flags of tenants reach the server's configuration, from the command line, the environment and a file."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from serve.cli import serve_command
from serve.cli.app import app
from serve.config import ServeConfig, TenantLimits
from tests.tiny_model import write_tiny_model


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    """Let `chorale serve` end where the server would begin; return what it would have begun with."""
    configs: list[ServeConfig] = []
    monkeypatch.setattr(serve_command, "run_server", lambda config, **_: configs.append(config))
    monkeypatch.setattr(serve_command, "start_logging", lambda level: None)
    return configs


def serve(tmp_path: Path, *flags: str, **environment: str) -> Result:
    model_dir = tmp_path / "model"
    if not model_dir.exists():
        write_tiny_model(model_dir)
    arguments = ["serve", "--model", str(model_dir), "--store", str(tmp_path / "store"), *flags]
    return CliRunner().invoke(app, arguments, env=environment)


def test_a_bound_that_is_none_ends_the_start_with_one_line(tmp_path: Path, started: list[ServeConfig]) -> None:
    result = serve(tmp_path, "--tenant-limit", "requests=5")
    assert result.exit_code == 2 and "requests-per-minute" in result.stderr and result.stderr.count("\n") == 1
    assert not started


def test_without_flags_there_is_one_user_without_bounds(tmp_path: Path, started: list[ServeConfig]) -> None:
    assert serve(tmp_path).exit_code == 0
    api = started[0].api
    assert (api.require_keys, api.pepper_file, api.api_keys, api.tenant_limits) == (False, None, (), TenantLimits())


def test_flags_environment_and_file_say_the_same(tmp_path: Path, started: list[ServeConfig]) -> None:
    pepper, bounds = str(tmp_path / "pepper"), ["tokens-per-minute=9", "max-adapters=2"]
    limits = [flag for bound in bounds for flag in ("--tenant-limit", bound)]
    assert serve(tmp_path, "--require-keys", "--pepper-file", pepper, *limits).exit_code == 0
    environment = {
        "CHORALE_REQUIRE_KEYS": "1",
        "CHORALE_PEPPER_FILE": pepper,
        "CHORALE_TENANT_LIMIT": " ".join(bounds),
    }
    assert serve(tmp_path, **environment).exit_code == 0
    file = tmp_path / "chorale.toml"
    file.write_text(f'require-keys = true\npepper-file = "{pepper}"\ntenant-limit = {bounds}\n', encoding="utf-8")
    assert serve(tmp_path, "--config", str(file)).exit_code == 0
    for config in started:
        api = config.api
        assert (api.require_keys, str(api.pepper_file)) == (True, pepper)
        assert api.tenant_limits == TenantLimits(tokens_per_minute=9, max_adapters=2)
    assert len(started) == 3


def test_weights_of_tenants_reach_the_engine_and_only_sound_ones(tmp_path: Path, started: list[ServeConfig]) -> None:
    assert serve(tmp_path, "--tenant-weight", "acme=4", "--tenant-weight", "bob=0.5").exit_code == 0
    assert started[0].api.limits.tenant_weights == {"acme": 4.0, "bob": 0.5}
    assert serve(tmp_path).exit_code == 0 and started[1].api.limits.tenant_weights == {}
    for wrong in ("acme", "acme=0", "acme=nan", "acme=101", "acme=-1", "acme=many", "A b=1", "=1"):
        result = serve(tmp_path, "--tenant-weight", wrong)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, wrong
    assert serve(tmp_path, "--tenant-weight", "a=1", "--tenant-weight", "a=2").exit_code == 2
    assert len(started) == 2
