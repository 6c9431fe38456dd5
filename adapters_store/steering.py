"""The moves of a name's pointers, as they are decided: promote, roll back, alias, canary, and what may be removed.

Owns every refusal; `pointers` owns what a move leaves. Pure: a registry calls these with nothing else moving.
Invariant: a move points to a version that is there, and what is chosen for removal is held by nothing.
"""

from dataclasses import dataclass

from adapters_store.errors import AdapterNotFound, InvalidOption, NameTaken
from adapters_store.names import check_alias
from adapters_store.pointers import ALL, CANARY, Choose, Decide, Move, Named, Sticky, What
from adapters_store.version_errors import AdapterInUse, NothingBefore


@dataclass(frozen=True, slots=True)
class Actor:
    """Who moves a pointer, and when (unix seconds)."""

    by: str
    at: int


def promoted(actor: Actor, version: int | str, to: str | None) -> Decide:
    """Let the plain name, or the alias `to`, mean a version, given by number or by an alias of it.

    Promoting the canary to the plain name ends the canary. Raises AdapterNotFound, InvalidName, NameTaken.
    """

    def decide(named: Named) -> Move | None:
        number = _number(named, version)
        if to is not None:
            _check_alias(named, to)
            is_there = named.pointers.aliases.get(to) == number
        else:
            is_there = named.pointers.current == number
        return None if is_there else Move(What.PROMOTE, number, actor.at, actor.by, alias=to or "")

    return decide


def rolled_back(actor: Actor) -> Decide:
    """Let the plain name mean what it meant before; raises NothingBefore."""

    def decide(named: Named) -> Move:
        previous = named.pointers.previous
        if previous is None:
            raise NothingBefore(
                f"adapter '{named.name}' has meant version {named.pointers.current} from the beginning; "
                "promote another version instead",
                param="name",
            )
        return Move(What.ROLLBACK, previous, actor.at, actor.by)

    return decide


def aliased(actor: Actor, alias: str, version: int) -> Decide:
    """Let `name:alias` mean a version; raises InvalidName, NameTaken, AdapterNotFound."""

    def decide(named: Named) -> Move:
        number = _number(named, version)
        _check_alias(named, alias)
        return Move(What.ALIAS, number, actor.at, actor.by, alias=alias)

    return decide


def unaliased(actor: Actor, alias: str) -> Decide:
    """Forget an alias, and with `canary` its share; raises AdapterNotFound."""

    def decide(named: Named) -> Move:
        return Move(What.UNALIAS, _number(named, alias), actor.at, actor.by, alias=alias)

    return decide


def canaried(actor: Actor, version: int | str, percent: float, sticky: Sticky) -> Decide:
    """Give a version a share of the plain name's requests; 0: none yet, but `name:canary` means it.

    Raises:
        InvalidOption: no percentage, or the version that the plain name means already. AdapterNotFound, NameTaken.
    """
    share = share_of(percent)

    def decide(named: Named) -> Move:
        number = _number(named, version)
        _check_alias(named, CANARY)
        if number == named.pointers.current:
            raise InvalidOption(
                f"version {number} is what '{named.name}' means for everybody; a canary is another version",
                param="version",
            )
        return Move(What.CANARY, number, actor.at, actor.by, alias=CANARY, share=share, sticky=sticky)

    return decide


def share_of(percent: float) -> int:
    """Return a percentage in hundredths; raises InvalidOption."""
    # also false for NaN
    if not 0 <= percent <= 100:
        raise InvalidOption(f"percent is {percent}; it goes from 0 to 100", param="percent")
    share = round(percent * 100)
    if abs(share - percent * 100) > 1e-6:
        raise InvalidOption(f"percent is {percent}; a canary's share has two decimals at most", param="percent")
    assert 0 <= share <= ALL, "a percentage is within its bounds"
    return share


def removable(version: int) -> Choose:
    """Choose one version; raises AdapterNotFound, or AdapterInUse if something holds it."""

    def choose(named: Named) -> list[int]:
        number = _number(named, version)
        holders = holders_of(named, number)
        if holders:
            raise AdapterInUse(
                f"version {number} of '{named.name}' is {' and '.join(holders)}; move that first", param="version"
            )
        return [number]

    return choose


def older_than(keep: int) -> Choose:
    """Choose all versions but the newest `keep` and those that something holds; raises InvalidOption."""
    if keep < 1:
        raise InvalidOption(f"{keep} versions to keep; at least 1", param="keep_versions")

    def choose(named: Named) -> list[int]:
        held = named.pointers.held()
        return [number for number in sorted(named.versions)[:-keep] if number not in held]

    return choose


def holders_of(named: Named, version: int) -> list[str]:
    """Return in words what keeps a version from being removed."""
    pointers = named.pointers
    holders = [f"its alias '{alias}'" for alias, number in sorted(pointers.aliases.items()) if number == version]
    if version == pointers.current:
        holders.insert(0, "what the name means")
    elif version == pointers.previous:
        holders.append("what a rollback goes to")
    return holders


def _number(named: Named, version: int | str) -> int:
    if isinstance(version, str):
        found = named.pointers.aliases.get(version)
        if found is None:
            raise AdapterNotFound(f"adapter '{named.name}' has no alias {ascii(version)[:80]}", param="alias")
        return found
    if version not in named.versions:
        raise AdapterNotFound(f"adapter '{named.name}' has no version {version}", param="version")
    return version


def _check_alias(named: Named, alias: str) -> None:
    check_alias(alias)
    if named.is_name(f"{named.name}:{alias}"):
        raise NameTaken(f"an adapter is already called '{named.name}:{alias}'; choose another alias", param="alias")
