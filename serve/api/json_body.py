"""Foreign bytes become a checked JSON object, and that object becomes a model, with errors of our own at every step.

Owns the strictness that the stock parser lacks: UTF-8 only, no duplicate keys, no non-finite numbers, no lone
surrogates, bounded nesting. Invariant: whatever the bytes, the outcome is a value or a `ServeError` of status 400 or
415.
"""

import asyncio
import json
import reprlib
from collections import Counter
from typing import NoReturn, TypeVar

from fastapi import Request

from serve.api.schemas import FieldError, ModelChoice, RequestModel
from serve.errors import InvalidRequest, InvalidValue, UnsupportedMediaType, UnsupportedParameter

MAX_DEPTH = 100
# parsing more than this takes milliseconds: not on the event loop
_THREAD_BYTES = 64 << 10
_MAX_SHOWN_CHARS = 64
_SHAPE_ERRORS = ("_type", "_parsing", "missing", "union")

Model = TypeVar("Model", bound=RequestModel)


async def read_model(request: Request, model: type[Model]) -> Model:
    """Read the request's body as `model`.

    Raises:
        InvalidRequest: the bytes are not the JSON we accept, or a field is wrong (`param` is its dotted path).
        UnsupportedParameter: a field has a meaning that this server refuses.
        UnsupportedMediaType: the body is declared as something other than plain JSON.
    """
    _check_media_type(request)
    body = await request.body()
    is_large = len(body) > _THREAD_BYTES
    read = await asyncio.to_thread(parse_model, body, model) if is_large else parse_model(body, model)
    if isinstance(read, ModelChoice):
        request.state.record.asks(read.model)
    return read


def parse_model(body: bytes, model: type[Model]) -> Model:
    """Return `body` as a validated `model`."""
    data = parse_object(body)
    for name in sorted(data.keys() & model.refused_fields):
        # an empty list asks for nothing
        if data[name] not in (None, False, []):
            raise UnsupportedParameter(f"{name!r} is not supported by this server; leave it out", param=name)
    try:
        return model.read(data)
    except FieldError as error:
        _refuse(error)


def parse_object(body: bytes) -> dict[str, object]:
    """Return `body` as a JSON object that every later step may trust to be encodable and shallow."""
    try:
        text = body.decode("utf-8")
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\u" in body:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("the body holds a lone surrogate escape (\\ud800 to \\udfff), which is no text") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: bad byte at offset {error.start}") from None
    except RecursionError:
        raise InvalidRequest(f"the body nests deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {_reason(error)[:200]}") from None
    if not isinstance(data, dict):
        raise InvalidRequest("the body must be a JSON object")
    _check_depth(data)
    return data


def show(value: object) -> str:
    """Return a foreign value as it may stand in a message: printable, on one line, short."""
    # reprlib looks at a few entries only, however large the value is
    text = ascii(value[: _MAX_SHOWN_CHARS + 1]) if isinstance(value, str) else ascii(reprlib.repr(value))[1:-1]
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


def _check_media_type(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMediaType(f"content-encoding {show(encoding)} is not read here; send the body uncompressed")
    declared = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if declared != "application/json" and not declared.endswith("+json"):
        raise UnsupportedMediaType(f"content-type {show(declared)} is not read here; send application/json")


class _NotOurJson(ValueError):
    """Valid for Python's parser, not for us; its text is ours."""


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "it begins with a byte order mark" if "BOM" in error.msg else error.msg
    return str(error) if isinstance(error, _NotOurJson) else "a number has too many digits"


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _NotOurJson(f"key {show(twice)} occurs more than once in one object")
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise _NotOurJson(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _NotOurJson(f"number {text[:32]} is too large")
    return value


def _check_depth(data: object) -> None:
    level: list[object] = [data]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for value in level:
            children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            inner.extend(child for child in children if isinstance(child, dict | list))
        if not inner:
            return
        level = inner
    raise InvalidRequest(f"the body nests deeper than {MAX_DEPTH} levels")


def _refuse(error: FieldError) -> NoReturn:
    path, reason = error.path, error.reason.removeprefix("Value error, ")
    if error.kind == "missing":
        raise InvalidRequest(f"{path!r} is required", param=path)
    if error.kind != "value_error":
        reason = f"{reason[:1].lower()}{reason[1:]}, got {show(error.value)}"
    is_shape = any(part in error.kind for part in _SHAPE_ERRORS)
    raise (InvalidRequest if is_shape else InvalidValue)(f"{path or 'body'}: {reason}", param=path or None)
