"""The tree of errors that the store raises: each class fixes the HTTP status, OpenAI type and default code of its kind.

Owns no HTTP: the API turns `body()` and `http_status` into an answer, the CLI prints `message`. Invariant: a message
names what was wrong, the value, the limit and the way out, and no path, address or stack trace.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class StoreError(Exception):
    """Anything a caller of the store can act on. `param` names the field, file or tensor that is wrong."""

    http_status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "store_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return OpenAI's error object, all four keys."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class AdapterRefused(StoreError):
    """400: the upload itself is wrong; the subclasses say how."""

    http_status = 400
    type = "invalid_request_error"
    default_code = "invalid_adapter"


class CorruptUpload(AdapterRefused):
    """400 `corrupt_adapter`: the bytes are not what their format demands."""

    default_code = "corrupt_adapter"


class UnsupportedAdapter(AdapterRefused):
    """400 `unsupported_adapter`: well formed, but it means something that is not served (or not on this base)."""

    default_code = "unsupported_adapter"


class UnsupportedFormat(AdapterRefused):
    """400 `unsupported_format`: a file kind that the declared format does not have, or that is never opened."""

    default_code = "unsupported_format"


class UnsafePickle(UnsupportedFormat):
    """400 `unsafe_pickle`: a pickle that names code, breaks a limit or holds more than tensors and plain values."""

    default_code = "unsafe_pickle"


class UnknownField(UnsupportedAdapter):
    """400 `unknown_field`: a config holds a key that nothing here knows, so nobody can say what it changes."""

    default_code = "unknown_field"


class NoTarget(UnsupportedAdapter):
    """400 `no_target`: the config's targets name nothing that this base has."""

    default_code = "no_target"


class MissingLayers(CorruptUpload):
    """400 `missing_layers`: the config names layers or modules that the file has no tensors for."""

    default_code = "missing_layers"


class LayerReplication(UnsupportedAdapter):
    """400 `layer_replication`: trained on a base whose layers were repeated, which is another model."""

    default_code = "layer_replication"


class UnconvertedInit(UnsupportedAdapter):
    """400 `unconverted_init`: saved without undoing what its initialisation had done to the base."""

    default_code = "unconverted_init"


class SwappedFactors(UnsupportedAdapter):
    """400 `swapped_factors`: A has B's shape and B has A's, or each is transposed."""

    default_code = "swapped_factors"


class LimitExceeded(AdapterRefused):
    """400 `limit_exceeded`: too many experts, ranks or selected channels to serve."""

    default_code = "limit_exceeded"


class InvalidGate(AdapterRefused):
    """400 `invalid_gate`: a mixture's top_k or temperature cannot weigh its experts."""

    default_code = "invalid_gate"


class InvalidIndex(AdapterRefused):
    """400 `invalid_index`: positions that are not strictly increasing or lie outside their dimension."""

    default_code = "invalid_index"


class WrongBase(AdapterRefused):
    """400 `wrong_base`: made from other weights than the served base's, or those are not at hand."""

    default_code = "wrong_base"


class AmbiguousOrder(AdapterRefused):
    """400 `ambiguous_order`: a permuted checkpoint whose order cannot be told from its untrained rows."""

    default_code = "ambiguous_order"


class TrainedElsewhere(AdapterRefused):
    """400 `trained_elsewhere`: weights were trained that this kind of adapter leaves alone."""

    default_code = "trained_elsewhere"


class InvalidOption(AdapterRefused):
    """400 `invalid_option`: an upload's option is missing, unknown or has a wrong value; `param` names it."""

    default_code = "invalid_option"


class NonFiniteValues(AdapterRefused):
    """400 `non_finite`: NaN or infinity, in the file or after the cast to the serving dtype."""

    default_code = "non_finite"


class ValueOverflow(NonFiniteValues):
    """400 `overflow`: finite values that leave the serving dtype's range, once their scaling is folded in."""

    default_code = "overflow"


