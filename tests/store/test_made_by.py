"""How an adapter was made: what lies beside an upload is in its manifest and its digest, word by word, or refused."""

import json
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from adapters_store.errors import CorruptUpload
from adapters_store.export.canonical_reader import open_canonical
from adapters_store.made_by import MAX_PROVENANCE_PART_BYTES
from adapters_store.object_files import open_object_file
from adapters_store.registry import AdapterVersion
from adapters_store.signatures import Sent
from adapters_store.signing.bundle import Statement, pre_authentication, root_digest, write_bundle, write_statement
from adapters_store.signing.gate import TrustedKeysGate, sha256_of
from adapters_store.signing.keys import SigningKey, public_pem
from adapters_store.signing.sign import sign_folder
from adapters_store.signing.trust import TrustFolder
from adapters_store.strict_json import Json
from adapters_store.version_errors import SignatureInvalid
from tests.store.folders import lora_config, lora_tensors, open_store, write_folder

KEY = SigningKey(ed25519.Ed25519PrivateKey.from_private_bytes(b"8" * 32))
CURVE: list[Json] = [[step, 1.0 / step, 0.5] for step in range(1, 501)]
MADE: dict[str, Json] = {"seed": 7, "hyper_parameters": {"rank": 8, "learning_rate": 0.005}, "parent": ""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "voice", lora_config(), lora_tensors(seed=1))


@pytest.fixture
def gate(tmp_path: Path) -> TrustedKeysGate:
    """Return a gate that lets nothing pass but what KEY signed."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "maker.pem").write_bytes(public_pem(KEY.public.key))
    return TrustedKeysGate(TrustFolder(tmp_path / "keys", monotonic=lambda: 0.0), is_required=True)


def put(store_dir: Path, folder: Path, said: object = None, *, raw: bytes | None = None) -> AdapterVersion:
    (folder / "provenance.json").unlink(missing_ok=True)
    if said is not None or raw is not None:
        (folder / "provenance.json").write_bytes(json.dumps(said).encode() if raw is None else raw)
    with closing(open_store(store_dir)) as store:
        return store.put_dir("fr", folder)


def test_what_lies_beside_an_adapter_is_in_its_manifest_and_part_of_its_digest(store_dir: Path, folder: Path) -> None:
    silent = put(store_dir, folder)
    told = put(store_dir, folder, MADE | {"loss_curve": CURVE})
    other = put(store_dir, folder, MADE | {"loss_curve": CURVE, "seed": 8})
    assert len({silent.digest, told.digest, other.digest}) == 3
    assert put(store_dir, folder, MADE | {"loss_curve": CURVE}).digest == told.digest
    # the curve is in the manifest; lists of adapters stay short
    assert (silent.provenance, told.provenance) == (None, MADE)
    file, sha256 = open_object_file(store_dir, told.digest, "adapter.json")
    with file:
        manifest = json.load(file)
    assert manifest["provenance"] == MADE | {"loss_curve": CURVE} and sha256 == told.digest
    with open_canonical(store_dir / "objects" / told.digest) as reader:
        assert reader.manifest.digest() == told.digest
    with closing(open_store(store_dir)) as store:
        assert store.get("fr").provenance == MADE
        assert store.open_image(told.digest).digest == told.digest


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "is not valid JSON"),
        (b"[1]", "must hold one JSON object"),
        (b"{}", "is empty"),
        (b'{"a": 1, "a": 2}', "appears twice"),
        (b'{"loss": NaN}', "is not a JSON number"),
        (b'{"by": "\\ud800"}', "half a surrogate pair"),
        (deep(17), "nested deeper"),
        (deep(16), "nested too deep"),
        (b'{"x": "' + b"y" * MAX_PROVENANCE_PART_BYTES + b'"}', "is larger than"),
    ],
    ids=["nothing", "a list", "empty", "twice", "nan", "surrogate", "deep", "too deep for a manifest", "long"],
)
def test_what_cannot_be_kept_word_by_word_is_refused_by_name(
    store_dir: Path, folder: Path, raw: bytes, why: str
) -> None:
    with pytest.raises(Exception, match=why) as refused:
        put(store_dir, folder, raw=raw)
    assert getattr(refused.value, "http_status", 500) in (400, 413) and "provenance.json" in str(refused.value)
    assert not any((store_dir / "objects").iterdir()) and not any((store_dir / "staging").iterdir())


def test_a_link_is_not_followed(store_dir: Path, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "secret.json").write_text('{"a": 1}')
    (folder / "provenance.json").symlink_to(tmp_path / "secret.json")
    with closing(open_store(store_dir)) as store, pytest.raises(CorruptUpload, match="not a regular file"):
        store.put_dir("fr", folder)


@pytest.mark.parametrize("made", [{"seed": 4}, {"curve": [0.5] * 9000}], ids=["whole", "by its hash"])
def test_what_is_signed_is_what_is_kept(
    store_dir: Path, folder: Path, gate: TrustedKeysGate, made: dict[str, Json]
) -> None:
    sign_folder(folder, KEY)
    (folder / "provenance.json").write_text(json.dumps(made))
    with closing(open_store(store_dir)) as store:
        store.signatures = gate
        with pytest.raises(SignatureInvalid, match=r"provenance\.json is not the one that was signed"):
            store.put_dir("fr", folder)
        assert store.list() == []
        sign_folder(folder, KEY)
        version = store.put_dir("fr", folder)
        assert version.signature is not None and version.signature["status"] == "verified"


def test_a_signature_over_every_file_of_the_folder_covers_the_provenance_too(
    folder: Path, gate: TrustedKeysGate
) -> None:
    files = {path.name: path for path in folder.iterdir()}
    made = folder / "provenance.json"
    made.write_text('{"seed": 3}')
    hashes = {name: sha256_of(path) for name, path in sorted({**files, made.name: made}.items())}
    payload = write_statement(Statement("final", root_digest([*hashes.values()]), hashes))
    bundle = write_bundle(payload, KEY.sign(pre_authentication(payload)), KEY.public.hint)
    facts = gate.check_upload("", Sent(files, bundle, made))
    assert facts is not None and facts["status"] == "verified"
    made.write_text('{"seed": 4}')
    with pytest.raises(SignatureInvalid, match="is not the file that was signed"):
        gate.check_upload("", Sent(files, bundle, made))
