"""A13 to A17: hostile uploads are refused in time and bounds, and leave nothing behind."""

import gzip
import io
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.api_guard.whole_api import (
    CONFIG_BYTES,
    LIMITS,
    WholeApi,
    file_part,
    form,
    good_parts,
    name_part,
    part,
    upload_head,
    whole_api,
)
from tests.api_guard.wire import error_of, peak_rss, read_all, reset_peak_rss, send_until_answered, status_of

MB = 1 << 20
WEIGHTS = "adapter_model.safetensors"


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../x", b"\0" * MB)
    return buffer.getvalue()


NAMES = [
    *("..", ".", "", "/etc", "%2e%2e%2f", "..\\", "a/../b", "x" * 129, "x" * 10_000, "ａ", "a\0b", "😀", "-a"),
    *("x\n", "x.", "x ", " x", "a,b", "base-model", "base-model:x", "BASE-MODEL", "a@1", "\u202ea"),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_could_mean_something_else_is_refused(name: str, api: WholeApi) -> None:
    answer = api.post_raw(form(name_part(name), *good_parts()))
    assert status_of(answer) == 400
    assert error_of(answer)["param"] == "name"
    assert api.http.get("/v1/adapters").json()["data"] == []


def test_names_that_differ_only_in_case_are_one(api: WholeApi) -> None:
    assert api.upload("Foo").status_code == 201
    assert api.upload("foo").status_code == 409


GOOD = [name_part("poet"), *good_parts()]
FORMS: dict[str, tuple[bytes, int]] = {
    "no name": (form(*good_parts()), 400),
    "two names": (form(name_part("a"), name_part("b"), *good_parts()), 400),
    "name that is not UTF-8": (form(name_part(b"\xff"), *good_parts()), 400),
    "no files": (form(name_part("poet")), 400),
    "one file": (form(name_part("poet"), file_part(WEIGHTS, b"x")), 400),
    "same file twice": (form(*GOOD, file_part(WEIGHTS, b"x")), 400),
    "file without a name": (form(name_part("poet"), part(b"x", 'name="files"')), 400),
    "empty file name": (form(name_part("poet"), file_part("", b"x")), 400),
    "file name with a path": (form(name_part("poet"), file_part("../../x", b"x")), 400),
    "absolute file name": (form(name_part("poet"), file_part("/etc/passwd", b"x")), 400),
    "file name with a path to a good one": (form(name_part("poet"), file_part(f"a/{WEIGHTS}", b"x")), 400),
    "file name with NUL": (form(name_part("poet"), file_part(f"{WEIGHTS}\0", b"x")), 400),
    "zip": (form(name_part("poet"), file_part("adapter.zip", zip_bytes())), 400),
    "zip in disguise": (form(*GOOD[:2], file_part(WEIGHTS, zip_bytes())), 400),
    "gzip in disguise": (form(*GOOD[:2], file_part(WEIGHTS, gzip.compress(b"\0" * MB))), 400),
    "pickle": (form(name_part("poet"), file_part("adapter_model.bin", b"\x80\x04.")), 400),
    "unknown field": (form(part(b"/etc", 'name="lora_path"'), *GOOD), 400),
    "token field": (form(part(b"hf_x", 'name="api_token"'), *GOOD), 400),
    "file as field": (form(part(b"x", f'name="weights"; filename="{WEIGHTS}"'), *GOOD), 400),
    "300 parts": (form(*GOOD, *(file_part(f"experts/e{i}/{WEIGHTS}", b"") for i in range(300))), 400),
    "no disposition": (b"--b0undary\r\nContent-Type: text/plain\r\n\r\nx\r\n--b0undary--\r\n", 400),
    "two dispositions": (form(part(b"poet", 'name="name"', "Content-Disposition: form-data; name=x"), *GOOD[1:]), 400),
    "100,000 part headers": (form(part(b"poet", 'name="name"', *["A: b"] * 100_000), *GOOD[1:]), 400),
    "long head of a part": (form(part(b"poet", 'name="name"', *["A: " + "b" * 3000] * 3), *GOOD[1:]), 400),
    "long part header": (form(part(b"poet", 'name="name"', "A: " + "b" * 9000), *GOOD[1:]), 400),
    "no boundary in the body": (b"x" * 1000, 400),
    "cut before the end": (b"".join(GOOD), 400),
    "empty body": (b"", 400),
    "preamble without end": (b"\r\n" * 50_000, 400),
}


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_a_bad_form_is_refused(case: str, api: WholeApi) -> None:
    body, status = FORMS[case]
    answer = api.post_raw(body)
    assert status_of(answer) == status
    error = error_of(answer)
    assert error["type"] == "invalid_request_error" and str(api.store_dir) not in str(error["message"])
    assert api.http.get("/v1/adapters").json()["data"] == []


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 415),
        ("application/zip", 415),
        ("multipart/mixed; boundary=x", 415),
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400),
        ("multipart/form-data; boundary=" + "x" * 71, 400),
        ('multipart/form-data; boundary="a\\"b"', 400),
        ("multipart/form-data; " + 'a="' * 5000, 400),
    ],
)
def test_only_forms_with_a_boundary_are_read(content_type: str, status: int, api: WholeApi) -> None:
    answer = api.http.post("/v1/adapters", content=b"x", headers={"content-type": content_type})
    assert answer.status_code == status
    assert api.http.post("/v1/adapters", content=b"x").status_code == 415


