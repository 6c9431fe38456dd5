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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.api.structured import check_schema
from serve.api.tool_families import ToolFamily, rewrite_messages
from serve.api.tool_grammar import AllowedTool, forcing_grammar
from serve.api.tool_parser import ToolParser
from serve.errors import InvalidRequest
from serve.messages import Grammar

Json = dict[str, object]

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What to do with one request's tools; a request without tools has a plan that changes nothing but history."""

    family: ToolFamily
    # the request's tools that the model may see
    tools: Sequence[Json]
    # forces the answer to be calls; None: the model is free
    grammar: Grammar | None
    # the tools that may be called; empty: calls are not looked for
    tool_names: frozenset[str]
    parallel: bool

    @property
    def template_tools(self) -> list[Json] | None:
        """What the template gets as `tools`; None: nothing."""
        return list(self.tools) if self.tools and self.family is not ToolFamily.PLAIN else None

    def template_messages(self, messages: Sequence[Json]) -> list[Json]:
        """Rewrite messages into what this template reads: earlier calls, their results, the tools' system text."""
        return rewrite_messages(self.family, messages, self.tools)

    def parser(self) -> ToolParser | None:
        """Return a fresh reader of the model's text; None when the request has no tools or forbids calls."""
        return ToolParser(self.family, self.tool_names, parallel=self.parallel) if self.tool_names else None


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
        special_token_ids: text to id of the tokenizer's added tokens: a forced call opens with the real one.
    Raises:
        InvalidRequest: a bad tool, a doubled name, a choice without tools or of an unknown name; `param` names it.
    """
    allowed = _read_tools(tools or [])
    if not allowed and tool_choice not in (None, "none", "auto"):
        raise InvalidRequest("tool_choice is only allowed together with tools", param="tool_choice")
    if not allowed or tool_choice == "none":
        return ToolPlan(family, (), None, frozenset(), parallel)
    chosen = _choose(allowed, tool_choice)
    is_forced = tool_choice not in (None, "auto")
    grammar = None
    if is_forced:
        one_call = not parallel or isinstance(tool_choice, dict)
        grammar = forcing_grammar(chosen, family, special_token_ids or {}, parallel=not one_call)
    return ToolPlan(family, tuple(tools or ()), grammar, frozenset(tool.name for tool in chosen), parallel)


def _read_tools(tools: Sequence[Json]) -> list[AllowedTool]:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(tools)} tools were sent; the limit is {MAX_TOOLS}", param="tools")
    allowed = [_read_tool(index, tool) for index, tool in enumerate(tools)]
    names = [tool.name for tool in allowed]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(f"the tool {name!r} is defined twice", param=f"tools.{index}.function.name")
    return allowed


def _read_tool(index: int, tool: Json) -> AllowedTool:
    param = f"tools.{index}"
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(function, dict):
        raise InvalidRequest(f"{param} must be {{'type': 'function', 'function': {{...}}}}", param=param)
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.match(name):
        raise InvalidRequest(
            f"{param}.function.name must be 1 to 64 letters, digits, '_' or '-'", param=f"{param}.function.name"
        )
    parameters = function.get("parameters")
    if parameters is None:
        # OpenAI: without `parameters` a function takes none
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"{param}.function.parameters must be a JSON schema", param=f"{param}.function.parameters")
    check_schema(parameters, f"{param}.function.parameters")
    return AllowedTool(name, parameters, function.get("strict") is True)


def _choose(allowed: list[AllowedTool], tool_choice: str | Json | None) -> list[AllowedTool]:
    if tool_choice in (None, "auto", "required"):
        return allowed
    function = tool_choice.get("function") if isinstance(tool_choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequest(
            "tool_choice must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}",
            param="tool_choice",
        )
    chosen = [tool for tool in allowed if tool.name == name]
    if not chosen:
        raise InvalidRequest(f"tool_choice names {name[:64]!a}, which is not among the tools", param="tool_choice")
    return chosen
