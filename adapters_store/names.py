"""Adapter names and the ways a request spells one: `name`, `name@3`, `name@sha256:...`, `name:alias`, `base:name`.

A name that belongs to somebody else than the operator is stored as `owner/name`. Owns the grammar only; what exists is
the registry's business. Invariant: a name never becomes a path, and no name can be given that some selector could also
mean.
"""

import re
from dataclasses import dataclass

from adapters_store.errors import InvalidName

# ends in a letter, digit, _ or -: a trailing dot or colon is a typing error on every system that treats it specially
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:-]{0,126}[A-Za-z0-9_-])?\Z")
_OWNER = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_SELECTED = re.compile(r"(?P<name>[^@]{1,192})@(?:(?P<version>[1-9][0-9]{0,9})|sha256:(?P<digest>[0-9a-f]{64}))\Z")


@dataclass(frozen=True, slots=True)
class Selector:
    """A `name@...` form: exactly one of `version` and `digest` is set."""

    name: str
    version: int | None
    digest: str | None


def check_name(name: str, served_name: str) -> None:
    """Refuse a name that cannot be given to an adapter of the base called `served_name`.

    Raises:
        InvalidName: wrong characters or length, the base's own name, or a `base:` form.
    """
    if not _NAME.match(name):
        raise InvalidName(
            f"the name {ascii(name)[:140]} is not allowed: 1 to 128 letters, digits, '.', '_', ':' or '-', "
            "starting with a letter or digit and not ending in '.' or ':'",
            param="name",
        )
    folded, base = name.casefold(), served_name.casefold()
    if base and (folded == base or folded.startswith(f"{base}:")):
        raise InvalidName(f"the name '{name}' means the base model '{served_name}'; choose another", param="name")


def owner_of(stored: str) -> str:
    """Return the owner of a stored name; empty: the operator."""
    return stored.rpartition("/")[0]


def check_stored_name(stored: str, served_name: str) -> None:
    """Refuse a name, with or without its owner, that cannot be given; raises InvalidName as `check_name` does."""
    owner, slash, name = stored.rpartition("/")
    if slash and not _OWNER.match(owner):
        raise InvalidName(
            f"the owner {ascii(owner)[:80]} is not allowed: 1 to 63 of a-z, 0-9 and '-', beginning and ending with a "
            "letter or digit",
            param="name",
        )
    check_name(name, served_name)


def check_alias(alias: str) -> None:
    """Raises InvalidName if `alias` cannot follow the colon of `name:alias`."""
    if not _ALIAS.match(alias):
        raise InvalidName(
            f"the alias {ascii(alias)[:80]} is not allowed: 1 to 64 letters, digits, '.', '_' or '-'", param="alias"
        )


def parse_selector(model: str) -> Selector | None:
    """Read `name@3` or `name@sha256:<64 hex>`; None if `model` is neither."""
    match = _SELECTED.match(model)
    if match is None:
        return None
    version = match["version"]
    return Selector(match["name"], int(version) if version else None, match["digest"])