def test_a_compressed_upload_is_refused_unread(api: WholeApi) -> None:
    body = gzip.compress(form(*GOOD))
    answer = api.post_raw(body, f"Content-Length: {len(body)}", "Content-Encoding: gzip")
    assert status_of(answer) == 415


@pytest.mark.parametrize(
    "head",
    [
        part(b"", 'name="files"')[:-2],
        part(b"", 'name="name"')[:-2],
        b'--b0undary\r\nContent-Disposition: form-data; name="name"\r\nX: ',
        b"--b0undary\r\n",
    ],
    ids=["1 GB part without a file name", "1 GB name", "1 GB part header", "1 GB part header name"],
)
def test_a_gigabyte_of_the_wrong_kind_is_refused_at_its_first_bytes(head: bytes, api: WholeApi) -> None:
    before = reset_peak_rss()
    started_s = time.monotonic()
    with api.server.connect() as peer:
        peer.sendall(upload_head("Transfer-Encoding: chunked"))
        peer.sendall(b"%x\r\n%b\r\n" % (len(head), head))
        block = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        send_until_answered(peer, block, 1000 * MB)
        answer = read_all(peer)
    assert status_of(answer) == 400
    assert time.monotonic() - started_s < 60
    assert peak_rss() - before < 16 * MB


def test_an_upload_past_the_limit_is_refused_while_it_streams(api: WholeApi) -> None:
    before = reset_peak_rss()
    head = name_part("poet") + file_part(WEIGHTS, b"")[:-2]
    with api.server.connect() as peer:
        peer.sendall(upload_head("Transfer-Encoding: chunked") + b"%x\r\n%b\r\n" % (len(head), head))
        send_until_answered(peer, b"10000\r\n" + b"x" * 65536 + b"\r\n", 4 * LIMITS.max_upload_bytes)
        assert status_of(read_all(peer)) == 413
    assert peak_rss() - before < 16 * MB
    declared = api.post_raw(b"", f"Content-Length: {LIMITS.max_upload_bytes + 1}")
    assert status_of(declared) == 413
    wait_for_empty_staging(api)


def test_a_bad_name_is_refused_before_the_weights_have_come(api: WholeApi) -> None:
    head = name_part("../x") + file_part(WEIGHTS, b"")[:-2]
    with api.server.connect() as peer:
        peer.sendall(upload_head(f"Content-Length: {LIMITS.max_upload_bytes}") + head)
        send_until_answered(peer, b"x" * 65536, 4 * MB)
        answer = read_all(peer)
    assert status_of(answer) == 400 and error_of(answer)["param"] == "name"


def test_lengths_that_lie_are_refused_and_free_everything(api: WholeApi) -> None:
    body = form(*GOOD)
    short = api.post_raw(body, f"Content-Length: {len(body) - 100}")
    assert status_of(short) == 400
    wait_for_empty_staging(api)
    assert api.http.get("/v1/adapters").json()["data"] == []


def test_a_length_that_never_comes_ends_in_time_and_frees_everything(model_dir: Path, tmp_path: Path) -> None:
    body, hasty = form(*GOOD), replace(LIMITS, body_timeout_s=0.5, min_upload_bytes_per_s=1 << 20)
    with whole_api(model_dir, tmp_path / "store", limits=hasty) as api:
        assert status_of(api.post_raw(body, f"Content-Length: {len(body) + 100}")) == 408
        wait_for_empty_staging(api)
        assert api.store.list() == []


def test_an_upload_in_chunks_of_one_byte_arrives_whole(api: WholeApi) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in form(*GOOD))
    answer = api.post_raw(chunks + b"0\r\n\r\n", "Transfer-Encoding: chunked")
    assert status_of(answer) == 201


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9, 0.999])
def test_a_client_that_leaves_during_an_upload_leaves_nothing(share: float, api: WholeApi) -> None:
    body = form(*GOOD)
    with api.server.connect() as peer:
        peer.sendall(upload_head(f"Content-Length: {len(body)}") + body[: int(len(body) * share)])
        time.sleep(0.05)
    wait_for_empty_staging(api)
    assert api.http.get("/v1/adapters").json()["data"] == []
    assert api.upload("poet").status_code == 201


def test_more_uploads_than_places_are_told_to_come_again_and_other_routes_stay_quick(api: WholeApi) -> None:
    config = file_part("adapter_config.json", CONFIG_BYTES)
    peers = [api.server.connect() for _ in range(16)]
    try:
        for peer in peers:
            # more than a megabyte: what is smaller waits in memory, and is no upload yet
            peer.sendall(upload_head("Content-Length: 5000000") + name_part("slow") + config)
        deadline_s = time.monotonic() + 120
        while api.num_staged < 16 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        refused = api.upload("poet")
        assert refused.status_code == 429 and "retry-after" in refused.headers
        # the bound on sequences is not the one that was met
        assert "x-ratelimit-limit-requests" not in refused.headers
        started_s = time.monotonic()
        assert api.http.get("/v1/adapters").status_code == 200
        assert time.monotonic() - started_s < 60
    finally:
        for peer in peers:
            peer.close()
    wait_for_empty_staging(api)
    assert api.upload("poet").status_code == 201


def test_uploads_of_one_name_at_once_are_all_whole_versions(api: WholeApi) -> None:
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda seed=seed: answers.append(api.upload("poet", seed=seed).status_code))
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [201] * 8
    assert len({version.digest for version in api.store.versions("poet")}) == 8


def wait_for_empty_staging(api: WholeApi) -> None:
    deadline_s = time.monotonic() + 120
    while api.num_staged and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert api.num_staged == 0
