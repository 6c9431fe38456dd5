"""One page of a list that is in memory: what comes behind `after`, and whether there is more.

Owns OpenAI's four fields of a page. Invariant: pages by `last_id` are the whole list, each entry once.
"""

from collections.abc import Sequence

from serve.api.json_body import show
from serve.errors import InvalidValue

MAX_LIMIT = 10_000

Json = dict[str, object]


def page_of(cards: Sequence[Json], key: str, *, after: str | None, limit: int | None) -> Json:
    """Return a page; `key` is what identifies a card. Raises InvalidValue if no card is `after`."""
    ids = [str(card[key]) for card in cards]
    if after is not None and after not in ids:
        raise InvalidValue(
            f"'after' is {show(after)}, which this list does not have; use the last_id of the page before",
            param="after",
        )
    begin = 0 if after is None else ids.index(after) + 1
    end = len(ids) if limit is None else min(len(ids), begin + limit)
    shown = ids[begin:end]
    ends: Json = {"first_id": shown[0] if shown else None, "last_id": shown[-1] if shown else None}
    return {"object": "list", "data": list(cards[begin:end]), **ends, "has_more": end < len(ids)}
