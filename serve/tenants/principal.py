"""Who asks, and what they may do: tenant, scopes, key.

Owns the names of tenants and scopes. Invariant: a principal is decided once per request, at the door, and is passed on
by argument; nothing asks later who is calling.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from serve.errors import InvalidValue

# whose everything is where no keys are asked for, and whose the operator's static keys are
LOCAL_TENANT = "local"
# lower case only: two tenants never differ in case alone
_TENANT = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")


class Scope(StrEnum):
    """What a key opens."""

    INFER = "infer"
    ADAPTERS_READ = "adapters:read"
    ADAPTERS_WRITE = "adapters:write"
    TRAIN = "train"
    METRICS = "metrics"
    # all of the above, and what concerns the whole server
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """One caller. `key_id` names the key in logs and in the audit; it is no secret."""

    tenant: str
    scopes: frozenset[Scope]
    key_id: str

    def may(self, any_of: frozenset[Scope]) -> bool:
        """Return whether one of these scopes, or `admin`, is held."""
        return Scope.ADMIN in self.scopes or not self.scopes.isdisjoint(any_of)


def local_principal(key_id: str = "none") -> Principal:
    """Return the one user of a server without tenants: every scope."""
    return Principal(LOCAL_TENANT, frozenset(Scope), key_id)


def check_tenant(name: str) -> str:
    """Return a tenant's name.

    Raises:
        InvalidValue: it is not one.
    """
    if not _TENANT.match(name):
        raise InvalidValue(
            f"the tenant name {ascii(name)[:80]} is not allowed: 1 to 63 of a-z, 0-9 and '-', "
            "beginning and ending with a letter or digit",
            param="tenant",
        )
    return name


def parse_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """Return the scopes of these names.

    Raises:
        InvalidValue: one is unknown, or there is none.
    """
    known = ", ".join(Scope)
    scopes = set()
    for name in names:
        try:
            scopes.add(Scope(name))
        except ValueError:
            raise InvalidValue(f"unknown scope {ascii(name)[:80]}; known: {known}", param="scopes") from None
    if not scopes:
        raise InvalidValue(f"a key needs at least one scope of {known}", param="scopes")
    return frozenset(scopes)
