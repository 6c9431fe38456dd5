"""Structured output: which grammar a request asks for.

Owns the reading of `response_format` and `structured_outputs` and the caps on what they may hold; whether a grammar
compiles is `GrammarGate`'s verdict. Invariant: a request that asks for a form gets that form or a 400, never free text.

How `chat.py` and `completions.py` use it:
    grammar = requested_grammar(response_format, structured_outputs, limits)   # pure; InvalidRequest on bad ones
    await gate.check(grammar)                                                  # bounded compile; InvalidRequest too
"""

import json
from collections.abc import Mapping

from serve.config import LimitsConfig
from serve.engine.grammar_source import choice_grammar
from serve.errors import InvalidRequest
from serve.messages import Grammar

JsonObject = Mapping[str, object]

MAX_SCHEMA_DEPTH = 32
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')


def requested_grammar(
    response_format: JsonObject | None, structured_outputs: JsonObject | None, limits: LimitsConfig
) -> Grammar | None:
    """Return the grammar that `response_format` or `structured_outputs` (json | regex | choice | grammar) asks for.

    Raises:
        InvalidRequest: both are given, a type is unknown, the schema is missing, too large, too deep or refers abroad.
    """
    formatted = _from_response_format(response_format, limits) if response_format is not None else None
    structured = _from_structured_outputs(structured_outputs, limits) if structured_outputs is not None else None
    if formatted is not None and structured is not None:
        raise InvalidRequest(
            "response_format and structured_outputs both ask for a form; send one of them", param="structured_outputs"
        )
    return formatted or structured


def grammar_param(structured_outputs: JsonObject | None) -> str:
    """Return the field that a request's grammar came from."""
    return "response_format" if structured_outputs is None else "structured_outputs"


def schema_grammar(schema: object, limits: LimitsConfig, param: str, *, lenient: bool) -> Grammar:
    """Return the grammar of a JSON schema.

    Args:
        lenient: ignore keywords that cannot be enforced; otherwise they are refused when the grammar is compiled.
    Raises:
        InvalidRequest: not a schema, too large, too deep, or with a reference out of itself.
    """
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{param} must be a JSON schema: an object", param=param)
    check_schema(schema, param)
    # a client's own compiler options would undo ours
    options = {"x-guidance": {"lenient": True}} if lenient else {}
    own = {key: value for key, value in schema.items() if key != "x-guidance"}
    return _bounded(Grammar("json_schema", json.dumps(own | options, ensure_ascii=False)), limits, param)


def _from_response_format(response_format: JsonObject, limits: LimitsConfig) -> Grammar | None:
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    if kind != "json_schema":
        raise InvalidRequest(
            "response_format.type must be 'text', 'json_object' or 'json_schema'", param="response_format.type"
        )
    described = response_format.get("json_schema")
    if not isinstance(described, dict) or "schema" not in described:
        raise InvalidRequest(
            "response_format of type 'json_schema' needs json_schema.schema", param="response_format.json_schema"
        )
    lenient = described.get("strict") is not True
    return schema_grammar(described["schema"], limits, "response_format.json_schema.schema", lenient=lenient)


def _from_structured_outputs(asked: JsonObject, limits: LimitsConfig) -> Grammar | None:
    given = {name: value for name, value in asked.items() if value is not None and value is not False}
    if len(given) != 1:
        raise InvalidRequest(
            "structured_outputs needs exactly one of 'json', 'json_object', 'regex', 'choice' and 'grammar'",
            param="structured_outputs",
        )
    ((name, value),) = given.items()
    param = f"structured_outputs.{name[:32]}"
    if name == "json_object" and value is True:
        return _ANY_OBJECT
    if name == "json":
        return schema_grammar(_parsed(value, param), limits, param, lenient=False)
    if name == "choice":
        return _bounded(_choices(value, param), limits, param)
    if name not in ("regex", "grammar") or not isinstance(value, str) or not value:
        raise InvalidRequest(f"{param} is not supported, or not of the right kind", param=param)
    if name == "regex":
        return _bounded(Grammar("regex", value), limits, param)
    if "<[" in value:
        raise InvalidRequest(f"{param} may not name tokens by their ids; write text in quotes", param=param)
    return _bounded(Grammar("lark", value), limits, param)


def _parsed(schema: object, param: str) -> object:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{param} is a string, but not one of JSON", param=param) from None


def _choices(value: object, param: str) -> Grammar:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise InvalidRequest(f"{param} must be a list of strings, none of them empty", param=param)
    return Grammar("lark", choice_grammar(value))


def _bounded(grammar: Grammar, limits: LimitsConfig, param: str) -> Grammar:
    num_bytes = len(grammar.text.encode("utf-8", "replace"))
    if num_bytes > limits.max_grammar_bytes:
        raise InvalidRequest(
            f"{param} has {num_bytes} bytes; the limit is {limits.max_grammar_bytes}; split or simplify it", param=param
        )
    return grammar


def check_schema(schema: object, param: str) -> None:
    """Refuse a schema that nests too deep or refers out of itself; raises InvalidRequest naming `param`."""
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                _check_references(value, param)
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        if not inner:
            return
        level = inner
    raise InvalidRequest(f"{param} nests deeper than {MAX_SCHEMA_DEPTH} levels", param=param)


def _check_references(node: JsonObject, param: str) -> None:
    for key in _REFERENCES:
        target = node.get(key)
        if isinstance(target, str) and not target.startswith("#"):
            raise InvalidRequest(f"{param}: {key} may only point into the schema itself ('#/...')", param=param)
