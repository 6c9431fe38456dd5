"""The rules of the wire hold by themselves, whatever the parser below already refuses."""

import pytest

from serve.api.request_head import check_head

HOST = (b"host", b"t")


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        (b"GET", [], 400),
        (b"GET", [HOST, HOST], 400),
        (b"GET", [(b"host", b"t/x?")], 400),
        (b"POST", [HOST, (b"content-length", b"1"), (b"transfer-encoding", b"chunked")], 400),
        (b"POST", [HOST, (b"content-length", b"1"), (b"content-length", b"1")], 400),
        (b"POST", [HOST, (b"transfer-encoding", b"gzip, chunked")], 400),
        (b"GET", [HOST, (b"upgrade", b"WebSocket, h2c")], 400),
        (b"TRACE", [HOST], 405),
        (b"CONNECT", [HOST], 405),
    ],
)
def test_a_head_with_two_meanings_is_refused(method: bytes, headers: list[tuple[bytes, bytes]], status: int) -> None:
    error = check_head(method, "1.1", headers)
    assert error is not None and error.http_status == status


def test_ordinary_heads_pass() -> None:
    assert check_head(b"GET", "1.0", []) is None
    assert check_head(b"POST", "1.1", [(b"host", b"[::1]:80"), (b"transfer-encoding", b"Chunked ")]) is None
    assert check_head(b"GET", "1.1", [(b"host", b"a-b.example:8000"), (b"upgrade", b"h2c")]) is None
