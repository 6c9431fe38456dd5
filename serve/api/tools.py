"""The plan of one chat request's tools: what the template gets, what is forced, who reads the answer.

Owns the decision only; `tool_families` knows each family's framing, `tool_grammar` writes the forcing grammar and
`tool_parser` reads the model's text. Invariant: nothing here runs or evaluates what the model wrote.

How `chat.py` uses it:
    family = detect_family(chat_template)                       # once, at start
    plan = plan_tools(tools, tool_choice, family=family, parallel=..., special_token_ids=...)
    messages = plan.template_messages(messages)                 # always: also rewrites the history of earlier calls
    render(messages, tools=plan.template_tools)                 # None: do not pass tools
    sampling.grammar = plan.grammar or response_format's        # check it with `GrammarGate.check` like any other
    parser = plan.parser()                                      # None: plain text; else decode WITH special tokens
    for text in stream: for delta in parser.feed(text): ...     # ContentDelta | CallDelta
    for delta in parser.finish(): ...                           # then parser.num_calls > 0 -> finish_reason tool_calls
    answer = parse_complete(parser, text)                       # not streaming: content and calls at once
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.api.tool_families import ToolFamily
from serve.api.tool_parser import ToolParser
from serve.messages import Grammar

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What to do with one request's tools; a request without tools has a plan that changes nothing but history."""

    family: ToolFamily
    # what the template gets as `tools`; None: nothing
    template_tools: list[Json] | None
    # forces the answer to be calls; None: the model is free
    grammar: Grammar | None
    tool_names: frozenset[str]
    parallel: bool

    def template_messages(self, messages: Sequence[Json]) -> list[Json]:
        """Rewrite messages into what this template reads: earlier calls, their results, the system text of the tools."""
        return list(messages)

    def parser(self) -> ToolParser | None:
        """Return a fresh reader of the model's text; None when the request has no tools or forbids calls."""
        return None


def plan_tools(
    tools: Sequence[Json] | None,
    tool_choice: str | Json | None,
    *,
    family: ToolFamily,
    parallel: bool = True,
    special_token_ids: Mapping[str, int] | None = None,
) -> ToolPlan:
    """Check a request's tools and decide.

    Args:
        tools: OpenAI's `tools`, as sent (plain JSON objects).
        tool_choice: "none", "auto", "required" or `{"type": "function", "function": {"name": ...}}`; None means auto.
        special_token_ids: text to id of the tokenizer's special added tokens: a forced call opens with the real one.
    Raises:
        InvalidRequest: a bad tool, a doubled name, a choice without tools or of an unknown name; `param` names it.
    """
    return ToolPlan(family, list(tools) if tools else None, None, frozenset(), parallel)
