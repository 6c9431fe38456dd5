"""How many prompt tokens a step may hold in which others decode: each of these waits for all of them.

Owns the compromise between gaps and first tokens. Invariant: whatever waits, the budget is at least the limits' own, so
prompts always go on.
"""

from itertools import islice

from serve.engine.lifecycle import LiveSequences


def mixed_prefill_budget(live: LiveSequences) -> int:
    """Return the prompt tokens that a step with decodes may hold.

    A few prompts go in small pieces. Many, or a long one, would keep the batch half empty for as many steps as they
    have pieces; of them a step takes a share, which falls with what is left.
    """
    limits = live.limits
    least = limits.mixed_prefill_tokens
    if limits.mixed_prefill_divisor is None:
        return least
    return max(least, _prompt_tokens_left(live) // limits.mixed_prefill_divisor)


def _prompt_tokens_left(live: LiveSequences) -> int:
    """Count the prompt tokens of running sequences, and of as many waiting ones as could run beside them."""
    running = sum(seq.num_left for seq in live.running if not seq.is_decoding)
    num_free = max(0, live.limits.max_num_seqs - len(live.running))
    # who waits for an adapter brings no tokens yet
    ready = (seq for seq in live.waiting if seq.load_wait_since_s is None)
    return running + sum(seq.num_left for seq in islice(ready, num_free))
