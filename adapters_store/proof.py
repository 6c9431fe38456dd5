"""What a proof of an adapter is to the store: who makes it, from what, and what is said where none was made.

Owns the types only; the probe itself is `serve.probe`'s, since it runs the served model. Invariant: a probe gets an
adapter that is whole and durable under its digest and that nobody can ask for yet; it returns the proof or raises.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters_store.blobs import OpenAdapter
from adapters_store.convert.options import ConvertOptions
from adapters_store.manifest import Manifest
from adapters_store.strict_json import Json

Proof = dict[str, Json]


@dataclass(frozen=True, slots=True)
class Staged:
    """One adapter before it becomes visible.

    Attributes:
        source: the uploaded files, as the converter read them.
        folder: an empty folder of the upload's, for what the probe writes; gone with the upload.
        options: what the converter was told.
        open_image: opens the canonical file as the engine does.
    """

    digest: str
    manifest: Manifest
    source: Path
    folder: Path
    options: ConvertOptions
    open_image: Callable[[], OpenAdapter]


# raises what the upload then fails with; nothing is published
Probe = Callable[[Staged], Proof]


@dataclass(frozen=True, slots=True)
class NotProbed:
    """No probe: the version is published without proof and says why."""

    reason: str


NO_ENGINE = NotProbed("no engine ran it when it was added")
Proving = Probe | NotProbed
