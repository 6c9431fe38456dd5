"""How many adapters one owner may have, and how many bytes of them; enforced where names are given.

Owns the bounds and the counting; an owner is what stands before the slash of a stored name, the operator's names have
none. Invariant: no owner ever has more than its bounds say, however many uploads end at once: the last check is made
under the store's lock, just before the version gets its number.
"""

from dataclasses import dataclass

from adapters_store.errors import OwnerFull
from adapters_store.names import owner_of
from adapters_store.registry import Registry


@dataclass(frozen=True, slots=True)
class OwnerQuota:
    """The bounds of each owner; None: unbounded. Bytes count every version, also where two owners share a digest."""

    max_adapters: int | None = None
    max_bytes: int | None = None


def check_quota(registry: Registry, quota: OwnerQuota, name: str, num_bytes: int) -> None:
    """Refuse a version of `name` with so many bytes if its owner's bounds leave no room for it.

    Raises:
        OwnerFull: too many adapters, or too many bytes.
    """
    if quota.max_adapters is None and quota.max_bytes is None:
        return
    owner = owner_of(name)
    names = {version.name for version in registry.all_current() if owner_of(version.name) == owner}
    num_adapters = len(names | {name})
    if quota.max_adapters is not None and num_adapters > quota.max_adapters:
        raise OwnerFull(
            f"this would be adapter {num_adapters} of its owner; the limit is {quota.max_adapters}: delete one",
            param="name",
        )
    if quota.max_bytes is None:
        return
    held = sum(version.num_bytes for each in names for version in registry.versions(each))
    if held + num_bytes > quota.max_bytes:
        raise OwnerFull(
            f"the owner's adapters take {held} bytes, and {num_bytes} more are over the limit of {quota.max_bytes}: "
            "delete some",
            param="files",
        )
