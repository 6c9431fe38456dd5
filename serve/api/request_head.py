"""What is wrong with an HTTP request's head, decided on the parsed bytes alone.

Owns the rules of the wire (hosts, framing, methods, spelling) as pure functions; sockets and routes live elsewhere.
Invariant: a head that passes has one meaning for every reader: one host, one body length, no switch of protocol.
"""

import re
from collections.abc import Sequence

from serve.errors import InvalidRequest, MethodNotAllowed, ServeError

Headers = Sequence[tuple[bytes, bytes]]

MAX_HEADERS = 100
# a name or an address with an optional port; anything else could be read as a part of the URL
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?\Z")
_REFUSED_METHODS = frozenset({b"TRACE", b"CONNECT"})


def check_head(method: bytes, http_version: str, headers: Headers) -> ServeError | None:
    """Return what is wrong with a complete head (header names in lower case), or None."""
    if method in _REFUSED_METHODS:
        return MethodNotAllowed(f"method {method.decode('ascii')} is not served; use GET, POST or DELETE")
    return _check_host(http_version, headers) or _check_framing(headers) or _check_upgrade(headers)


def _check_host(http_version: str, headers: Headers) -> ServeError | None:
    hosts = _values(headers, b"host")
    if len(hosts) > 1:
        return InvalidRequest(f"the request has {len(hosts)} Host headers; send exactly one")
    if not hosts:
        return None if http_version == "1.0" else InvalidRequest("the request has no Host header; send exactly one")
    if not _HOST.match(hosts[0]):
        return InvalidRequest("the Host header is neither a name nor an address; send host or host:port")
    return None


def _check_framing(headers: Headers) -> ServeError | None:
    lengths = _values(headers, b"content-length")
    encodings = _values(headers, b"transfer-encoding")
    if len(lengths) > 1 or len(encodings) > 1 or (lengths and encodings):
        return InvalidRequest("the request states its body's length more than once; send one Content-Length or chunks")
    if encodings and encodings[0].strip().lower() != b"chunked":
        return InvalidRequest("the only transfer encoding read here is 'chunked'")
    return None


def _check_upgrade(headers: Headers) -> ServeError | None:
    offers = _values(headers, b"upgrade")
    if any(b"websocket" in offer.lower() for offer in offers):
        return InvalidRequest("WebSocket is not served; streams are server-sent events over plain HTTP")
    # an offer may be ignored (RFC 9110), but with a body behind it parsers disagree on where that body ends
    if offers and (_values(headers, b"content-length") or _values(headers, b"transfer-encoding")):
        return InvalidRequest("a request with a body may not offer an Upgrade (h2c); set the client to HTTP/1.1")
    return None


def _values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]
