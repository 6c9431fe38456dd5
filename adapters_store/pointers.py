"""What one name points to: its current version, its aliases and its canary, and how it came to that.

Owns the rules as pure values: no disk, no clock, no lock; both registries apply the same ones, so they cannot differ.
Invariants: `trail` holds what the plain name meant, the last entry is what it means now; a canary is never the version
that the plain name means; a version that anything here holds is in `held()`, and nobody may remove it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import groupby

from adapters_store.json_values import integer, integers, json_list, json_object, text
from adapters_store.strict_json import Json

# the alias whose version gets the canary's share of the requests
CANARY = "canary"
# a canary's share is counted in hundredths of a percent
ALL = 10_000
_MAX_TRAIL = 64
_MAX_MOVES = 100


class Sticky(StrEnum):
    """Whose requests always get the same version: those of one `user` field (else each for itself), or of one key."""

    USER = "user"
    KEY = "key"


class What(StrEnum):
    """What a move did."""

    PUBLISH = "publish"
    # a version was published without becoming the current one
    STAGE = "stage"
    PROMOTE = "promote"
    ROLLBACK = "rollback"
    ALIAS = "alias"
    UNALIAS = "unalias"
    CANARY = "canary"


@dataclass(frozen=True, slots=True)
class Move:
    """One change of a name's pointers: `by` whom, `at` (unix seconds).

    `alias` is the alias that moved, "" for the plain name; `share` is the canary's, of `ALL`.
    """

    what: What
    version: int
    at: int
    by: str
    alias: str = ""
    share: int = 0
    sticky: Sticky = Sticky.USER


@dataclass(frozen=True, slots=True)
class Pointers:
    """Where a name points."""

    trail: tuple[int, ...] = ()
    aliases: Mapping[str, int] = field(default_factory=dict)
    share: int = 0
    sticky: Sticky = Sticky.USER
    moves: tuple[Move, ...] = ()

    @property
    def current(self) -> int:
        """The version that the plain name means; 0: none."""
        return self.trail[-1] if self.trail else 0

    @property
    def previous(self) -> int | None:
        """The version that a rollback goes to."""
        return self.trail[-2] if len(self.trail) > 1 else None

    @property
    def canary(self) -> int | None:
        """The version that gets `share` of the plain name's requests."""
        return self.aliases.get(CANARY) if self.share else None

    def held(self) -> set[int]:
        """Return the versions that may not be removed; what a rollback goes to is one of them."""
        return {*self.trail[-2:], *self.aliases.values()}

    def after(self, move: Move) -> "Pointers":
        """Return the pointers that a move leaves; whether it may be made was decided before."""
        moved = replace(self._moved(move), moves=(*self.moves, move)[-_MAX_MOVES:])
        if moved.aliases.get(CANARY) != moved.current:
            return moved
        # the canary has become what everybody gets; an alias that was set to that version by hand stays
        return replace(moved, share=0) if moved.current == self.current else moved._without_alias(CANARY)

    def without(self, versions: Iterable[int]) -> "Pointers":
        """Return the pointers once these versions, which nothing holds, are gone."""
        gone = set(versions)
        kept = [version for version in self.trail if version not in gone]
        return replace(self, trail=tuple(version for version, _ in groupby(kept)))

    def to_json(self) -> dict[str, Json]:
        """Return what `read_pointers` reads; the aliases are kept by the registry."""
        return {
            "trail": [*self.trail],
            "share": self.share,
            "sticky": self.sticky.value,
            "moves": [move_json(move) for move in self.moves],
        }

    def _moved(self, move: Move) -> "Pointers":
        match move.what:
            case What.STAGE if self.trail:
                return self
            case What.PUBLISH | What.STAGE:
                return self._meaning(move.version)
            case What.PROMOTE if not move.alias:
                return self._meaning(move.version)
            case What.PROMOTE | What.ALIAS:
                return replace(self, aliases={**self.aliases, move.alias: move.version})
            case What.ROLLBACK:
                return replace(self, trail=self.trail[:-1])
            case What.UNALIAS:
                return self._without_alias(move.alias)
            case What.CANARY:
                aliases = {**self.aliases, CANARY: move.version}
                return replace(self, aliases=aliases, share=move.share, sticky=move.sticky)

    def _meaning(self, version: int) -> "Pointers":
        if version == self.current:
            return self
        return replace(self, trail=(*self.trail, version)[-_MAX_TRAIL:])

    def _without_alias(self, alias: str) -> "Pointers":
        aliases = {key: version for key, version in self.aliases.items() if key != alias}
        return replace(self, aliases=aliases, share=0 if alias == CANARY else self.share)


@dataclass(frozen=True, slots=True)
class Named:
    """What is known of a name when a move of its pointers is decided: `is_name` says what names are taken."""

    name: str
    pointers: Pointers
    versions: tuple[int, ...]
    is_name: Callable[[str], bool]


# returns the move, None to leave all as it is, or raises StoreError; called with nothing else moving
Decide = Callable[[Named], Move | None]
# returns the versions to remove; called with nothing else moving
Choose = Callable[[Named], Iterable[int]]


def move_json(move: Move) -> dict[str, Json]:
    """Return what `read_move` reads."""
    return {
        "what": move.what.value,
        "version": move.version,
        "at": move.at,
        "by": move.by,
        "alias": move.alias,
        "share": move.share,
        "sticky": move.sticky.value,
    }


def read_move(fields: Json) -> Move:
    """Read a move; raises ValueError, TypeError, KeyError: it is none."""
    values = json_object(fields)
    return Move(
        What(text(values["what"])),
        integer(values["version"]),
        integer(values["at"]),
        text(values["by"]),
        alias=text(values["alias"]),
        share=integer(values["share"]),
        sticky=Sticky(text(values["sticky"])),
    )


def read_pointers(fields: Json, aliases: Mapping[str, int]) -> Pointers:
    """Read what `Pointers.to_json` gave; raises as `read_move`."""
    values = json_object(fields)
    return Pointers(
        trail=integers(json_list(values["trail"])),
        aliases=dict(aliases),
        share=integer(values["share"]),
        sticky=Sticky(text(values["sticky"])),
        moves=tuple(read_move(move) for move in json_list(values["moves"])),
    )


def pointers_before_moves(current: int, versions: Iterable[int], aliases: Mapping[str, int]) -> Pointers:
    """Return the pointers of a name that an older release kept: each upload had moved it to the newest version."""
    return Pointers(trail=tuple(sorted({*versions, current})), aliases=dict(aliases))