class AdapterWithoutEffect(AdapterRefused):
    """400 `adapter_no_effect`: every op of it does nothing: serving it would be serving the base."""

    default_code = "adapter_no_effect"


class InvalidName(AdapterRefused):
    """400 `invalid_value`: a name or alias that cannot be given."""

    default_code = "invalid_value"


class UploadTooLarge(AdapterRefused):
    """413 `file_too_large`: more bytes than the limit."""

    http_status = 413
    default_code = "file_too_large"


class NameTaken(AdapterRefused):
    """409 `adapter_exists`: the name collides with another adapter's."""

    http_status = 409
    default_code = "adapter_exists"


class AdapterNotFound(AdapterRefused):
    """404 `model_not_found`: no adapter of this base has that name, version or alias."""

    http_status = 404
    default_code = "model_not_found"


class StoreFull(AdapterRefused):
    """507 `quota_exceeded`: the disk or its quota is full; nothing was stored."""

    http_status = 507
    default_code = "quota_exceeded"


class OwnerFull(AdapterRefused):
    """507 `quota_exceeded`: this owner may not have more adapters, or more bytes of them."""

    http_status = 507
    default_code = "quota_exceeded"


class StorageFailed(StoreError):
    """500 `storage_error`: the disk failed; nothing was stored, the upload may be sent again."""

    default_code = "storage_error"


class StoreAway(StorageFailed):
    """503 `store_unavailable`: the object store does not answer; adapters that are here are served. Has Retry-After."""

    http_status = 503
    default_code = "store_unavailable"

    def __init__(self, message: str = "", *, retry_after_s: int = 2) -> None:
        super().__init__(message or "the object store of the adapters cannot be reached; try again later")
        self.retry_after_s = retry_after_s


class ConversionFailed(StoreError):
    """500 `conversion_failed`: the converter process died or ran out of time; nothing was stored."""

    default_code = "conversion_failed"


class ProbeNotFinite(AdapterRefused):
    """400 `probe_not_finite`: run on the base before it was published, the adapter gave NaN or infinity."""

    default_code = "probe_not_finite"


class ProbeDisagrees(AdapterRefused):
    """400 `probe_disagrees`: as served it acts otherwise than its source's own formula says."""

    default_code = "probe_disagrees"


class ProbeFailed(StoreError):
    """500 `probe_failed`: the adapter could not be run, or its source not be computed; nothing was stored."""

    default_code = "probe_failed"


class AdapterCorrupt(StoreError):
    """503 `adapter_corrupt`: the stored bytes no longer match their digest; they are never served."""

    http_status = 503
    default_code = "adapter_corrupt"


class RegistryUnavailable(StoreError):
    """503 `registry_unavailable`: names cannot change now, known adapters are served; carries Retry-After."""

    http_status = 503
    default_code = "registry_unavailable"

    def __init__(self, message: str = "", *, retry_after_s: int = 2) -> None:
        super().__init__(
            message
            or "the registry that all replicas share cannot be reached; known adapters are served, change names later"
        )
        self.retry_after_s = retry_after_s


# what a converter process may answer with; anything else it says is a ConversionFailed
REFUSALS: dict[str, type[AdapterRefused]] = {
    kind.default_code: kind
    for kind in (
        CorruptUpload,
        UnsupportedAdapter,
        UnsupportedFormat,
        UnsafePickle,
        UnknownField,
        NoTarget,
        MissingLayers,
        LayerReplication,
        UnconvertedInit,
        SwappedFactors,
        LimitExceeded,
        InvalidGate,
        InvalidIndex,
        WrongBase,
        AmbiguousOrder,
        TrainedElsewhere,
        InvalidOption,
        NonFiniteValues,
        ValueOverflow,
        AdapterWithoutEffect,
    )
}


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn OSError of the disk into StoreFull or StorageFailed."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull("the adapter store's disk is full; delete adapters or ask the operator") from error
        raise StorageFailed("the adapter store's disk failed; nothing was stored, try again later") from error
