"""The tree of errors that reach a client: each class fixes the HTTP status, OpenAI type and code of its kind.

Owns the mapping class -> (status, type, code) and the four-key JSON body; the text is written where it is raised.
Invariant: a message names what was wrong, the value, the limit and the way out, and no path, address or stack trace.
"""

from collections.abc import Mapping
from typing import ClassVar


class ServeError(Exception):
    """Anything a caller can act on. Subclasses fix `http_status`, `type` and the default `code`."""

    http_status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = "engine_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s

    def body(self) -> Mapping[str, object]:
        """Return OpenAI's error object, all four keys."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(ServeError):
    """400: the request itself is wrong."""

    http_status = 400
    type = "invalid_request_error"
    default_code: ClassVar[str | None] = None


class InvalidValue(InvalidRequest):
    """400 `invalid_value`: one field's value is out of its range."""

    default_code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    """400 `unsupported_parameter`: the field has a meaning that this server refuses."""

    default_code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """400 `context_length_exceeded`: prompt plus output do not fit."""

    default_code = "context_length_exceeded"


class InvalidApiKey(InvalidRequest):
    """401: no key, or not one of ours."""

    http_status = 401
    default_code = "invalid_api_key"


class AdapterForbidden(ServeError):
    """403 `adapter_forbidden`: this caller, or this server's operator, does not allow it."""

    http_status = 403
    type = "permission_error"
    default_code = "adapter_forbidden"


class PermissionDenied(ServeError):
    """403 `insufficient_scope`: a valid key that does not open this route."""

    http_status = 403
    type = "permission_error"
    default_code = "insufficient_scope"


class ModelNotFound(InvalidRequest):
    """404 `model_not_found`: neither the base nor an adapter has this name."""

    http_status = 404
    default_code = "model_not_found"


class NotFound(InvalidRequest):
    """404: no such route or object."""

    http_status = 404
    default_code = "not_found"


class MethodNotAllowed(InvalidRequest):
    """405: the route exists, the method does not."""

    http_status = 405
    default_code = "method_not_allowed"


class Conflict(InvalidRequest):
    """409: the named thing is in a state that forbids this; clients must not retry by themselves."""

    http_status = 409
    default_code = "conflict"


class RequestTimeout(InvalidRequest):
    """408: the client sent too slowly."""

    http_status = 408
    default_code = "request_timeout"


class BodyTooLarge(InvalidRequest):
    """413 `file_too_large`: more bytes than the limit."""

    http_status = 413
    default_code = "file_too_large"


class UnsupportedMediaType(InvalidRequest):
    """415: a content type or encoding that is not read here."""

    http_status = 415
    default_code = "unsupported_media_type"


class QuotaExceeded(InvalidRequest):
    """507 `quota_exceeded`: no room left to store this."""

    http_status = 507
    default_code = "quota_exceeded"


class RateLimited(ServeError):
    """429: the caller's share is used up, or the queue is full; retry later."""

    http_status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class QueueFull(RateLimited):
    """429 `queue_full`: as many sequences wait as the server admits."""

    default_code = "queue_full"


class EngineFailed(ServeError):
    """500 `engine_error`: the engine failed this request; it may be sent again."""


class Unavailable(ServeError):
    """503 `overloaded`: not now; carries Retry-After."""

    http_status = 503
    default_code = "overloaded"


class EngineLoading(Unavailable):
    """503 `model_loading`: the engine starts, or starts again."""

    default_code = "model_loading"


class DeadlineExceeded(ServeError):
    """504 `deadline_exceeded`: the request did not end within the time that it allowed itself."""

    http_status = 504
    default_code = "deadline_exceeded"


class StartError(Exception):
    """A bad start: one clear line for the operator, exit status 2."""
