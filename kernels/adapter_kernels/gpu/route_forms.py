"""The three forms of a route: how many rows a block holds, chosen by the number of rows alone.

Owns the limits; plain Python, so that the host side that packs steps needs no torch. Invariant: the form depends on
nothing but the number of rows, so a captured graph has one.
"""

_MAX_UNGROUPED_ROWS = 16
_MAX_SMALL_BLOCK_ROWS = 256
# rows of the largest step of each form but the last, which has no end
LARGEST_OF_FORM = (_MAX_UNGROUPED_ROWS, _MAX_SMALL_BLOCK_ROWS)


def block_rows_for(num_rows: int) -> int:
    """Return how many rows a block holds in a step of `num_rows` rows: 1 (not grouped), 16 or 64."""
    if num_rows <= _MAX_UNGROUPED_ROWS:
        return 1
    return 16 if num_rows <= _MAX_SMALL_BLOCK_ROWS else 64
