"""Structured output: which grammar a request asks for, and whether it may be compiled.

How `chat.py` and `completions.py` use it:
    grammar = requested_grammar(response_format, structured_outputs, limits)   # pure; InvalidRequest on bad ones
    await gate.check(grammar)                                                  # bounded compile; InvalidRequest too
`gate` is one `GrammarGate` in the API's state: GrammarGate(tokenizer_json, vocab_size, limits); `await gate.close()`.
"""

from serve.config import LimitsConfig
from serve.messages import Grammar

Json = dict[str, object]


def requested_grammar(
    response_format: Json | None, structured_outputs: Json | None, limits: LimitsConfig
) -> Grammar | None:
    """Return the grammar that `response_format` or `structured_outputs` (json | regex | choice | grammar) asks for.

    Raises:
        InvalidRequest: both are given, a type is unknown, the schema is missing, too large, too deep or has a remote $ref.
    """
    return None


class GrammarGate:
    """Compiles each new grammar once, in a bounded way, before it may reach the engine."""

    def __init__(self, tokenizer_json: str, vocab_size: int, limits: LimitsConfig) -> None:
        self._limits = limits

    async def check(self, grammar: Grammar | None, *, param: str = "response_format") -> None:
        """Refuse a grammar that does not compile within the limits.

        Raises:
            InvalidRequest: it is wrong or too costly; the message says why.
        """

    async def close(self) -> None:
        """Stop the helper process."""
