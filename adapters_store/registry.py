"""What a registry of names, versions and what points to them promises; two implement it.

Owns the value types that leave the store. Invariant: a version, once published, never changes and its number is never
given again, not even after its name was deleted; `publish` returns only when the version is durable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from adapters_store.base import BaseDims
from adapters_store.canary import StickyId, place_of
from adapters_store.made_by import summarised
from adapters_store.manifest import Manifest, Report
from adapters_store.names import parse_selector
from adapters_store.pointers import Choose, Decide, Move, Pointers, What
from adapters_store.strict_json import Json

BaseFacts = dict[str, str | int | bool]

# versions older than the probe
NOT_PROBED_BEFORE = "published before adapters were probed; upload it again"

# what must be equal for an adapter to act on a base; the fingerprint may differ (same shapes, retrained base)
_SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
# the fact that only a base of the same weights may serve an adapter; absent where shapes suffice
_BASE_DEPENDENT = "base_dependent"


def base_facts(base: BaseDims, *, is_base_dependent: bool) -> BaseFacts:
    """Return what a version remembers of its base."""
    return base.to_dict() | ({_BASE_DEPENDENT: True} if is_base_dependent else {})


def fits(facts: BaseFacts, base: BaseFacts) -> bool:
    """Return whether a version made for a base of these facts may be served by `base`."""
    keys = (*_SHAPE_KEYS, "weights_fingerprint") if facts.get(_BASE_DEPENDENT) else _SHAPE_KEYS
    return all(facts[key] == base[key] for key in keys)


def base_dims(facts: BaseFacts) -> BaseDims:
    """Return the base of a version; `facts` are those that `base_facts` made."""
    return BaseDims(**{key: value for key, value in facts.items() if key != _BASE_DEPENDENT})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable upload of a name. `created` is in unix seconds, `num_bytes` the size of the canonical file.

    `num_virtual_tokens` come before a request's own; `invocation_tokens`, if any, switch the adapter on. `proof` is
    what the probe measured before the version became visible; None: it was not probed, and `not_probed` says why.
    """

    name: str
    version: int
    digest: str
    family: str
    rank: int
    num_bytes: int
    created: int
    base: BaseFacts
    report: Report
    dtype: str
    num_virtual_tokens: int = 0
    invocation_tokens: tuple[int, ...] = ()
    proof: dict[str, Json] | None = None
    not_probed: str = NOT_PROBED_BEFORE
    # who uploaded it, and whether it was to wait for its promotion
    by: str = ""
    staged: bool = False
    # what was found of its signature, with the bundle itself; None: none was sent, none was asked for
    signature: dict[str, Json] | None = None
    # how its maker says that it was made, without the curves, which the manifest has; None: it says nothing
    provenance: dict[str, Json] | None = None


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A version before the registry has given it its number."""

    name: str
    digest: str
    family: str
    rank: int
    num_bytes: int
    created: int
    base: BaseFacts
    report: Report
    dtype: str
    num_virtual_tokens: int = 0
    invocation_tokens: tuple[int, ...] = ()
    proof: dict[str, Json] | None = None
    not_probed: str = ""
    by: str = ""
    staged: bool = False
    signature: dict[str, Json] | None = None
    provenance: dict[str, Json] | None = None

    @classmethod
    def of(cls, name: str, manifest: Manifest, *, created: int) -> "NewVersion":
        """Return what a manifest says of a version."""
        return cls(
            name=name,
            digest=manifest.digest(),
            family=manifest.family,
            rank=manifest.rank,
            num_bytes=manifest.file_bytes,
            created=created,
            base=base_facts(manifest.base, is_base_dependent=manifest.base_dependent),
            report=manifest.report(),
            dtype=manifest.dtype,
            num_virtual_tokens=manifest.num_virtual_tokens,
            invocation_tokens=manifest.activation,
            provenance=summarised(manifest.provenance),
        )


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What a request's `model` stands for: the digest is the only identity behind the API."""

    name: str
    version: int
    digest: str
    rank: int
    num_bytes: int
    family: str
    num_virtual_tokens: int = 0
    invocation_tokens: tuple[int, ...] = ()
    # it gets a share of its name's requests
    is_canary: bool = False

    @classmethod
    def of(cls, version: AdapterVersion, *, is_canary: bool = False) -> "AdapterRef":
        """Point to a version."""
        return cls(
            version.name,
            version.version,
            version.digest,
            version.rank,
            version.num_bytes,
            version.family,
            version.num_virtual_tokens,
            version.invocation_tokens,
            is_canary,
        )


