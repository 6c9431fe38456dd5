"""A multipart/form-data body becomes parts as it streams in; nothing is spooled or kept.

Owns the syntax and its caps (boundary, headers, number of parts); what a field means is the route's matter. Invariant:
memory is one chunk plus one part's head, whatever arrives.
"""

import re
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.errors import InvalidRequest, UnsupportedMediaType

# the fields, and config and tensors of each of 128 LoRAs with a few files of the mixture around them
MAX_PARTS = 288
MAX_PART_HEAD_BYTES = 8 << 10
# RFC 2046 section 5.1.1
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]\Z")


@dataclass(frozen=True, slots=True)
class PartStart:
    """A part begins; `filename` is None for a plain field."""

    field: str
    filename: str | None


@dataclass(frozen=True, slots=True)
class PartData:
    """Bytes of the part that began last."""

    data: bytes


@dataclass(frozen=True, slots=True)
class PartEnd:
    """The part that began last is whole."""


PartEvent = PartStart | PartData | PartEnd


def read_boundary(content_type: str) -> bytes:
    """Return the boundary that a Content-Type header names.

    Raises:
        UnsupportedMediaType: it is not multipart/form-data. InvalidRequest: the boundary is missing or malformed.
    """
    media_type, options = parse_options_header(content_type)
    if media_type != b"multipart/form-data":
        raise UnsupportedMediaType("this route reads a form of fields and files: send it as multipart/form-data")
    boundary = options.get(b"boundary", b"")
    if not _BOUNDARY.match(boundary):
        raise InvalidRequest("the Content-Type has no valid boundary; it must have 1 to 70 characters")
    return boundary


class MultipartReader:
    """Feed it the body's bytes in any pieces; it returns what they contain."""

    def __init__(self, boundary: bytes) -> None:
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )
        self._events: list[PartEvent] = []
        self._num_parts = 0
        self._num_head_bytes = 0
        self._header_name = b""
        self._header_value = b""
        self._disposition: bytes | None = None
        self._is_whole = False

    def feed(self, chunk: bytes) -> list[PartEvent]:
        """Take the next bytes.

        Raises:
            InvalidRequest: the syntax is wrong or a cap is exceeded; the reader must not be used again.
        """
        try:
            self._parser.write(chunk)
        except FormParserError:
            # its own text may quote the input
            raise InvalidRequest("the multipart body is malformed, or a part's head is too large") from None
        events, self._events = self._events, []
        return events

    def finish(self) -> None:
        """Say that the body has ended.

        Raises:
            InvalidRequest: its last boundary did not come.
        """
        if not self._is_whole:
            raise InvalidRequest("the multipart body ended before its last boundary; send it again")

    def _on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidRequest(f"the multipart body has more than {MAX_PARTS} parts")
        self._num_head_bytes = 0
        self._disposition = None

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_head(end - start)
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_head(end - start)
        self._header_value += data[start:end]

    def _count_head(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_PART_HEAD_BYTES:
            raise InvalidRequest(f"a part's head is larger than {MAX_PART_HEAD_BYTES} bytes")

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            if self._disposition is not None:
                raise InvalidRequest("a part has two Content-Disposition headers")
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise InvalidRequest("each part needs 'Content-Disposition: form-data; name=...'")
        filename = options.get(b"filename")
        self._events.append(PartStart(_text(options[b"name"]), None if filename is None else _text(filename)))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(PartData(data[start:end]))

    def _on_part_end(self) -> None:
        self._events.append(PartEnd())

    def _on_end(self) -> None:
        self._is_whole = True


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest("a part's name or file name is not UTF-8") from None
