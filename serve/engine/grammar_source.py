"""A `Grammar` becomes llguidance's own text, with the limits under which it may be compiled.

Owns what the API's check and the engine's masks must agree on, and nothing else: neither numpy nor a tokenizer.
Invariant: a grammar that was checked under these limits compiles under them.
"""

import json

import llguidance

from serve.messages import Grammar

# one blank, or a new line and its indent: with free white space a weak model writes blanks until max_tokens
_JSON_WHITESPACE = r" |\n[ \t]{0,24}"


def source(grammar: Grammar) -> str:
    """Return llguidance's text of a grammar.

    Raises:
        ValueError: the kind is unknown, or a schema is not JSON.
    """
    if grammar.kind == "json_schema":
        return llguidance.LLMatcher.grammar_from_json_schema(
            grammar.text, defaults={"whitespace_pattern": _JSON_WHITESPACE}
        )
    if grammar.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return llguidance.LLMatcher.grammar_from_lark(grammar.text)
    raise ValueError(f"unknown kind of grammar {grammar.kind!r}")


def limits() -> llguidance.LLParserLimits:
    """Return the bounds of one matcher: about 100 MB of lexer states, 15 ms of CPU per token."""
    return llguidance.LLParserLimits(max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False)


def choice_grammar(choices: list[str]) -> str:
    """Return a Lark grammar that allows exactly these strings."""
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
