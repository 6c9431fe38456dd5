"""`chorale keys` as an operator types it, on a folder of its own; nothing of a secret stays anywhere but on stdout."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from serve.cli.app import app
from serve.tenants.audit import AUDIT_FILE, verify
from serve.tenants.key_ring import KeyRing
from serve.tenants.key_store_sqlite import KEYS_FILE, SqliteKeyStore
from serve.tenants.pepper import PEPPER_FILE, read_pepper


def keys(store_dir: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", arguments[0], "--store", str(store_dir), *arguments[1:]])


def rows(store_dir: Path) -> list[dict[str, object]]:
    result: list[dict[str, object]] = json.loads(keys(store_dir, "list", "--json").stdout)
    return result


def create(store_dir: Path, *arguments: str) -> str:
    result = keys(store_dir, "create", "--tenant", "acme", "--scope", "infer", *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout.strip()


def opens(store_dir: Path, text: str, *, at: float | None = None) -> bool:
    pepper = read_pepper(store_dir / PEPPER_FILE, create=False)
    store = SqliteKeyStore(store_dir / KEYS_FILE, pepper)
    ring = KeyRing(store, pepper, monotonic=time.monotonic, clock=lambda: time.time() if at is None else at)
    ring.refresh()
    store.close()
    return ring.authenticate(text) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "--tenant", "Acme", "--scope", "infer"), "tenant name 'Acme'"),
        (("create", "--tenant", "acme", "--scope", "root"), "unknown scope 'root'"),
        (("create", "--tenant", "acme", "--scope", "infer", "--expires-in", "soon"), "'soon' is not a number"),
        (("create", "--tenant", "acme", "--scope", "infer", "--expires-in", "0d"), "'0d' is not a number"),
        (("list",), "holds no keys"),
        (("revoke", "00ff"), "holds no keys"),
        (("rotate", "00ff"), "holds no keys"),
    ],
)
def test_mistakes_are_one_line_and_make_nothing(store_dir: Path, arguments: tuple[str, ...], message: str) -> None:
    result = keys(store_dir, *arguments)
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not result.stdout and not store_dir.exists()


def test_unknown_ids_and_dead_keys_are_refused(store_dir: Path) -> None:
    create(store_dir)
    for command in ("revoke", "rotate"):
        result = keys(store_dir, command, "00ff")
        assert result.exit_code == 1 and "00ff" in result.stderr
    key_id = str(rows(store_dir)[0]["id"])
    assert keys(store_dir, "revoke", key_id).exit_code == 0
    result = keys(store_dir, "rotate", key_id)
    assert result.exit_code == 1 and "is revoked" in result.stderr and len(rows(store_dir)) == 1


def test_a_key_is_shown_once_and_kept_nowhere(store_dir: Path) -> None:
    text = create(store_dir)
    other_end = "1" if text.endswith("0") else "0"
    assert opens(store_dir, text) and not opens(store_dir, text[:-1] + other_end)
    shown = keys(store_dir, "list").stdout + keys(store_dir, "list", "--json").stdout
    kept = b"".join(path.read_bytes() for path in store_dir.iterdir())
    secret = text.split("_")[2]
    assert secret not in shown and secret.encode() not in kept and secret[:64].encode() not in kept
    assert text.split("_")[1] in shown


def test_a_key_lives_as_long_as_was_asked(store_dir: Path) -> None:
    text, endless = create(store_dir, "--expires-in", "2h"), create(store_dir)
    assert [opens(store_dir, key, at=time.time() + 7100) for key in (text, endless)] == [True, True]
    assert [opens(store_dir, key, at=time.time() + 7300) for key in (text, endless)] == [False, True]


def test_revoking_is_for_ever(store_dir: Path) -> None:
    text = create(store_dir)
    assert keys(store_dir, "revoke", text.split("_")[1]).exit_code == 0
    assert not opens(store_dir, text) and rows(store_dir)[0]["state"] == "revoked"


def test_a_rotation_overlaps(store_dir: Path) -> None:
    old = create(store_dir)
    result = keys(store_dir, "rotate", old.split("_")[1], "--overlap", "1h")
    new = result.stdout.strip()
    assert [opens(store_dir, key) for key in (old, new)] == [True, True]
    assert [opens(store_dir, key, at=time.time() + 3700) for key in (old, new)] == [False, True]
    by_id = {row["id"]: row for row in rows(store_dir)}
    assert by_id[new.split("_")[1]]["tenant"] == "acme" and by_id[new.split("_")[1]]["scopes"] == ["infer"]


def test_a_pepper_of_ones_own(store_dir: Path, tmp_path: Path) -> None:
    pepper = tmp_path / "pepper"
    result = keys(store_dir, "create", "--tenant", "a", "--scope", "infer", "--pepper-file", str(pepper))
    assert result.exit_code == 1 and "No such file" in result.stderr
    pepper.write_bytes(b"x" * 32)
    pepper.chmod(0o600)
    assert keys(store_dir, "create", "--tenant", "a", "--scope", "infer", "--pepper-file", str(pepper)).exit_code == 0
    assert not (store_dir / PEPPER_FILE).exists()
    assert "No such file" in keys(store_dir, "list").stderr
    pepper.write_bytes(b"y" * 32)
    assert "another pepper" in keys(store_dir, "list", "--pepper-file", str(pepper)).stderr


def audit(store_dir: Path, *flags: str) -> Result:
    return CliRunner().invoke(app, ["audit", "--store", str(store_dir), *flags])


def test_a_log_that_is_missing_changed_or_cut_is_told_in_one_line(store_dir: Path) -> None:
    assert "No such file" in audit(store_dir).stderr
    create(store_dir)
    first = audit(store_dir).stdout.split()[-1]
    create(store_dir)
    whole = audit(store_dir, "--head", first)
    assert whole.exit_code == 0 and whole.stdout.startswith("2 records intact, head ")
    head, log = whole.stdout.split()[-1], store_dir / AUDIT_FILE
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0])
    cut = audit(store_dir, "--head", head)
    assert cut.exit_code == 1 and "end was cut off" in cut.stderr and cut.stderr.count("\n") == 1
    log.write_bytes(lines[0].replace(b"acme", b"evil") + lines[1])
    changed = audit(store_dir)
    assert changed.exit_code == 1 and "record 1 was altered" in changed.stderr
    log.write_bytes(b"\xff\xfe\n")
    assert "record 1 not a record" in audit(store_dir).stderr


def test_all_of_it_is_in_the_audit_log(store_dir: Path) -> None:
    text = create(store_dir)
    new = keys(store_dir, "rotate", text.split("_")[1]).stdout.strip()
    keys(store_dir, "revoke", new.split("_")[1])
    lines = (store_dir / AUDIT_FILE).read_bytes().splitlines(keepends=True)
    assert verify(lines) is None
    records = [json.loads(line) for line in lines]
    assert [record["event"] for record in records] == ["key_made", "key_rotated", "key_revoked"]
    assert records[2]["subject"] == new.split("_")[1] and records[0]["detail"] == "acme: infer"
    assert not any(key.split("_")[2].encode() in b"".join(lines) for key in (text, new))
