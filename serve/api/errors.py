"""The one table that turns exceptions into HTTP answers, and the wall behind which nothing unexpected leaks.

Owns status, headers and the four-key body of every refusal; texts are written where the errors are raised. Invariant:
no answer holds a stack trace, a path or an address.
"""

import logging
from collections.abc import Mapping, Sequence

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from adapters_store.errors import StoreError
from serve.api.disconnect import ClientGone
from serve.api.json_body import show
from serve.errors import EngineFailed, InvalidRequest, MethodNotAllowed, NotFound, QueueFull, ServeError

logger = logging.getLogger("chorale.api")

ErrorBody = Mapping[str, object]
_DEFAULT_RETRY_AFTER_S = 1
# nobody reads it: proxies log this status for a client that left
_CLIENT_GONE = 499

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERROR_STATUSES = (400, 401, 403, 404, 405, 408, 409, 411, 413, 415, 422, 429, 431, 500, 503, 507)


def error_responses() -> dict[int | str, dict[str, object]]:
    """Return FastAPI's `responses=` table: every status that any route may answer with an error body."""
    content = {"application/json": {"schema": _ERROR_SCHEMA}}
    return {status: {"description": "Error", "content": content} for status in _ERROR_STATUSES}


def error_body(error: Exception) -> ErrorBody:
    """Return the JSON body of any exception; what is not ours becomes a text that says nothing."""
    if isinstance(error, ServeError):
        return error.body()
    if isinstance(error, StoreError):
        kind = _error_type(error.http_status)
        return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
    return EngineFailed("internal error; the request may be sent again").body()


def error_response(error: Exception) -> Response:
    """Return the HTTP answer to any exception."""
    status = error.http_status if isinstance(error, ServeError | StoreError) else 500
    headers: dict[str, str] = {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 405:
        # of the whole server; where a route refuses, `install_errors` says what that route takes
        headers["allow"] = "DELETE, GET, POST"
    if status == 409:
        # OpenAI's clients retry a 409 by themselves, and ours never heals
        headers["x-should-retry"] = "false"
    if status in (429, 503):
        retry_after_s = getattr(error, "retry_after_s", None) or _DEFAULT_RETRY_AFTER_S
        headers["retry-after"] = str(retry_after_s)
    if status == 429:
        headers["x-ratelimit-remaining-requests"] = "0"
        headers["x-ratelimit-reset-requests"] = f"{headers['retry-after']}s"
    body = msgspec.json.encode(error_body(error))
    return Response(body, status, headers, media_type="application/json")


def install_errors(app: FastAPI, routes: Sequence[BaseRoute], *, max_in_flight: int) -> None:
    """Answer our errors, FastAPI's and Starlette's in one shape; a 405 names what `routes` take, a 429 the bound."""

    async def answer(request: Request, error: Exception) -> Response:
        response = error_response(error)
        if isinstance(error, QueueFull):
            response.headers["x-ratelimit-limit-requests"] = str(max_in_flight)
        return response

    async def answer_validation(request: Request, error: Exception) -> Response:
        first = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": (), "msg": "bad request"}
        path = ".".join(str(part) for part in first["loc"][1:]) or None
        message = str(first["msg"])
        reason = f"{message[:1].lower()}{message[1:]}"
        given = f", got {show(first['input'])}" if "input" in first else ""
        return error_response(InvalidRequest(f"{path or 'request'}: {reason}{given}", param=path))

    async def answer_http(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        response = error_response(_HTTP_ERRORS.get(status, InvalidRequest)(_HTTP_TEXTS.get(status, "bad request")))
        if status == 405:
            response.headers["allow"] = _allowed_methods(routes, request.scope)
        return response

    async def end_quietly(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_GONE)

    app.add_exception_handler(ClientGone, end_quietly)
    app.add_exception_handler(ServeError, answer)
    app.add_exception_handler(StoreError, answer)
    app.add_exception_handler(RequestValidationError, answer_validation)
    app.add_exception_handler(HTTPException, answer_http)


def _allowed_methods(routes: Sequence[BaseRoute], scope: Scope) -> str:
    """Return the methods of all routes that match the path: Starlette names those of the first one only."""
    methods: set[str] = set()
    for route in routes:
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


_HTTP_ERRORS: dict[int, type[ServeError]] = {404: NotFound, 405: MethodNotAllowed}
_HTTP_TEXTS = {404: "no such route", 405: "this route does not take this method"}


def _error_type(status: int) -> str:
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 or status == 507 else "server_error"
