"""Typed values out of the `options` of an upload: each refused by its name when it is missing or wrong.

Owns types, ranges and the naming of what is missing. Invariant: nothing that shapes a result has a silent default.
"""

from collections.abc import Collection

from adapters_store.errors import InvalidOption
from adapters_store.strict_json import Json

_MAX_WHOLE = 1 << 20
_MAX_NUMBER = 1e6


class OptionValues:
    """The options of one format, of which `known` are all."""

    def __init__(self, what: str, options: dict[str, Json], known: Collection[str]) -> None:
        """`what` names the format in messages; raises InvalidOption for an option that it does not have."""
        unknown = sorted(options.keys() - set(known))
        if unknown:
            listed = f"; known: {', '.join(sorted(known))}" if known else ""
            raise InvalidOption(f"{what} has no option {unknown[0][:80]!a}{listed}", param="options")
        self._options = options
        self.recorded = dict(sorted(options.items()))

    def has(self, name: str) -> bool:
        """Return whether the uploader set the option."""
        return self._options.get(name) is not None

    def whole(self, name: str, meaning: str, default: Json = None) -> int:
        """Return a whole number from 1; `meaning` explains it where it is missing; `default` comes from the files."""
        value = self._value(name, meaning, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_WHOLE:
            raise self._wrong(name, value, "a whole number from 1")
        return value

    def number(self, name: str, meaning: str, default: Json = None) -> float:
        """Return a number above 0."""
        value = self._value(name, meaning, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= _MAX_NUMBER:
            raise self._wrong(name, value, f"a number above 0 and up to {_MAX_NUMBER:.0f}")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """Return true or false."""
        value = self._options.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def choice(self, name: str, meaning: str, known: Collection[str], default: Json = None) -> str:
        """Return one of the known texts."""
        value = self._value(name, meaning, default)
        if not isinstance(value, str) or value not in known:
            raise self._wrong(name, value, " or ".join(sorted(known)))
        return value

    def names(self, name: str, known: Collection[str]) -> tuple[str, ...] | None:
        """Return a list of names out of `known`, each once; None where the option is not set."""
        value = self._options.get(name)
        if value is None:
            return None
        texts = [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
        if not isinstance(value, list) or len(texts) != len(value) or not set(texts) <= set(known):
            raise self._wrong(name, value, f"a list of names out of {', '.join(sorted(known))[:200]}")
        if len(set(texts)) != len(texts):
            raise self._wrong(name, value, "a list without repetitions")
        return tuple(texts)

    def _value(self, name: str, meaning: str, default: Json) -> Json:
        value = self._options.get(name)
        value = default if value is None else value
        if value is None:
            raise InvalidOption(
                f'the option {name} is missing ({meaning}); the files do not store it: send options={{"{name}": ...}}',
                param=f"options.{name}",
            )
        return value

    @staticmethod
    def _wrong(name: str, value: Json, wanted: str) -> InvalidOption:
        return InvalidOption(
            f"the option {name} holds {ascii(value)[:60]}; it must be {wanted}", param=f"options.{name}"
        )
