"""What a job's `promote` does with a finished adapter: a name's next version, its canary, its alias.

Owns the order. Invariants: an adapter that misses its bound changes no name but its own; one that meets it never takes
over the plain name at once, only the alias, and with a canary a share of the name's requests; done again after a crash
it changes nothing more.
"""

from contextlib import suppress
from typing import Protocol

from adapters_store.errors import AdapterNotFound
from adapters_store.jobs.job import NewEvent, Promotion
from adapters_store.pointers import Sticky
from adapters_store.registry import AdapterVersion
from adapters_store.strict_json import Json
from serve.api.owned_adapters import OwnedAdapters


class Put(Protocol):
    """Publishes the job's export as the next version of the promotion's name."""

    def __call__(self, *, staged: bool) -> AdapterVersion:
        """Publish; `staged` leaves the name's current version as it is."""
        ...


def promote(
    promotion: Promotion, metrics: dict[str, Json], view: OwnedAdapters, digest: str, put: Put
) -> list[NewEvent]:
    """Promote, or leave it; return what is to be told. Raises StoreError, ServeError."""
    name, value = promotion.name, metrics.get(promotion.metric)
    bounds = [f"above {promotion.above:g}"] if promotion.above is not None else []
    bounds += [f"below {promotion.below:g}"] if promotion.below is not None else []
    wanted = f"{promotion.metric} {' and '.join(bounds)}"
    if not promotion.holds(metrics):
        return [NewEvent(f"Not promoted: {wanted} was asked for, it is {value}; '{name}' is left as it is")]
    versions: list[AdapterVersion] = []
    with suppress(AdapterNotFound):
        versions = view.versions(name)
    found = next((version for version in versions if version.digest == digest), None)
    version = found or put(staged=bool(versions))
    told = [NewEvent(f"{wanted} holds ({value}): published as version {version.version} of '{name}'")]
    if promotion.canary is not None and view.get(name).version != version.version:
        view.set_canary(name, version.version, promotion.canary, Sticky.USER)
        told.append(NewEvent(f"{promotion.canary:g} % of the requests of '{name}' go to version {version.version}"))
    view.promote(name, version.version, promotion.alias)
    return [*told, NewEvent(f"'{name}:{promotion.alias}' is version {version.version}")]
