"""The messages between the API and the engine about adapters in memory: the operator's commands, and what moved.

Owns the shapes only, as `serve.messages` does. Invariant: each of the operator's commands and each `AskReady` is
answered by exactly one `AdapterDone` or `Failed` with its `request_id`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PinAdapter:
    """The operator's: load an adapter and keep it; answered by `AdapterDone` or `Failed`, before it is loaded."""

    request_id: str
    digest: str


@dataclass(frozen=True, slots=True)
class UnpinAdapter:
    """Give `PinAdapter` back; the adapter stays until its room is needed. Answered by `AdapterDone`."""

    request_id: str
    digest: str


@dataclass(frozen=True, slots=True)
class EvictAdapter:
    """Free an adapter's memory once no running sequence holds it; answered at once by `AdapterDone` or `Failed`."""

    request_id: str
    digest: str


@dataclass(frozen=True, slots=True)
class AskReady:
    """A request's: are all of these adapters on the device? Those that are not are prefetched, at the tenant's cost.

    Answered at once by `AdapterDone`, `is_pending` when they are not, or `Failed` when they can never be served.
    """

    request_id: str
    digests: tuple[str, ...]
    # as in `Submit`
    tenant: str = ""
    tenant_weight: float = 1.0


OperatorCommand = PinAdapter | UnpinAdapter | EvictAdapter
Question = OperatorCommand | AskReady


@dataclass(frozen=True, slots=True)
class AdapterDone:
    """Answer to a command that was carried out, or will be (`is_pending`).

    An eviction pends until running sequences let go; `AskReady` until the adapters are on the device.
    """

    request_id: str
    num_bytes_freed: int = 0
    is_pending: bool = False


@dataclass(frozen=True, slots=True)
class PinState:
    """One adapter that the operator pinned; `error` says why it is not held in memory."""

    digest: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterMove:
    """An adapter's way into a tier of memory (`kind` "load") or out of it; `tier` is "host" or "device".

    Ways out: "room" (for another), "operator", "unload" (deleted), "no_fit" (it came and proved too large; 0 bytes),
    "failed" (an image on the host that could not be loaded to the device, and is read anew next time), "on_device" (an
    image on the host of what the device holds in the same memory).
    """

    digest: str
    kind: str
    num_bytes: int
    # of a load, from its start to its end
    seconds: float = 0.0
    tier: str = "device"
    # of a load: "disk" or "host"
    source: str = "disk"
