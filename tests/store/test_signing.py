"""Signatures: the library's own bundles are read, all else is refused, what was verified is verified again."""

import base64
import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from adapters_store.errors import InvalidOption, StorageFailed
from adapters_store.signatures import Sent
from adapters_store.signing.bundle import (
    Statement,
    pre_authentication,
    read_bundle,
    root_digest,
    write_bundle,
    write_statement,
)
from adapters_store.signing.gate import TrustedKeysGate, find_signer, sha256_of
from adapters_store.signing.keys import SigningKey, public_pem, read_public_key
from adapters_store.signing.sign import sign_export, sign_folder
from adapters_store.signing.trust import TrustFolder
from adapters_store.store import AdapterRef, AdapterStore
from adapters_store.strict_json import Json
from adapters_store.version_errors import SignatureInvalid
from tests.store.folders import lora_config, lora_tensors, open_store, write_folder

SAMPLES = Path(__file__).parent / "signed_samples"
SAMPLE_FILES = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"not weights"}
# from a seed: the same signatures' keys in every run
KEYS = {
    "p256": SigningKey(ec.derive_private_key(11, ec.SECP256R1())),
    "p384": SigningKey(ec.derive_private_key(12, ec.SECP384R1())),
    "p521": SigningKey(ec.derive_private_key(13, ec.SECP521R1())),
    "ed25519": SigningKey(ed25519.Ed25519PrivateKey.from_private_bytes(b"7" * 32)),
}
OTHER = SigningKey(ec.derive_private_key(99, ec.SECP256R1()))


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def trust(folder: Path, **keys: SigningKey) -> Path:
    """Write public keys; `bob__key` goes into bob's folder."""
    for name, key in keys.items():
        path = folder / (name.replace("__", "/") + ".pem")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(public_pem(key.public.key))
    return folder


def gate(folder: Path, *, is_required: bool = True, clock: Callable[[], float] | None = None) -> TrustedKeysGate:
    return TrustedKeysGate(TrustFolder(folder, monotonic=clock or Clock()), is_required=is_required)


def write_files(folder: Path, files: dict[str, bytes]) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in files}


@pytest.mark.parametrize("curve", ["P-256", "P-384", "P-521"])
def test_signatures_of_the_library_are_verified(tmp_path: Path, curve: str) -> None:
    sent = Sent(write_files(tmp_path / "voice", SAMPLE_FILES), (SAMPLES / f"{curve}.sig").read_bytes())
    facts = gate(SAMPLES).check_upload("", sent)
    assert facts is not None and facts["status"] == "verified" and facts["signer"] == f"{curve}.pem"
    assert facts["model"] == "voice"
    (tmp_path / "voice" / "adapter_model.safetensors").write_bytes(b"not weightz")
    with pytest.raises(SignatureInvalid, match="not the file that was signed"):
        gate(SAMPLES).check_upload("", sent)


