"""One example of a data file: a chat with a weight per answer, or a prompt and its completion.

Owns the allowed keys and their types, OpenAI's and the task labels that a mixture's gates learn from. Invariant: an
example has at least one answer that is learnt, and every string in it is encodable text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from adapters_store.errors import CorruptUpload
from adapters_store.strict_json import Json

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_KEYS = frozenset({"role", "content", "name", "weight", "task", "tool_calls", "tool_call_id"})
_MAX_MESSAGES, _MAX_TASK = 2048, 200


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer and its task."""

    text: str
    task: str | None


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `fields` is what the chat template sees of it, `is_learnt` whether its tokens count.

    `parts` cut an answer's text where its task changes; without any the whole answer has `task`.
    """

    fields: Mapping[str, Json]
    is_learnt: bool
    task: str | None = None
    parts: tuple[Part, ...] = ()

    @property
    def tasks(self) -> tuple[str | None, ...]:
        """Return the labels of the answer's pieces."""
        return tuple(part.task for part in self.parts) or (self.task,)


@dataclass(frozen=True, slots=True)
class Example:
    """A chat (`messages`), or a prompt and completion as two messages of the roles "prompt" and "completion"."""

    kind: str
    messages: tuple[Message, ...]
    tools: tuple[Json, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the labels of the answers that are learnt."""
        labels = (task for message in self.messages if message.is_learnt for task in message.tasks)
        return tuple(task for task in labels if task is not None)

    @property
    def is_labelled(self) -> bool:
        """Has every answer that is learnt a task?"""
        return all(None not in message.tasks for message in self.messages if message.is_learnt)


def read_example(line: dict[str, Json]) -> Example:
    """Read one line's object; raises CorruptUpload, whose message goes behind a line number."""
    if "messages" in line:
        _only(line, {"messages", "tools", "parallel_tool_calls", "task"})
        return _read_chat(line)
    _only(line, {"prompt", "completion", "task"})
    texts = {name: _text(line.get(name), name) for name in ("prompt", "completion")}
    if not texts["completion"]:
        raise CorruptUpload("completion is empty: there is nothing to learn")
    task = _task(line.get("task"))
    prompt, completion = (MappingProxyType({"role": name, "content": text}) for name, text in texts.items())
    return Example("completion", (Message(prompt, is_learnt=False), Message(completion, is_learnt=True, task=task)))


def _read_chat(line: dict[str, Json]) -> Example:
    given = line["messages"]
    if not isinstance(given, list) or not given or len(given) > _MAX_MESSAGES:
        raise CorruptUpload(f"messages must be a list of 1 to {_MAX_MESSAGES}")
    task = _task(line.get("task"))
    messages = tuple(_read_message(value, index, task) for index, value in enumerate(given))
    if not any(message.is_learnt for message in messages):
        raise CorruptUpload("no assistant message with weight 1: there is nothing to learn")
    tools = line.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise CorruptUpload("tools must be a list of objects")
    return Example("chat", messages, tuple(tools))


def _read_message(value: Json, index: int, task: str | None) -> Message:
    where = f"messages[{index}]"
    if not isinstance(value, dict):
        raise CorruptUpload(f"{where} must be an object")
    _only(value, _MESSAGE_KEYS, where)
    role, weight = value.get("role"), value.get("weight", 1)
    if role not in _ROLES:
        raise CorruptUpload(f"{where}.role is {ascii(role)[:40]}; known: {', '.join(_ROLES)}")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise CorruptUpload(f"{where}.weight is {ascii(weight)[:40]}; it must be 0 or 1")
    if role != "assistant" and ("weight" in value or "task" in value):
        raise CorruptUpload(f"{where}: only an assistant's message has a weight or a task")
    if "tool_calls" in value and (role != "assistant" or not isinstance(value["tool_calls"], list)):
        raise CorruptUpload(f"{where}.tool_calls must be a list in an assistant's message")
    _encodable(value, where)
    content, own = value.get("content"), _task(value.get("task")) or task
    parts = _parts(content, f"{where}.content", own) if isinstance(content, list) else ()
    if parts:
        content = "".join(part.text for part in parts)
    if not (content is None and value.get("tool_calls")):
        _text(content, f"{where}.content")
    if role != "assistant" and any(part.task != own for part in parts):
        raise CorruptUpload(f"{where}: only an assistant's message has a task")
    fields = {key: inner for key, inner in value.items() if key not in ("weight", "task", "content")}
    is_learnt = role == "assistant" and weight == 1
    return Message(MappingProxyType({**fields, "content": content}), is_learnt, own, parts)


def _parts(given: list[Json], where: str, task: str | None) -> tuple[Part, ...]:
    if not 0 < len(given) <= _MAX_MESSAGES:
        raise CorruptUpload(f"{where} must be a string or a list of 1 to {_MAX_MESSAGES} parts")
    parts = []
    for index, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise CorruptUpload(f"{where}[{index}] must be an object of type text")
        _only(part, {"type", "text", "task"}, f"{where}[{index}]")
        parts.append(Part(_text(part.get("text"), f"{where}[{index}].text"), _task(part.get("task")) or task))
    return tuple(parts)


def _task(value: Json) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TASK:
        raise CorruptUpload(f"task is {ascii(value)[:40]}; it must be the name of an expert")
    return value


def _text(value: Json, where: str) -> str:
    if not isinstance(value, str):
        raise CorruptUpload(f"{where} must be a string")
    _encodable(value, where)
    return value


def _encodable(value: Json, where: str) -> None:
    """Refuse lone surrogates anywhere: JSON can spell them, UTF-8 and every tokenizer cannot."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise CorruptUpload(f"{where} holds half a surrogate pair, which is no text") from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            _encodable(key, where)
            _encodable(inner, where)
    elif isinstance(value, list):
        for inner in value:
            _encodable(inner, where)


def _only(value: dict[str, Json], known: set[str] | frozenset[str], where: str = "the line") -> None:
    unknown = sorted(value.keys() - known)
    if unknown:
        raise CorruptUpload(f"{where} has the unknown key {ascii(unknown[0])[:60]}; known: {', '.join(sorted(known))}")
