"""A22 over HTTP: what is not signed as it must be is refused with 403, and not served when its key counts no more."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from adapters_store.signatures import OpenGate
from adapters_store.signing.gate import TrustedKeysGate
from adapters_store.signing.keys import SigningKey, public_pem
from adapters_store.signing.sign import sign_folder
from adapters_store.signing.trust import TrustFolder
from tests.api_guard.whole_api import WholeApi, adapter_files

KEY, OTHER = (SigningKey(ec.derive_private_key(number, ec.SECP256R1())) for number in (21, 22))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Return the clock of the trusted keys."""
    return Clock()


@pytest.fixture
def guarded(api: WholeApi, tmp_path: Path, clock: Clock) -> Iterator[WholeApi]:
    """Let the API require signatures of `KEY`."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "ours.pem").write_bytes(public_pem(KEY.public.key))
    api.store.signatures = TrustedKeysGate(TrustFolder(tmp_path / "keys", monotonic=clock), is_required=True)
    yield api
    api.store.signatures = OpenGate()


def signature_of(folder: Path, files: dict[str, bytes], key: SigningKey = KEY) -> bytes:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return sign_folder(folder, key).read_bytes()


def upload(api: WholeApi, files: dict[str, bytes]) -> httpx.Response:
    parts = [("files", part) for part in files.items()]
    return api.http.post("/v1/adapters", data={"name": "poet"}, files=parts)


def test_only_what_is_signed_by_a_key_that_counts_is_published(guarded: WholeApi, tmp_path: Path) -> None:
    files, others = adapter_files(1), adapter_files(2)
    good = signature_of(tmp_path / "good", files)
    refused = {
        "unsigned": files,
        "wrong key": files | {"model.sig": signature_of(tmp_path / "wrong", files, OTHER)},
        "of another adapter": files | {"model.sig": signature_of(tmp_path / "other", others)},
        "other weights": others | {"model.sig": good},
        "an extra file": files | {"tokenizer.json": b"{}", "model.sig": good},
        "half a signature": files | {"model.sig": good[: len(good) // 2]},
        "an empty signature": files | {"model.sig": b""},
    }
    for case, sent in refused.items():
        answer = upload(guarded, sent)
        error = answer.json()["error"]
        # the extra file is none that an upload may hold at all
        status = 400 if case == "an extra file" else 403
        assert answer.status_code == status, (case, error)
        if status == 403:
            assert (error["type"], error["code"]) == ("permission_error", "signature_invalid"), case
        assert guarded.store.list() == [] and guarded.num_staged == 0, case
    answer = upload(guarded, {"model.sig": good, **files})
    assert answer.status_code == 201
    signature = answer.json()["signature"]
    assert (signature["status"], signature["signer"]) == ("verified", "ours.pem") and "bundle" not in signature
    assert guarded.http.get("/v1/adapters/poet").json()["signature"] == signature


def test_a_signature_is_sent_once_and_bounded(guarded: WholeApi) -> None:
    parts = [("files", part) for part in [*adapter_files(1).items(), ("model.sig", b"{}"), ("model.sig", b"{}")]]
    twice = guarded.http.post("/v1/adapters", data={"name": "poet"}, files=parts)
    assert (twice.status_code, twice.json()["error"]["code"]) == (400, "corrupt_adapter")
    large = upload(guarded, adapter_files(1) | {"model.sig": b" " * ((1 << 20) + 1)})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "file_too_large")


def test_a_key_that_counts_no_more_ends_loading_and_serving(guarded: WholeApi, tmp_path: Path, clock: Clock) -> None:
    files = adapter_files(1)
    upload(guarded, files | {"model.sig": signature_of(tmp_path / "good", files)})
    body = {"model": "poet", "prompt": [1], "max_tokens": 1}
    composed = {"model": "base-model", "adapters": [{"name": "poet", "weight": 0.5}], "prompt": [1], "max_tokens": 1}
    assert guarded.http.post("/v1/completions", json=body).status_code == 200
    (tmp_path / "keys" / "ours.pem").write_bytes(public_pem(OTHER.public.key))
    clock.now = 1.0
    guarded.engine.loaded.clear()
    for path, sent in (
        ("/v1/completions", body),
        ("/v1/completions", composed),
        ("/v1/chat/completions", {"model": "poet", "messages": [{"role": "user", "content": "x"}]}),
        ("/v1/embeddings", {"model": "poet", "input": "x"}),
        ("/v1/adapters/poet:prefetch", None),
        ("/v1/adapters/poet:pin", None),
    ):
        answer = guarded.http.post(path, json=sent)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "signature_invalid"), path
    assert guarded.engine.loaded == []
    # the base is served, and the adapter can be looked at and deleted
    assert guarded.http.post("/v1/completions", json=body | {"model": "base-model"}).status_code == 200
    assert guarded.http.get("/v1/adapters/poet/status").status_code == 200
    assert guarded.http.delete("/v1/adapters/poet").status_code == 200