@pytest.mark.parametrize("kind", sorted(KEYS))
def test_what_we_sign_we_verify(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "voice"
    files = write_files(folder, SAMPLE_FILES)
    path = sign_folder(folder, KEYS[kind], provenance={"seed": 7, "base": "sha256:aa"})
    facts = gate(trust(tmp_path / "keys", key=KEYS[kind])).check_upload("", Sent(files, path.read_bytes()))
    assert facts is not None and facts["provenance"] == {"seed": 7, "base": "sha256:aa"}
    with pytest.raises(SignatureInvalid, match="not signed by any of the 1 keys"):
        gate(trust(tmp_path / "others", key=OTHER)).check_upload("", Sent(files, path.read_bytes()))


def test_what_a_job_left_is_signed_with_how_it_was_made(tmp_path: Path) -> None:
    folder = tmp_path / "final"
    files = write_files(folder, SAMPLE_FILES)
    write_files(folder, {"upload.json": b'{"format": "peft", "options": {}}'})
    checks = gate(trust(tmp_path / "keys", key=KEYS["ed25519"]))
    long = {"loss": [0.125] * 9000}
    digest = hashlib.sha256(json.dumps(long).encode()).hexdigest()
    for made, shown in (({"seed": 3, "base": "aa"}, {"seed": 3, "base": "aa"}), (long, {"sha256": digest})):
        write_files(folder, {"provenance.json": json.dumps(made).encode()})
        sign_export(folder, KEYS["ed25519"])
        facts = checks.check_upload("", Sent(files, (folder / "model.sig").read_bytes()))
        assert facts is not None and facts["provenance"] == shown


def test_a_folder_without_an_adapter_is_not_signed(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="is missing"):
        sign_folder(tmp_path, KEYS["p256"])
    assert list(tmp_path.iterdir()) == []


KEY = KEYS["p256"]
STATEMENT = Statement(
    "voice", "", {"adapter_config.json": "a" * 64, "adapter_model.safetensors": "b" * 64}, {"seed": 1}
)
PAYLOAD = write_statement(STATEMENT)


def signed(payload: bytes, *, key: SigningKey = KEY, hint: str | None = None) -> bytes:
    hint = key.public.hint if hint is None else hint
    return write_bundle(payload, key.sign(pre_authentication(payload)), hint)


def of_statement(**changes: object) -> bytes:
    return signed(json.dumps(json.loads(PAYLOAD) | changes).encode())


def of_predicate(**changes: object) -> bytes:
    return of_statement(predicate=json.loads(PAYLOAD)["predicate"] | changes)


def of_outer(**changes: object) -> bytes:
    return json.dumps(json.loads(signed(PAYLOAD)) | changes).encode()


def of_envelope(**changes: object) -> bytes:
    return of_outer(dsseEnvelope=json.loads(signed(PAYLOAD))["dsseEnvelope"] | changes)


def resource(name: str = "x", algorithm: str = "sha256", digest: str = "c" * 64) -> dict[str, str]:
    return {"name": name, "algorithm": algorithm, "digest": digest}


GOOD = json.loads(signed(PAYLOAD))
SIGNATURE = GOOD["dsseEnvelope"]["signatures"][0]["sig"]
TAMPERED: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"\x00" * 64,
    "a list": b"[]",
    "cut off": signed(PAYLOAD)[:-1],
    "a key twice": signed(PAYLOAD)[:-1] + b',"mediaType":"x"}',
    "too long": signed(PAYLOAD) + b" " * (1 << 20),
    "nested deep": b'{"a":' * 100 + b"1" + b"}" * 100,
    "other media type": of_outer(mediaType="application/vnd.dev.sigstore.bundle.v0.1+json"),
    "no material": of_outer(verificationMaterial={}),
    "a certificate": of_outer(verificationMaterial={"certificate": {"rawBytes": "AA=="}}),
    "hint is a number": of_outer(verificationMaterial={"publicKey": {"hint": 7}}),
    "another key's hint": signed(PAYLOAD, hint=OTHER.public.hint),
    "another key's signature under our hint": signed(PAYLOAD, key=OTHER, hint=KEY.public.hint),
    "another key's signature without a hint": signed(PAYLOAD, key=OTHER, hint=""),
    "no envelope": of_outer(dsseEnvelope=None),
    "other payload type": of_envelope(payloadType="application/json"),
    "no signature": of_envelope(signatures=[]),
    "two signatures": of_envelope(signatures=[{"sig": SIGNATURE}, {"sig": SIGNATURE}]),
    "empty signature": of_envelope(signatures=[{"sig": ""}]),
    "signature is no base64": of_envelope(signatures=[{"sig": "!!!"}]),
    "signature cut off": of_envelope(signatures=[{"sig": base64.b64encode(base64.b64decode(SIGNATURE)[:-1]).decode()}]),
    "payload is no base64": of_envelope(payload="?"),
    "payload altered": of_envelope(payload=base64.b64encode(PAYLOAD.replace(b"voice", b"vOice")).decode()),
    "payload of another signature": of_envelope(
        payload=base64.b64encode(write_statement(replace(STATEMENT, name="other"))).decode()
    ),
    "signed without the envelope's frame": write_bundle(PAYLOAD, KEY.sign(PAYLOAD), KEY.public.hint),
    "other statement type": of_statement(_type="https://in-toto.io/Statement/v0.1"),
    "other predicate type": of_statement(predicateType="https://model_signing/Digests/v0.1"),
    "no subject": of_statement(subject=[]),
    "two subjects": of_statement(subject=[{"name": "a"}, {"name": "b"}]),
    "root digest of other files": of_statement(subject=[{"name": "voice", "digest": {"sha256": "0" * 64}}]),
    "shards": of_predicate(serialization={"method": "shards", "hash_type": "sha256"}),
    "other hash": of_predicate(serialization={"method": "files", "hash_type": "blake2b"}),
    "no files": of_predicate(resources=[]),
    "a file twice": of_predicate(resources=[resource(), resource()]),
    "a digest of other length": of_predicate(resources=[resource(digest="c" * 63)]),
    "a digest in capitals": of_predicate(resources=[resource(digest="C" * 64)]),
    "a file of another hash": of_predicate(resources=[resource(algorithm="md5")]),
    "a file more than was hashed": of_predicate(
        resources=[*json.loads(PAYLOAD)["predicate"]["resources"], resource("evil.bin")]
    ),
    "provenance is a text": of_predicate(provenance="trust me"),
    "provenance without end": of_predicate(provenance={"x": "y" * (40 << 10)}),
}


