"""A Hugging Face `config.json`, read key by key with types: what a family's reader asks its questions to.

Owns the difference between a missing key and an explicit null, and the two spellings of the same fact (`dtype` or
`torch_dtype`). Knows no architecture. Invariant: a value of the wrong type is a `StartError` that names the key.
"""

import json
from pathlib import Path

from serve.errors import StartError


class HfConfig:
    """The text part of a config; `architecture` comes from the outer object."""

    def __init__(self, raw: dict[str, object]) -> None:
        nested = raw.get("text_config")
        self._outer = raw
        self._raw: dict[str, object] = nested if isinstance(nested, dict) else raw

    @classmethod
    def read(cls, path: Path) -> "HfConfig":
        """Read a JSON object from `path`.

        Raises:
            StartError: the file is missing or is no JSON object.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StartError(f"{path.parent.name}/ has no {path.name}: not a Hugging Face model folder") from None
        except (OSError, ValueError) as error:
            raise StartError(f"{path.name} of {path.parent.name}/ cannot be read: {error}") from error
        if not isinstance(raw, dict):
            raise StartError(f"{path.name} of {path.parent.name}/ holds {type(raw).__name__}, not a JSON object")
        return cls(raw)

    @property
    def architecture(self) -> str:
        """The first of `architectures`, or "" when the config names none."""
        names = self._outer.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    def value(self, key: str) -> object:
        """The raw value: of the text part, else of the outer object; None when absent in both."""
        value = self._raw.get(key)
        return self._outer.get(key) if value is None else value

    def has(self, key: str) -> bool:
        """Is the key present, be it with null?"""
        return key in self._raw

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; missing or null gives `default`, and without one it is an error."""
        value = self.value(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise StartError(f"config.json: {key} is {value!r}; a whole number is needed")
        return value

    def number(self, key: str, default: float) -> float:
        """A number; missing or null gives `default`."""
        value = self.value(key)
        return default if value is None else as_number(key, value)

    def number_or_null(self, key: str, default: float | None) -> float | None:
        """A number; missing gives `default`, an explicit null is None."""
        if not self.has(key):
            return default
        value = self._raw[key]
        return None if value is None else as_number(key, value)

    def integer_or_null(self, key: str, default: int | None) -> int | None:
        """A whole number; missing gives `default`, an explicit null is None."""
        if not self.has(key):
            return default
        return None if self._raw[key] is None else self.integer(key)

    def flag(self, key: str, *, default: bool) -> bool:
        """A boolean; missing or null gives `default`."""
        value = self.value(key)
        return default if value is None else bool(value)

    def text(self, key: str, default: str) -> str:
        """A string; missing or null gives `default`."""
        value = self.value(key)
        return default if value is None else str(value)

    def items(self, key: str) -> list[object] | None:
        """A list; missing or null gives None."""
        value = self.value(key)
        if value is not None and not isinstance(value, list):
            raise StartError(f"config.json: {key} is {value!r}; a list is needed")
        return value

    def mapping(self, key: str) -> dict[str, object]:
        """An object; missing or null gives an empty one."""
        value = self.value(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise StartError(f"config.json: {key} is {value!r}; an object is needed")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing."""
        value = self.value(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) for i in ids):
            raise StartError(f"config.json: {key} is {value!r}; token ids are needed")
        return tuple(ids)


def as_number(key: str, value: object) -> float:
    """Check that a JSON value is a number.

    Raises:
        StartError: it is not; the message names `key`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StartError(f"config.json: {key} is {value!r}; a number is needed")
    return float(value)
