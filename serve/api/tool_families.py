"""How each family of chat templates spells tool calls, and what its messages must look like.

Owns the framings and the rewriting of messages for a template; reading the model's text is `tool_parser`'s matter.
Invariant: a client's messages are never changed in place.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

Json = dict[str, object]


class ToolFamily(StrEnum):
    """Which spelling a template's model was trained on; PLAIN: the template knows no tools, Hermes is used."""

    LLAMA3 = "llama3"
    HERMES = "hermes"
    MISTRAL = "mistral"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Framing:
    """The text around calls; each call is an object with `name` and `arguments_key`."""

    opener: str
    # follows each call; "": nothing
    closer: str
    arguments_key: str
    # an answer that begins with a brace is a call without the opener
    may_be_bare: bool
    # the calls stand in one array behind one opener
    is_list: bool


_HERMES = Framing("<tool_call>", "</tool_call>", "arguments", may_be_bare=False, is_list=False)
FRAMINGS: Mapping[ToolFamily, Framing] = {
    ToolFamily.LLAMA3: Framing("<|python_tag|>", "", "parameters", may_be_bare=True, is_list=False),
    ToolFamily.HERMES: _HERMES,
    ToolFamily.MISTRAL: Framing("[TOOL_CALLS]", "", "arguments", may_be_bare=False, is_list=True),
    ToolFamily.PLAIN: _HERMES,
}

_TOOLS_TEXT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def detect_family(chat_template: str | None) -> ToolFamily:
    """Read the family off the template's text; a spelling that is not read here counts as no tools."""
    text = chat_template or ""
    if "tools" not in text:
        return ToolFamily.PLAIN
    if "[TOOL_CALLS]" in text and "[ARGS]" not in text:
        return ToolFamily.MISTRAL
    # Qwen3-Coder writes XML inside the same tag
    if "<tool_call>" in text and "<function=" not in text:
        return ToolFamily.HERMES
    if "<|start_header_id|>" in text and '"parameters"' in text:
        return ToolFamily.LLAMA3
    return ToolFamily.PLAIN


def rewrite_messages(family: ToolFamily, messages: Sequence[Json], tools: Sequence[Json]) -> list[Json]:
    """Return the messages as this family's template reads them.

    Arguments of earlier calls become objects (OpenAI sends text); Mistral's call ids become its nine characters; a
    template without tools gets calls and results as text, and `tools` in the system message.
    """
    rewritten = [_with_objects(message) for message in messages]
    if family is ToolFamily.MISTRAL:
        return [_with_short_ids(message) for message in rewritten]
    if family is not ToolFamily.PLAIN:
        return rewritten
    flat = [_flat(message) for message in rewritten]
    return _with_tools_text(flat, tools) if tools else flat


def _with_objects(message: Json) -> Json:
    calls = message.get("tool_calls")
    if message.get("role") != "assistant" or not isinstance(calls, list) or not calls:
        return message
    return message | {
        "content": message.get("content") or "",
        "tool_calls": [_call_with_object(call) for call in calls],
    }


def _call_with_object(call: object) -> object:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        return call
    try:
        arguments = json.loads(str(function.get("arguments") or "{}"))
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def _with_short_ids(message: Json) -> Json:
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message = message | {"tool_calls": [_short_id(call, "id") for call in calls]}
    return _short_id(message, "tool_call_id")


def _short_id(value: Json, key: str) -> Json:
    if not isinstance(value, dict) or key not in value:
        return value
    return value | {key: hashlib.sha256(str(value[key]).encode("utf-8", "replace")).hexdigest()[:9]}


def _flat(message: Json) -> Json:
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return message
    pieces = [text] if (text := _text(message.get("content"))) else []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            spelt = json.dumps(
                {"name": function.get("name"), "arguments": function.get("arguments")}, ensure_ascii=False
            )
            pieces.append(f"<tool_call>\n{spelt}\n</tool_call>")
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return kept | {"content": "\n".join(pieces)}


def _with_tools_text(messages: list[Json], tools: Sequence[Json]) -> list[Json]:
    text = _TOOLS_TEXT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if messages and messages[0].get("role") in ("system", "developer"):
        first = messages[0] | {"content": f"{_text(messages[0].get('content'))}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _text(content: object) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