def test_the_untampered_bundle_is_good() -> None:
    bundle = read_bundle(signed(PAYLOAD))
    assert find_signer(bundle, (OTHER.public, KEY.public)) == KEY.public
    assert dict(bundle.statement.files) == STATEMENT.files and bundle.statement.provenance == {"seed": 1}
    assert find_signer(read_bundle(signed(PAYLOAD, hint="")), (OTHER.public, KEY.public)) == KEY.public


@pytest.mark.parametrize("case", sorted(TAMPERED))
def test_a_tampered_bundle_is_refused(case: str) -> None:
    with pytest.raises(SignatureInvalid) as refused:
        find_signer(read_bundle(TAMPERED[case]), (KEY.public,))
    assert (refused.value.http_status, refused.value.code) == (403, "signature_invalid")
    assert len(refused.value.message) < 400


@pytest.mark.parametrize(
    ("signed_names", "sent_names", "reason"),
    [
        (("a", "b"), ("a",), "'b' was signed and not sent"),
        (("a",), ("a", "b"), "'b' was sent and not signed"),
        (("a", "../b"), ("a", "b"), "'../b' was signed and not sent"),
        (("A",), ("a",), "'A' was signed and not sent"),
    ],
)
def test_exactly_the_signed_files_are_sent(
    tmp_path: Path, signed_names: tuple[str, ...], sent_names: tuple[str, ...], reason: str
) -> None:
    sent = write_files(tmp_path / "sent", dict.fromkeys(sent_names, b"x"))
    digest = sha256_of(next(iter(sent.values())))
    statement = Statement("m", root_digest([digest] * len(signed_names)), dict.fromkeys(signed_names, digest))
    with pytest.raises(SignatureInvalid, match=reason):
        gate(trust(tmp_path / "keys", key=KEY)).check_upload("", Sent(sent, signed(write_statement(statement))))


def test_a_tenants_key_counts_for_its_own_adapters_only(tmp_path: Path) -> None:
    files = write_files(tmp_path / "voice", SAMPLE_FILES)
    bundle = sign_folder(tmp_path / "voice", KEY).read_bytes()
    checks = gate(trust(tmp_path / "keys", everybody=OTHER, bob__key=KEY))
    assert checks.check_upload("bob", Sent(files, bundle))
    for owner in ("", "alice", "bobby"):
        with pytest.raises(SignatureInvalid):
            checks.check_upload(owner, Sent(files, bundle))
    assert gate(trust(tmp_path / "own", local__key=KEY)).check_upload("", Sent(files, bundle))


def test_keys_of_other_kinds_and_files_that_are_none_are_refused_at_once(tmp_path: Path) -> None:
    unknown: tuple[rsa.RSAPublicKey | ec.EllipticCurvePublicKey, ...] = (
        rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key(),
        ec.derive_private_key(5, ec.SECP256K1()).public_key(),
    )
    for number, key in enumerate(unknown):
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{number}.pem").write_bytes(pem)
        with pytest.raises(InvalidOption, match="of another kind"):
            read_public_key(tmp_path / f"{number}.pem")
    (tmp_path / "2.pem").write_bytes(b"hello")
    with pytest.raises(InvalidOption, match="not a public key"):
        read_public_key(tmp_path / "2.pem")
    with pytest.raises(InvalidOption):
        TrustFolder(tmp_path, monotonic=Clock())
    with pytest.raises(InvalidOption):
        TrustFolder(tmp_path / "nowhere", monotonic=Clock())


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Return a folder that trusts `KEY`."""
    return trust(tmp_path / "keys", key=KEY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an unsigned adapter."""
    return write_folder(tmp_path / "voice", lora_config(), lora_tensors(seed=1))


def num_left(store: AdapterStore) -> int:
    return sum(1 for room in ("objects", "staging") for _ in (store._blobs.root.parent / room).iterdir())


