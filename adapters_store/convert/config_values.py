"""Typed values out of a foreign config: ranks, scalings, flags and patterns, each refused by its key when wrong.

Owns types and ranges only; what a key means is its tuner's business. Invariant: what is returned is finite, in range
and of the declared type, whatever the file held.
"""

from adapters_store.convert.peft_patterns import MAX_ENTRIES, Pattern, parse_pattern_key
from adapters_store.errors import UnsupportedAdapter
from adapters_store.strict_json import Json

Config = dict[str, Json]

_MAX_ALPHA = 1e6
_MAX_WHOLE = 1 << 20


def read_whole(config: Config, field: str, default: int, *, least: int = 1) -> int:
    """Return a whole number of at least `least`.

    Raises:
        UnsupportedAdapter: it is not one; `param` is `field`.
    """
    return _whole(config.get(field, default), field, least)


def read_scale(config: Config, field: str, default: float) -> float:
    """Return a number above 0.

    Raises:
        UnsupportedAdapter: it is not one, or beyond 1e6; `param` is `field`.
    """
    return _scale(config.get(field, default), field)


def read_flag(config: Config, field: str, *, default: bool = False) -> bool:
    """Return a boolean, `default` where the key is missing or null; raises UnsupportedAdapter on anything else."""
    value = config.get(field)
    if value is None:
        return default
    if isinstance(value, bool):
        return value
    raise UnsupportedAdapter(f"{field} is {ascii(value)[:40]}; it must be true or false", param=field)


def read_rank_pattern(config: Config, field: str) -> Pattern[int]:
    """Return ranks per module name; raises UnsupportedAdapter on keys that need a regex and on other values."""
    entries = _entries(config, field).items()
    return Pattern(field, tuple((parse_pattern_key(key, field), _whole(value, field, 1)) for key, value in entries))


def read_scale_pattern(config: Config, field: str) -> Pattern[float]:
    """Return scalings per module name; raises UnsupportedAdapter on keys that need a regex and on other values."""
    entries = _entries(config, field).items()
    return Pattern(field, tuple((parse_pattern_key(key, field), _scale(value, field)) for key, value in entries))


def _entries(config: Config, field: str) -> Config:
    value = config.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        raise UnsupportedAdapter(f"{field} must map at most {MAX_ENTRIES} module names to numbers", param=field)
    return value


def _whole(value: Json, field: str, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MAX_WHOLE:
        shown = ascii(value)[:40]
        raise UnsupportedAdapter(f"{field} holds {shown}; it must be a whole number from {least}", param=field)
    return value


def _scale(value: Json, field: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not isinstance(value, int | float) or not 0 < value <= _MAX_ALPHA:
        raise UnsupportedAdapter(
            f"{field} holds {ascii(value)[:40]}; it must be a number above 0 and up to {_MAX_ALPHA:.0f}", param=field
        )
    return float(value)
