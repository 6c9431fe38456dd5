"""Typed values out of parsed JSON of our own: one function per type, each refusing the wrong one with TypeError.

Owns types only. Invariant: a boolean is never taken for a number, nor a whole number for a float.
"""

from collections.abc import Iterable

from adapters_store.strict_json import Json


def text(value: Json) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise TypeError("string expected")
    return value


def integer(value: Json) -> int:
    """Return a whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("whole number expected")
    return value


def integers(values: Iterable[Json]) -> tuple[int, ...]:
    """Return whole numbers."""
    return tuple(integer(value) for value in values)


def number(value: Json) -> float:
    """Return a number with a fraction part."""
    if not isinstance(value, float):
        raise TypeError("number expected")
    return value


def flag(value: Json) -> bool:
    """Return a boolean."""
    if not isinstance(value, bool):
        raise TypeError("boolean expected")
    return value


def json_list(value: Json) -> list[Json]:
    """Return a list."""
    if not isinstance(value, list):
        raise TypeError("list expected")
    return value


def json_object(value: Json) -> dict[str, Json]:
    """Return an object."""
    if not isinstance(value, dict):
        raise TypeError("object expected")
    return value
