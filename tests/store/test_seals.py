"""The engine's check of signatures: what it finds beside an image, tampered with, of keys that count no more."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from adapters_store.blobs import OpenAdapter
from adapters_store.seals import Seal, Seals
from adapters_store.signatures import Facts
from adapters_store.signing.gate import TrustedKeysGate
from adapters_store.signing.keys import SigningKey, public_pem
from adapters_store.signing.sealed_images import SealedImages
from adapters_store.signing.sign import sign_folder
from adapters_store.signing.trust import TrustFolder
from adapters_store.store import AdapterStore
from adapters_store.version_errors import SignatureInvalid
from tests.store.folders import TINY, lora_config, lora_tensors, open_store, safetensors_bytes

OURS, THEIRS = (SigningKey(ec.derive_private_key(number, ec.SECP256R1())) for number in (31, 32))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Site:
    """A store that requires signatures of `OURS`, and an engine's check over its folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.clock = root, Clock()
        self.keys = root / "keys"
        self.keys.mkdir()
        (self.keys / "ours.pem").write_bytes(public_pem(OURS.public.key))
        trust = TrustFolder(self.keys, monotonic=self.clock)
        self.store: AdapterStore = open_store(root / "store", TINY)
        self.store.signatures = TrustedKeysGate(trust, is_required=True)
        self.check = SealedImages(Seals(root / "store"), trust, is_required=True)

    def publish(self, name: str, seed: int, key: SigningKey = OURS) -> str:
        """Publish a signed adapter; return its digest."""
        folder = self.root / "sources" / name / str(seed)
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(lora_config()))
        (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(lora_tensors(seed=seed)))
        sign_folder(folder, key)
        return self.store.put_dir(name, folder).digest

    def trust(self, owner: str, key: SigningKey) -> None:
        """Let a key count for one owner's adapters."""
        (self.keys / owner).mkdir(exist_ok=True)
        (self.keys / owner / "key.pem").write_bytes(public_pem(key.public.key))
        self.clock.now += 1.0

    def files(self, digest: str) -> list[Path]:
        """Return a digest's seals."""
        return sorted((self.root / "store" / "seals" / digest).glob("*.json"))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.store.close()


def image(digest: str) -> OpenAdapter:
    """Return what the check looks at."""
    return cast(OpenAdapter, SimpleNamespace(digest=digest))


def test_what_was_published_with_a_signature_may_be_loaded_and_nothing_else(site: Site) -> None:
    digest = site.publish("poet", 1)
    site.check(image(digest))
    with pytest.raises(SignatureInvalid, match="no verified signature"):
        site.check(image("0" * 64))


def test_a_key_that_counts_no_more_ends_loading_at_once(site: Site) -> None:
    digest = site.publish("poet", 1)
    site.check(image(digest))
    (site.keys / "ours.pem").write_bytes(public_pem(THEIRS.public.key))
    site.clock.now += 1.0
    with pytest.raises(SignatureInvalid, match="not signed by any of the 1 keys"):
        site.check(image(digest))


@pytest.mark.parametrize("harm", ["bundle", "files", "owner", "cut", "not json", "gone"])
def test_a_seal_that_was_tampered_with_opens_nothing(site: Site, harm: str) -> None:
    site.trust("acme", THEIRS)
    digest = site.publish("acme/poet", 1, THEIRS)
    site.check(image(digest))
    (seal,) = site.files(digest)
    said = json.loads(seal.read_text())
    if harm == "bundle":
        # a good signature, of another adapter
        other = site.publish("acme/other", 2, THEIRS)
        said["bundle"] = json.loads(site.files(other)[0].read_text())["bundle"]
    elif harm == "files":
        said["files_digest"] = "sha256:" + "0" * 64
    elif harm == "owner":
        # whose keys do not hold this one
        said["owner"] = "eve"
    text = {"cut": seal.read_text()[:-9], "not json": "\x00"}.get(harm, json.dumps(said))
    seal.unlink()
    if harm != "gone":
        seal.write_text(text)
    with pytest.raises(SignatureInvalid):
        site.check(image(digest))
    # the next use, whose signature the store checks itself, leaves it again
    ref = site.store.resolve("acme/poet")
    assert ref is not None
    site.store.check_promotion(ref)
    site.check(image(digest))


def test_one_of_two_owners_signatures_that_holds_is_enough(site: Site) -> None:
    site.trust("acme", THEIRS)
    digest = site.publish("poet", 1)
    assert site.publish("acme/same", 1, THEIRS) == digest
    assert len(site.files(digest)) == 2
    (site.keys / "ours.pem").unlink()
    site.clock.now += 1.0
    site.check(image(digest))
    (site.keys / "acme" / "key.pem").unlink()
    site.clock.now += 1.0
    with pytest.raises(SignatureInvalid):
        site.check(image(digest))


def test_with_warn_all_is_loaded_and_each_is_named_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    trust = TrustFolder(site.keys, monotonic=site.clock)
    check = SealedImages(Seals(site.root / "store"), trust, is_required=False)
    for _ in range(3):
        check(image("0" * 64))
    assert [record.message for record in caplog.records] == [
        f"adapter sha256:{'0' * 64} may not be loaded: it has no verified signature"
    ]


def test_only_verified_signatures_are_left_and_old_ones_of_nobody_go(tmp_path: Path) -> None:
    seals = Seals(tmp_path)
    a, b, c = "a" * 64, "b" * 64, "c" * 64
    facts: Facts = {"status": "verified", "bundle": "{}", "files_digest": "sha256:x"}
    others: list[Facts | None] = [None, {"status": "unsigned"}, {"status": "invalid", "bundle": "{}"}]
    for nothing in others:
        seals.keep(a, "acme", nothing)
    assert seals.of(a) == [] and not (tmp_path / "seals").exists()
    for digest in (a, b, c):
        for _ in range(2):
            seals.keep(digest, "acme", facts)
    assert seals.of(a) == [Seal("acme", "{}", "sha256:x")]
    for digest in (a, b):
        os.utime(tmp_path / "seals" / digest, times=(time.time() - 7200,) * 2)
    seals.sweep({a})
    assert [bool(seals.of(digest)) for digest in (a, b, c)] == [True, False, True]
