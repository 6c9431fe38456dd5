"""The grammar that forces an answer to be tool calls, in the framing that the template's family reads.

Owns the Lark text only. Invariant: every text of the grammar is read by `tool_parser` as calls of the allowed tools,
with arguments of their schemas.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.api.tool_families import FRAMINGS, ToolFamily
from serve.messages import Grammar

Json = dict[str, object]

# what models write: json.dumps's own separators, and no other white space
_COMPACT: Json = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class AllowedTool:
    """One tool that may be called: its arguments' schema; `is_strict` refuses keywords that cannot be enforced."""

    name: str
    parameters: Json
    is_strict: bool


def forcing_grammar(
    tools: Sequence[AllowedTool], family: ToolFamily, special_token_ids: Mapping[str, int], *, parallel: bool
) -> Grammar:
    """Return the grammar of one or more calls (exactly one if not `parallel`)."""
    framing = FRAMINGS[family]
    opener = _spelt(framing.opener, special_token_ids)
    if framing.is_list:
        more = ' (", " call)*' if parallel else ""
        start = f'{opener} "[" call{more} "]"'
    elif framing.may_be_bare:
        # Llama 3 calls one tool at a time, without the opener
        start = "call"
    else:
        framed = f'{opener} "\\n" call "\\n" {_spelt(framing.closer, special_token_ids)}'
        start = f'{framed} ("\\n" {framed})*' if parallel else framed
    calls = " | ".join(f"call_{index}" for index in range(len(tools)))
    rules = [_call_rule(index, tool, framing.arguments_key) for index, tool in enumerate(tools)]
    return Grammar("lark", "\n".join([f"start: {start}", f"call: {calls}", *rules]) + "\n")


def _call_rule(index: int, tool: AllowedTool, arguments_key: str) -> str:
    head = json.dumps(f'{{"name": "{tool.name}", "{arguments_key}": ')
    options = _COMPACT if tool.is_strict else _COMPACT | {"lenient": True}
    # the schema stays a root of its own: its '#/...' references point into it
    schema = {"type": "object"} | tool.parameters | {"x-guidance": options}
    return f'call_{index}: {head} %json {json.dumps(schema, ensure_ascii=False)} "}}"'


def _spelt(text: str, special_token_ids: Mapping[str, int]) -> str:
    token_id = special_token_ids.get(text)
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"