def test_a_store_that_requires_signatures_publishes_nothing_without(
    store_dir: Path, tmp_path: Path, keys: Path, folder: Path
) -> None:
    another = write_folder(tmp_path / "another", lora_config(), lora_tensors(seed=2))
    with closing(open_store(store_dir)) as store:
        store.signatures = gate(keys)
        with pytest.raises(SignatureInvalid, match="the upload is not signed"):
            store.put_dir("fr", folder)
        sign_folder(folder, OTHER)
        with pytest.raises(SignatureInvalid, match="not signed by any"):
            store.put_dir("fr", folder)
        sign_folder(another, KEY)
        (folder / "model.sig").write_bytes((another / "model.sig").read_bytes())
        with pytest.raises(SignatureInvalid, match="is not the file that was signed"):
            store.put_dir("fr", folder)
        assert store.list() == [] and num_left(store) == 0
        sign_folder(folder, KEY, provenance={"seed": 3})
        version = store.put_dir("fr", folder)
        assert version.signature is not None and version.signature["status"] == "verified"
        store.check_promotion(_ref(store, "fr"))
    with closing(open_store(store_dir)) as again:
        assert again.get("fr").signature == version.signature


def test_a_warning_lets_pass_and_keeps_why(
    store_dir: Path, keys: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(open_store(store_dir)) as store:
        store.signatures = gate(keys, is_required=False)
        unsigned = store.put_dir("fr", folder)
        assert unsigned.signature == {
            "status": "unsigned",
            "reason": "the upload is not signed: it has no model.sig",
        }
        sign_folder(folder, OTHER)
        wrong = store.put_dir("fr", folder)
        assert wrong.signature is not None and wrong.signature["status"] == "invalid"
        store.check_promotion(_ref(store, "fr"))
    assert sum("accepted although" in record.message for record in caplog.records) == 2


def test_what_was_published_unchecked_is_not_served_once_signatures_are_required(
    store_dir: Path, keys: Path, folder: Path
) -> None:
    with closing(open_store(store_dir)) as store:
        assert store.put_dir("plain", folder).signature is None
        sign_folder(folder, KEY)
        assert store.put_dir("fr", folder).signature == {"status": "not_checked"}
        store.check_promotion(_ref(store, "fr"))
        store.signatures = gate(keys)
        for name in ("plain", "fr"):
            with pytest.raises(SignatureInvalid, match="may not be served"):
                store.check_promotion(_ref(store, name))


def test_a_key_that_is_removed_counts_for_a_second_at_most(store_dir: Path, keys: Path, folder: Path) -> None:
    clock = Clock()
    sign_folder(folder, KEY)
    with closing(open_store(store_dir)) as store:
        store.signatures = gate(keys, clock=clock)
        store.put_dir("fr", folder)
        (keys / "key.pem").unlink()
        clock.now = 0.9
        store.check_promotion(_ref(store, "fr"))
        clock.now = 1.0
        with pytest.raises(SignatureInvalid, match="not signed by any of the 0 keys"):
            store.check_promotion(_ref(store, "fr"))
        trust(keys, key=KEY)
        clock.now = 2.0
        store.check_promotion(_ref(store, "fr"))
        # a folder that cannot be read trusts nobody
        (keys / "key.pem").write_bytes(b"half a k")
        clock.now = 3.0
        with pytest.raises(StorageFailed, match="cannot be read"):
            store.check_promotion(_ref(store, "fr"))


def test_a_version_whose_kept_signature_was_altered_is_not_served(
    store_dir: Path, tmp_path: Path, keys: Path, folder: Path
) -> None:
    another = write_folder(tmp_path / "another", lora_config(), lora_tensors(seed=2))
    checks = gate(keys)
    with closing(open_store(store_dir)) as store:
        store.signatures = checks
        for name, each in (("fr", folder), ("de", another)):
            sign_folder(each, KEY)
            store.put_dir(name, each)
        good, other = store.get("fr"), store.get("de")
    assert good.signature is not None and other.signature is not None
    checks.check_promotion(good)
    text = str(good.signature["bundle"])
    alterations: tuple[dict[str, Json], ...] = (
        {"bundle": other.signature["bundle"]},
        {"files_digest": other.signature["files_digest"]},
        {"bundle": text.replace('"sig":"', '"sig":"AAAA')},
        {"bundle": ""},
        {"bundle": None},
        {"status": "invalid"},
    )
    for altered in alterations:
        with pytest.raises(SignatureInvalid, match="may not be served"):
            checks.check_promotion(replace(good, signature=good.signature | altered))
    with pytest.raises(SignatureInvalid):
        checks.check_promotion(replace(good, signature=None))


def _ref(store: AdapterStore, name: str) -> AdapterRef:
    ref = store.resolve(name)
    assert ref is not None
    return ref
