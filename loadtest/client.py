"""One request over HTTP, streamed, with the moment of each piece; many at once over one event loop.

Owns the connections. Measures with the event loop's own clock, so that a test may put another one in. Invariant:
`send` never raises for what the server or the network does: it ends in the sample's `failure`.

Failures: `http_429` and so on (a status but 200), `connect` (no connection, or it broke before an answer began),
`timeout`, `cut` (the stream ended early or broke), `error` (the server said so in mid-stream), `short` (fewer tokens
than asked although end-of-text was to be ignored), `malformed` (an answer that is no event stream).
"""

import asyncio
from types import TracebackType

import aiohttp
import orjson

from loadtest.samples import Sample
from loadtest.sse import DONE, EventReader, Piece, read_piece

_DETAIL_CHARS = 300
# a stream is read in pieces as they come; this only bounds one piece
_READ_BYTES = 1 << 16


class Client:
    """Sends requests to one server; use as an async context."""

    def __init__(
        self,
        url: str,
        *,
        keys: tuple[str, ...] = (),
        timeout_s: float = 600.0,
        connector: aiohttp.BaseConnector | None = None,
    ) -> None:
        """Prepare; `keys` are API keys, one per tenant, dealt out in turn; `connector` is for servers off TCP."""
        self.url = url.rstrip("/")
        self._keys = keys
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, connect=None)
        self._connector = connector
        self._session: aiohttp.ClientSession | None = None
        self._start_s = 0.0

    async def __aenter__(self) -> "Client":
        """Open the session; sockets are opened by the requests."""
        # no limit: an open loop that waits for a connection would be a closed one
        connector = self._connector or aiohttp.TCPConnector(limit=0, ttl_dns_cache=3600)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, read_bufsize=_READ_BYTES)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every connection."""
        assert self._session is not None, "the client was never entered"
        await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """Return the open session, for calls that are not measured."""
        assert self._session is not None, "the client is used as an async context"
        return self._session

    def start_clock(self) -> float:
        """Make now the moment 0 of every sample to come; return it by the event loop's clock."""
        self._start_s = asyncio.get_running_loop().time()
        return self._start_s

    def now_s(self) -> float:
        """Return the seconds since the clock's start."""
        return asyncio.get_running_loop().time() - self._start_s

    def headers(self, tenant: int | None = None) -> dict[str, str]:
        """Return the headers that say who asks."""
        if not self._keys:
            return {}
        return {"authorization": f"Bearer {self._keys[(tenant or 0) % len(self._keys)]}"}

    async def send(self, path: str, body: bytes, sample: Sample, *, must_be_full: bool = False) -> None:
        """Send one request and fill `sample` in; with `must_be_full`, fewer tokens than asked are a failure."""
        headers = {"content-type": "application/json", **self.headers(sample.tenant)}
        sample.sent_s = self.now_s()
        try:
            async with self.session.post(self.url + path, data=body, headers=headers) as response:
                sample.status = response.status
                if response.status != 200:
                    detail = (await response.read()).decode(errors="replace")
                    self._fail(sample, f"http_{response.status}", detail)
                    return
                await self._read(response, sample)
        except TimeoutError:
            self._fail(sample, "timeout", f"no complete answer within {self._timeout.total} s")
        except (aiohttp.ClientError, OSError) as error:
            self._fail(sample, "connect" if sample.status is None else "cut", f"{type(error).__name__}: {error}")
        sample.end_s = self.now_s()
        if must_be_full and sample.is_ok and sample.num_output_tokens < sample.output_tokens:
            self._fail(sample, "short", f"{sample.num_output_tokens} tokens of {sample.output_tokens}")

    async def _read(self, response: aiohttp.ClientResponse, sample: Sample) -> None:
        reader = EventReader()
        texts: list[str] = []
        is_done = False
        # read to the very end, beyond the last event: a connection that was not read out cannot be used again
        while sample.is_ok and (chunk := await response.content.readany()):
            now_s = self.now_s()
            for data in reader.feed(chunk):
                if data == DONE:
                    is_done = True
                elif not is_done and sample.is_ok:
                    self._note(sample, read_piece(data), now_s, texts)
        sample.text = "".join(texts)
        if not sample.is_counted:
            sample.num_output_tokens = len(sample.token_at_s)
        if sample.is_ok and not is_done and sample.finish_reason is None:
            self._fail(sample, "cut", "the stream ended before the answer did")
        elif sample.is_ok and not sample.token_at_s and sample.finish_reason is None:
            self._fail(sample, "malformed", "a stream without a single token")

    def _note(self, sample: Sample, piece: Piece, now_s: float, texts: list[str]) -> None:
        if piece.error is not None:
            kind = "malformed" if piece.error.startswith("not an event") else "error"
            self._fail(sample, kind, piece.error)
            return
        # an answer whose tokens show no text has come when its end has
        is_silent_end = piece.finish_reason is not None and not sample.token_at_s
        if piece.has_token or is_silent_end:
            sample.token_at_s.append(now_s)
            texts.append(piece.text)
            sample.token_ids.extend(piece.token_ids)
        sample.finish_reason = piece.finish_reason or sample.finish_reason
        sample.fingerprint = piece.fingerprint or sample.fingerprint
        if piece.num_output_tokens is not None:
            sample.num_output_tokens, sample.is_counted = piece.num_output_tokens, True
            sample.num_prompt_tokens = piece.num_prompt_tokens

    def _fail(self, sample: Sample, kind: str, detail: str) -> None:
        sample.failure, sample.detail = kind, detail[:_DETAIL_CHARS]
        sample.end_s = self.now_s()


def encode_body(body: dict[str, object]) -> bytes:
    """Return a request's bytes."""
    return orjson.dumps(body)
