"""PEFT's module patterns without a regex engine: plain dotted names, matched exactly as PEFT's regexes match them.

Owns the matching of `rank_pattern`, `alpha_pattern`, `target_modules` and `exclude_modules` against module paths.
Invariant: no text from a config is ever compiled; what is not a plain name is refused.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from adapters_store.errors import UnsupportedAdapter
from adapters_store.strict_json import Json

# every module of a base of 126 layers fits; matching is entries times modules
MAX_ENTRIES = 1024
T = TypeVar("T")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*\Z")
_PATTERN_KEY = re.compile(r"\^?[A-Za-z0-9_\-]+((\\)?\.[A-Za-z0-9_\-]+)*\$?\Z")


@dataclass(frozen=True, slots=True)
class PatternKey:
    r"""One key of a pattern, matched as PEFT does: `re.match(rf"(.*\.)?({key})$", path)`.

    An unescaped dot stands for any character, `\.` for a dot; a leading `^` demands the whole path.
    """

    key: str
    text: str
    wildcards: tuple[bool, ...]
    is_anchored: bool

    def matches(self, path: str) -> bool:
        """Return whether PEFT would apply this key to the module at `path`."""
        start = len(path) - len(self.text)
        if start < 0 or (start > 0 and (self.is_anchored or path[start - 1] != ".")):
            return False
        pairs = zip(self.text, path[start:], self.wildcards, strict=True)
        return all(wildcard or wanted == found for wanted, found, wildcard in pairs)


@dataclass(frozen=True, slots=True)
class Pattern(Generic[T]):
    """Values of one field by pattern key, in the order of the file: the first key that matches decides."""

    field: str
    entries: tuple[tuple[PatternKey, T], ...] = ()

    def of(self, path: str, default: T) -> T:
        """Return the value for the module at `path`."""
        return next((value for key, value in self.entries if key.matches(path)), default)

    def unused(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Return the keys that decide nothing for these modules, as `field[key]`."""
        keys = [key for key, _ in self.entries]
        deciding = {next((key.key for key in keys if key.matches(path)), None) for path in paths}
        return tuple(f"{self.field}[{key.key}]" for key in keys if key.key not in deciding)


def parse_pattern_key(key: str, field: str) -> PatternKey:
    """Read one key of `rank_pattern` or `alpha_pattern`.

    Raises:
        UnsupportedAdapter: the key needs a regex engine; `param` is `field`.
    """
    if len(key) > 256 or not _PATTERN_KEY.match(key):
        raise UnsupportedAdapter(
            f"{field} holds the key {ascii(key)[:80]}, a regular expression; "
            "only plain module names such as 'q_proj' or 'layers.0.self_attn.q_proj' are read",
            param=field,
        )
    body = key.removeprefix("^").removesuffix("$")
    # an escaped dot is marked with a character that no name holds
    marked = body.replace("\\.", "/")
    return PatternKey(
        key=key,
        text=marked.replace("/", "."),
        wildcards=tuple(character == "." for character in marked),
        is_anchored=key.startswith("^"),
    )


def read_names(value: Json, field: str) -> tuple[str, ...]:
    """Read a list of plain module names (nothing reads as an empty list).

    Raises:
        UnsupportedAdapter: not a list of plain names; `param` is `field`.
    """
    names = [] if value is None else value
    if isinstance(names, str):
        raise UnsupportedAdapter(
            f"{field} is the text {ascii(names)[:80]}, which PEFT reads as a regular expression; "
            "write the list of module names instead, such as ['q_proj', 'v_proj']",
            param=field,
        )
    if not isinstance(names, list) or len(names) > MAX_ENTRIES:
        raise UnsupportedAdapter(f"{field} must be a list of at most {MAX_ENTRIES} module names", param=field)
    plain: list[str] = []
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name):
            raise UnsupportedAdapter(f"{field} holds {ascii(name)[:80]}, which is not a module name", param=field)
        plain.append(name)
    return tuple(plain)


def is_plain_name(text: str) -> bool:
    """Return whether a text is a dotted module name, which as a regular expression means itself."""
    return len(text) <= 256 and _PLAIN_NAME.match(text) is not None


def names_module(name: str, path: str) -> bool:
    """Return whether an entry of `target_modules` or `exclude_modules` means the module at `path`."""
    return path == name or path.endswith(f".{name}")
