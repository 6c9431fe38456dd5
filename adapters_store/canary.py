"""Which requests of a name get its canary: always the same ones.

Owns the drawing, which is pure. Invariants: it depends on nothing but the canary's digest, the name and the id, so
every replica draws alike and nobody has to remember anything; with a growing share requests only ever
move to the canary.
"""

import hashlib
import json
from dataclasses import dataclass

from adapters_store.pointers import ALL, Sticky


@dataclass(frozen=True, slots=True)
class StickyId:
    """Whose request it is, in both ways that a canary may count: by user (each request alone without one), by key."""

    user: str
    key: str

    def of(self, sticky: Sticky) -> str:
        """Return the id that such a canary goes by."""
        return self.user if sticky is Sticky.USER else self.key


def place_of(salt: str, name: str, sticky_id: str) -> int:
    """Return the place of an id among `ALL`: those below the canary's share get the canary.

    Args:
        salt: the canary's digest, so that it is not always the same users who try what is new.
    """
    # JSON, because an id may hold any character
    text = json.dumps([salt, name, sticky_id]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") % ALL
