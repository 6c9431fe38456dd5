"""Strict reading of the tables of a scenario: every key is known, every number in its range, or it is refused by name.

Owns the reading of one TOML table; what the keys mean belongs to the dataclasses they fill. Invariant: `close` has been
called on every table that was read, so no key is silently ignored.
"""

from collections.abc import Collection, Mapping
from typing import TypeVar

from loadtest.errors import InvalidScenario

Number = TypeVar("Number", int, float)


class Table:
    """One table and the keys that were asked of it; `where` is its place in the file, for messages."""

    def __init__(self, where: str, values: object) -> None:
        if not isinstance(values, Mapping):
            raise InvalidScenario(f"{where}: must be a table, not {values!r}")
        self.where = where
        self._values: dict[str, object] = {str(key): value for key, value in values.items()}
        self._asked: set[str] = set()

    def has(self, key: str) -> bool:
        """Tell whether the key is there; asking does not count as reading."""
        return key in self._values

    def table(self, key: str) -> "Table":
        """Return the sub-table; an absent one is empty."""
        return Table(f"{self.where}.{key}", self._take(key, {}))

    def tables(self, key: str) -> list["Table"]:
        """Return an array of tables; an absent one is empty."""
        values = self._take(key, [])
        if not isinstance(values, list):
            raise InvalidScenario(f"{self.where}.{key}: must be an array of tables, [[{key}]]")
        return [Table(f"{self.where}.{key}[{index}]", value) for index, value in enumerate(values)]

    def text(self, key: str, default: str | None = None, *, among: Collection[str] = ()) -> str:
        """Return a string, one of `among` where that is given."""
        value = self._take(key, default)
        if not isinstance(value, str):
            raise InvalidScenario(f"{self.where}.{key}: must be a string, not {value!r}")
        if among and value not in among:
            raise InvalidScenario(f"{self.where}.{key}: {value!r} is none of {', '.join(sorted(among))}")
        return value

    def whole(self, key: str, default: int | None = None, *, low: int = 0, high: int = 2**53) -> int:
        """Return an integer in [low, high]."""
        value = self._take(key, default)
        if type(value) is not int or not low <= value <= high:
            raise InvalidScenario(f"{self.where}.{key}: must be a whole number from {low} to {high}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12) -> float:
        """Return a finite number in [low, high]."""
        value = self._take(key, default)
        if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
            raise InvalidScenario(f"{self.where}.{key}: must be a number from {low:g} to {high:g}, not {value!r}")
        return float(value)  # type: ignore[arg-type]

    def optional(self, key: str, *, low: float = 0.0) -> float | None:
        """Return a number, or None where the key is absent."""
        return self.number(key, low=low) if self.has(key) else None

    def flag(self, key: str, *, default: bool) -> bool:
        """Return true or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise InvalidScenario(f"{self.where}.{key}: must be true or false, not {value!r}")
        return value

    def values(self, key: str) -> list[object]:
        """Return a non-empty array."""
        value = self._take(key, None)
        if not isinstance(value, list) or not value:
            raise InvalidScenario(f"{self.where}.{key}: must be a non-empty array, not {value!r}")
        return value

    def close(self) -> None:
        """Refuse the keys nobody asked for."""
        if unknown := sorted(set(self._values) - self._asked):
            known = ", ".join(sorted(self._asked))
            raise InvalidScenario(f"{self.where}: unknown key '{unknown[0]}'; known: {known}")

    def _take(self, key: str, default: object) -> object:
        self._asked.add(key)
        value = self._values.get(key, default)
        if value is None:
            raise InvalidScenario(f"{self.where}: '{key}' is missing")
        return value
