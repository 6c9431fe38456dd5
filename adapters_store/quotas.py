"""How many adapters one owner may have, and how many bytes of them; enforced where names are given.

Owns the bounds and the counting; an owner is what stands before the slash of a stored name, the operator's names have
none. Invariant: no owner ever has more than its bounds say, however many uploads end at once, on whatever replicas: the
last check sees exactly the changes that come before the version's own.
"""

from dataclasses import dataclass

from adapters_store.errors import OwnerFull
from adapters_store.names import owner_of
from adapters_store.registry import Held


@dataclass(frozen=True, slots=True)
class OwnerQuota:
    """The bounds of each owner; None: unbounded. Bytes count every version, also where two owners share a digest."""

    max_adapters: int | None = None
    max_bytes: int | None = None


def check_quota(quota: OwnerQuota, name: str, num_bytes: int, held: Held) -> None:
    """Refuse a version of `name` with so many bytes if its owner's bounds leave no room for it beside what is held.

    Raises:
        OwnerFull: too many adapters, or too many bytes.
    """
    if quota.max_adapters is None and quota.max_bytes is None:
        return
    owner = owner_of(name)
    names = {version.name for version in held.all_current() if owner_of(version.name) == owner}
    num_adapters = len(names | {name})
    if quota.max_adapters is not None and num_adapters > quota.max_adapters:
        raise OwnerFull(
            f"this would be adapter {num_adapters} of its owner; the limit is {quota.max_adapters}: delete one",
            param="name",
        )
    if quota.max_bytes is None:
        return
    held_bytes = sum(version.num_bytes for each in names for version in held.versions(each))
    if held_bytes + num_bytes > quota.max_bytes:
        raise OwnerFull(
            f"the owner's adapters take {held_bytes} bytes, and {num_bytes} more are over the limit of "
            f"{quota.max_bytes}: delete some",
            param="files",
        )
