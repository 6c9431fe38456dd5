"""The prompts of a probe: short, the same for every upload of an adapter, and such that all of it must act.

Owns the choice of token ids only. Invariant: the ids follow from the base's vocabulary and the adapter's own facts
alone, so a proof can be repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NUM_PROMPTS = 2
_NUM_TOKENS = 16
_SEED = 20261121
# of the tokens that an adapter itself names, as many as fit beside plain ones into all prompts
MAX_OWN_TOKENS = 16

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the prompts must hold.

    Attributes:
        invocation: a run of tokens that switches the adapter on; empty: it is always on.
        trained: tokens whose embedding or output row the adapter replaces.
        max_tokens: the longest prompt that the engine takes.
    """

    vocab_size: int
    max_tokens: int
    invocation: tuple[int, ...] = ()
    trained: tuple[int, ...] = ()


def choose_prompts(wishes: Wishes) -> tuple[Prompt, ...]:
    """Return two prompts of about 16 tokens; an invocation stands inside each, so both of its sides are compared."""
    random = np.random.default_rng(_SEED)
    length = min(_NUM_TOKENS + len(wishes.invocation), wishes.max_tokens)
    prompts = []
    for number in range(_NUM_PROMPTS):
        ids = [int(token) for token in random.integers(0, wishes.vocab_size, length)]
        # with few of them, every prompt has some
        _plant(ids, wishes.trained[number::_NUM_PROMPTS] or wishes.trained)
        if wishes.invocation:
            # the last match counts: the second prompt has two
            for begin in {length // 2, 0 if number else length // 2}:
                ids[begin : begin + len(wishes.invocation)] = wishes.invocation
        prompts.append(tuple(ids[:length]))
    return tuple(prompts)


def _plant(ids: list[int], own: Sequence[int]) -> None:
    """Put an adapter's own tokens at every second place."""
    for place, token in zip(range(1, len(ids), 2), own, strict=False):
        ids[place] = token
