"""`chorale adapters promote|rollback|canary|alias|versions`: the same commands on a folder and on a server."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from serve.cli.app import app
from serve.tenants.audit import AUDIT_FILE, verify
from tests.api.byte_tokenizer import write_model_dir
from tests.api_guard.whole_api import whole_api
from tests.store.folders import lora_config, lora_tensors, open_store, write_folder
from tests.store.registry_cases import new, open_alone

Run = Callable[..., Result]


@pytest.fixture
def filled(store_dir: Path, tmp_path: Path) -> Path:
    """Return a store with three versions of `fr`, of which the name means the second."""
    with closing(open_store(store_dir)) as opened:
        for seed in (1, 2, 3):
            opened.put_dir("fr", write_folder(tmp_path / str(seed), lora_config(), lora_tensors(seed=seed)))
        opened.rollback("fr")
    return store_dir


@pytest.fixture(params=["folder", "server"])
def run(request: pytest.FixtureRequest, filled: Path, tmp_path: Path) -> Iterator[Run]:
    """Hand out a function that runs `chorale adapters ARGUMENTS` on the store."""

    def invoke(*where: str) -> Run:
        return lambda *arguments: CliRunner().invoke(app, ["adapters", *map(str, arguments), *where])

    if request.param == "folder":
        yield invoke("--store", str(filled))
    else:
        with whole_api(write_model_dir(tmp_path / "model"), filled) as api:
            yield invoke("--url", f"http://127.0.0.1:{api.server.port}")


def meanings(run: Run) -> dict[int, tuple[bool, float | None, list[str]]]:
    """Return what points to each version."""
    result = run("versions", "fr", "--json")
    assert result.exit_code == 0, result.stderr
    return {row["version"]: (row["current"], row["percent"], row["aliases"]) for row in json.loads(result.stdout)}


def test_a_name_is_moved_there_and_back(run: Run) -> None:
    assert meanings(run) == {1: (False, None, []), 2: (True, None, []), 3: (False, None, [])}
    result = run("promote", "fr", 3)
    assert result.exit_code == 0 and result.stdout.startswith("fr is version 3 sha256:")
    assert run("rollback", "fr").stdout.startswith("fr is version 2 sha256:")
    assert run("rollback", "fr").stdout.startswith("fr is version 1 sha256:")
    refused = run("rollback", "fr")
    assert refused.exit_code == 1 and "from the beginning" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_canary_comes_grows_and_is_promoted(run: Run) -> None:
    assert run("canary", "fr", 3, "--percent", 5).stdout == "5 % of fr get version 3\n"
    assert run("canary", "fr", "canary", "--percent", 50, "--sticky", "key").stdout == "50 % of fr get version 3\n"
    assert meanings(run)[3] == (False, 50.0, ["canary"])
    assert run("promote", "fr", "canary", "--to", "stable").stdout.startswith("fr:stable is version 3")
    assert run("promote", "fr", "canary").exit_code == 0
    assert meanings(run) == {1: (False, None, []), 2: (False, None, []), 3: (True, None, ["stable"])}
    run("canary", "fr", 1, "--percent", 1)
    assert run("canary", "fr", "--end").stdout == "fr has no canary\n"
    assert meanings(run)[1] == (False, None, [])


def test_aliases_come_and_go(run: Run) -> None:
    assert run("alias", "fr", "prod", 1).stdout == "fr:prod is version 1\n"
    assert meanings(run)[1] == (False, None, ["prod"])
    assert "prod" in run("versions", "fr").stdout
    assert run("alias", "fr", "prod", "--remove").stdout == "fr:prod is no more\n"
    assert meanings(run)[1] == (False, None, [])


@pytest.mark.parametrize(
    "arguments",
    [
        ("promote", "fr", 9),
        ("promote", "fr", "nowhere"),
        ("promote", "nobody", 1),
        ("canary", "fr"),
        ("canary", "fr", 1),
        ("canary", "fr", 1, "--percent", 5, "--end"),
        ("canary", "fr", 2, "--percent", 5),
        ("canary", "fr", 1, "--percent", 101),
        ("canary", "fr", "--end"),
        ("alias", "fr", "a b", 1),
        ("alias", "fr", "prod"),
        ("alias", "fr", "prod", "--remove"),
        ("versions", "nobody"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_1(filled: Path, arguments: tuple[object, ...]) -> None:
    result = CliRunner().invoke(app, ["adapters", *map(str, arguments), "--store", str(filled)])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1), result.output


def test_every_change_of_a_folder_is_in_its_audit_log(filled: Path) -> None:
    for arguments in (
        ("promote", "fr", "3"),
        ("rollback", "fr"),
        ("canary", "fr", "3", "--percent", "5"),
        ("alias", "fr", "prod", "1"),
        ("rm", "fr"),
    ):
        assert CliRunner().invoke(app, ["adapters", *arguments, "--store", str(filled)]).exit_code == 0
    with (filled / AUDIT_FILE).open("rb") as lines:
        assert verify(lines) is None
    records = [json.loads(line) for line in (filled / AUDIT_FILE).read_text().splitlines()]
    assert [record["event"] for record in records] == ["promote", "rollback", "canary", "alias", "delete"]
    assert all(record["key"].startswith("cli:") and record["subject"] == "fr" for record in records)


def test_a_shared_store_is_changed_through_a_replica(store_dir: Path) -> None:
    with closing(open_alone(store_dir)) as registry:
        registry.publish(new("fr"))
    for arguments in (("promote", "fr", "1"), ("rollback", "fr"), ("alias", "fr", "a", "1")):
        result = CliRunner().invoke(app, ["adapters", *arguments, "--store", str(store_dir)])
        assert result.exit_code == 1 and "--url URL" in result.stderr