def move_of(version: AdapterVersion) -> Move:
    """Return the move that a version's publication is."""
    what = What.STAGE if version.staged else What.PUBLISH
    return Move(what, version.version, version.created, version.by)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Which versions the plain name's requests get: `canary` gets `pointers.share` of them."""

    current: AdapterVersion
    canary: AdapterVersion | None
    pointers: Pointers


class Held(Protocol):
    """What there is, as of one moment: for those who count it."""

    def all_current(self) -> list[AdapterVersion]:
        """Return the current version of every name, by name."""
        ...

    def versions(self, name: str) -> list[AdapterVersion]:
        """Return all versions of a name, oldest first."""
        ...


# raises StoreError if what is held leaves no room
Check = Callable[[Held], None]


def take_all(held: Held) -> None:
    """Refuse nothing."""


class Registry(Protocol):
    """Names -> numbered versions -> digests, and pointers to them. Thread-safe; raises StoreError only."""

    def publish(self, new: NewVersion, *, check: Check = take_all) -> AdapterVersion:
        """Give the next number and return when durable; NameTaken on a case twin.

        `check` sees what is held just before, under the store's lock, and may refuse.
        The name means the version from then on, unless it is `staged` and the name means another one already.
        """
        ...

    def check_free(self, name: str) -> None:
        """Raise NameTaken if `name` differs only in case from another, or spells an existing `name:alias`."""
        ...

    def current(self, name: str) -> AdapterVersion | None:
        """Return the name's current version."""
        ...

    def version(self, name: str, version: int) -> AdapterVersion | None:
        """Return one version by number."""
        ...

    def aliased(self, name: str, alias: str) -> AdapterVersion | None:
        """Return the version that `name:alias` points to."""
        ...

    def versions(self, name: str) -> list[AdapterVersion]:
        """Return all versions of a name, oldest first."""
        ...

    def all_current(self) -> list[AdapterVersion]:
        """Return the current version of every name, by name."""
        ...

    def canary(self, name: str) -> int | None:
        """Return the version that gets a share of the plain name's requests."""
        ...

    def traffic(self, name: str) -> Traffic | None:
        """Return what the plain name means, canary included, as of one moment."""
        ...

    def pointers(self, name: str) -> Pointers | None:
        """Return where a name points and how it came to that."""
        ...

    def move(self, name: str, decide: Decide) -> Pointers:
        """Let `decide` see the name with nothing else moving, make its move, return the pointers when durable.

        Raises:
            AdapterNotFound: no such name. What `decide` raises.
        """
        ...

    def retire(self, name: str, choose: Choose, *, now: int) -> list[AdapterVersion]:
        """Forget the versions that `choose` names and return them; their digests count as retired from `now` on."""
        ...

    def delete(self, name: str, *, now: int) -> None:
        """Forget a name with its versions and aliases; their digests count as retired from `now` on."""
        ...

    def digests(self, *, retired_since: int) -> set[str]:
        """Return every digest that some version points to, or that was retired at or after that time."""
        ...

    def close(self) -> None:
        """Give back the connection."""
        ...


def find_version(registry: Registry, model: str, sticky: StickyId | None = None) -> AdapterVersion | None:
    """Return the version that `name`, `name@3`, `name@sha256:...` or `name:alias` means; an exact name always wins.

    Args:
        sticky: whose request it is; the plain name then gives some of them the canary. None: never.
    """
    found = registry.current(model) if sticky is None else _drawn(registry.traffic(model), sticky)
    if found is not None:
        return found
    selector = parse_selector(model)
    if selector is None:
        name, _, alias = model.rpartition(":")
        return registry.aliased(name, alias) if name else None
    if selector.version is not None:
        return registry.version(selector.name, selector.version)
    matching = [version for version in registry.versions(selector.name) if version.digest == selector.digest]
    return matching[-1] if matching else None


def _drawn(traffic: Traffic | None, sticky: StickyId) -> AdapterVersion | None:
    if traffic is None or traffic.canary is None:
        return None if traffic is None else traffic.current
    place = place_of(traffic.canary.digest, traffic.canary.name, sticky.of(traffic.pointers.sticky))
    return traffic.canary if place < traffic.pointers.share else traffic.current
