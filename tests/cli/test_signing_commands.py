"""`chorale adapters sign`, and the flags by which a store asks for signatures."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner, Result

from adapters_store.signatures import OpenGate
from adapters_store.signing.keys import public_pem
from serve.cli.app import app
from serve.cli.signing_extra import open_gate
from serve.errors import StartError
from tests.tiny_model import write_tiny_adapter, write_tiny_model


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["adapters", *map(str, arguments)])


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """Return a private key's file; `keys/ours.pem` beside it is its public half."""
    private = ec.derive_private_key(31, ec.SECP384R1())
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "ours.pem").write_bytes(public_pem(private.public_key()))
    path = tmp_path / "private.pem"
    path.write_bytes(private.private_bytes(*pem))
    return path


def test_a_signed_folder_is_added_where_signatures_are_required(store_dir: Path, tmp_path: Path, key: Path) -> None:
    base = write_tiny_model(tmp_path / "tiny")
    voice = write_tiny_adapter(tmp_path, "voice", rank=4, seed=1).folder
    add: list[str | Path] = ["add", "voice", voice, "--store", store_dir, "--base", base, "--probe", "off", "--json"]
    required: list[str | Path] = [*add, "--signatures", "require", "--trust-roots", tmp_path / "keys"]
    refused = run(*required)
    assert refused.exit_code == 1 and "the upload is not signed" in refused.stderr
    signed = run("sign", voice, "--key", key)
    assert signed.exit_code == 0 and "model.sig with key sha256:" in signed.stdout
    added = json.loads(run(*required).stdout)[0]
    assert added["signature"]["status"] == "verified" and added["signature"]["signer"] == "ours.pem"
    assert "signature: verified, by ours.pem (sha256:" in run("show", "voice", "--store", store_dir).stdout
    assert json.loads(run(*add).stdout)[0]["signature"] == {"status": "not_checked"}


def test_what_cannot_sign_is_said_in_one_line(tmp_path: Path, key: Path) -> None:
    voice = write_tiny_adapter(tmp_path, "voice", rank=4, seed=1).folder
    for arguments in (
        (voice, "--key", tmp_path / "nowhere"),
        (voice, "--key", tmp_path / "keys" / "ours.pem"),
        (tmp_path / "keys", "--key", key),
    ):
        result = run("sign", *arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1), result.output
    assert not (voice / "model.sig").exists()


def test_flags_that_ask_for_nothing_or_trust_nobody_are_refused(tmp_path: Path, key: Path) -> None:
    assert isinstance(open_gate("off", None), OpenGate)
    (tmp_path / "none").mkdir()
    for policy, roots in (("off", key.parent), ("require", None), ("warn", None), ("require", tmp_path / "none")):
        with pytest.raises(StartError, match="--trust-roots"):
            open_gate(policy, roots)
    (tmp_path / "none" / "bob").mkdir()
    (tmp_path / "keys" / "ours.pem").rename(tmp_path / "none" / "bob" / "ours.pem")
    assert not isinstance(open_gate("require", tmp_path / "none"), OpenGate)
    assert not isinstance(open_gate("warn", tmp_path / "none" / "bob" / "ours.pem"), OpenGate)
