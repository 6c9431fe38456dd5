"""From a request's tools to a forced answer: plans, rewritten messages, and grammars that the parser reads."""

import asyncio
import json
import re
from typing import ClassVar

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from serve.api.grammar_gate import GrammarGate
from serve.api.structured import MAX_SCHEMA_DEPTH
from serve.api.tool_families import ToolFamily, detect_family
from serve.api.tool_parser import parse_complete
from serve.api.tools import Json, ToolPlan, plan_tools
from serve.config import LimitsConfig
from serve.engine.grammar import GrammarMasks
from serve.errors import InvalidRequest
from serve.messages import Grammar

WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Zürich"]}, "unit": {"$ref": "#/$defs/unit"}},
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["C", "F"]}},
        },
    },
}
STOP: Json = {"type": "function", "function": {"name": "stop_all"}}
FAMILIES = [ToolFamily.LLAMA3, ToolFamily.HERMES, ToolFamily.MISTRAL, ToolFamily.PLAIN]


def named(name: str) -> Json:
    return {"type": "function", "function": {"name": name}}


def tool(**function: object) -> Json:
    return {"type": "function", "function": {"name": "f", **function}}


DEEP: Json = {"type": "string"}
for _ in range(MAX_SCHEMA_DEPTH):
    DEEP = {"items": DEEP}

BAD: dict[str, tuple[list[object], object, str]] = {
    "not a function": ([{"type": "retrieval"}], None, "tools.0"),
    "no function": ([{"type": "function"}], None, "tools.0"),
    "no object": (["f"], None, "tools.0"),
    "no name": ([tool(name="")], None, "tools.0.function.name"),
    "name with a quote": ([tool(name='a", "b')], None, "tools.0.function.name"),
    "name with a line end": ([tool(name="a\n")], None, "tools.0.function.name"),
    "long name": ([tool(name="a" * 65)], None, "tools.0.function.name"),
    "twice": ([STOP, WEATHER, STOP], None, "tools.2.function.name"),
    "parameters that are a list": ([tool(parameters=[])], None, "tools.0.function.parameters"),
    "remote reference": ([tool(parameters={"$ref": "http://x/y"})], None, "tools.0.function.parameters"),
    "deep parameters": ([tool(parameters=DEEP)], None, "tools.0.function.parameters"),
    "129 tools": ([tool(name=f"f{i}") for i in range(129)], None, "tools"),
    "choice without tools": ([], "required", "tool_choice"),
    "named choice without tools": ([], named("f"), "tool_choice"),
    "choice of an unknown tool": ([STOP], named("rm"), "tool_choice"),
    "unknown choice": ([STOP], "always", "tool_choice"),
    "odd choice": ([STOP], {"type": "function"}, "tool_choice"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_tools_and_choices_are_refused_with_the_field(case: str) -> None:
    tools, choice, param = BAD[case]
    with pytest.raises(InvalidRequest) as caught:
        plan_tools(tools, choice, family=ToolFamily.HERMES)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_without_tools_nothing_changes() -> None:
    for choice in (None, "none", "auto"):
        plan = plan_tools(None, choice, family=ToolFamily.PLAIN)
        assert (plan.template_tools, plan.grammar, plan.parser()) == (None, None, None)
        assert plan.template_messages([{"role": "user", "content": "hi"}]) == [{"role": "user", "content": "hi"}]


def test_choice_none_hides_the_tools_and_auto_shows_them_unforced() -> None:
    hidden = plan_tools([WEATHER], "none", family=ToolFamily.HERMES)
    assert (hidden.template_tools, hidden.grammar, hidden.parser()) == (None, None, None)
    free = plan_tools([WEATHER], None, family=ToolFamily.HERMES)
    assert free.template_tools == [WEATHER] and free.grammar is None and free.parser() is not None


def test_a_template_without_tools_gets_them_in_its_system_message() -> None:
    plan = plan_tools([WEATHER], "auto", family=ToolFamily.PLAIN)
    assert plan.template_tools is None
    (system, user) = plan.template_messages([{"role": "user", "content": "hi {tools}"}])
    assert system["role"] == "system" and json.dumps(WEATHER, ensure_ascii=False) in str(system["content"])
    assert user == {"role": "user", "content": "hi {tools}"}
    (merged, _) = plan.template_messages([{"role": "system", "content": "Be kind."}, user])
    assert str(merged["content"]).startswith("Be kind.\n\n# Tools")


HISTORY: list[Json] = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "12 C"},
]


def test_earlier_calls_are_rewritten_for_each_family_and_the_request_is_left_alone() -> None:
    before = json.dumps(HISTORY)
    for family in (ToolFamily.LLAMA3, ToolFamily.HERMES):
        (_, call, result) = plan_tools(None, None, family=family).template_messages(HISTORY)
        assert call["content"] == "" and result == HISTORY[2]
        assert call["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}  # type: ignore[index]
    (_, call, result) = plan_tools(None, None, family=ToolFamily.MISTRAL).template_messages(HISTORY)
    assert re.fullmatch("[0-9a-f]{9}", str(result["tool_call_id"]))
    assert call["tool_calls"][0]["id"] == result["tool_call_id"]  # type: ignore[index]
    (_, call, result) = plan_tools(None, None, family=ToolFamily.PLAIN).template_messages(HISTORY)
    assert call == {
        "role": "assistant",
        "content": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>',
    }
    assert result == {"role": "user", "content": "<tool_response>\n12 C\n</tool_response>"}
    assert json.dumps(HISTORY) == before


def test_odd_history_does_not_break_the_rewriting() -> None:
    odd: list[Json] = [
        {"role": "assistant", "tool_calls": [None, {"function": None}, {"function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}], "tool_calls": []},
        {"role": "tool", "content": [{"type": "text", "text": "b"}]},
        {},
    ]
    for family in FAMILIES:
        assert len(plan_tools(None, None, family=family).template_messages(odd)) == 4


TEMPLATES = {
    "": ToolFamily.PLAIN,
    "{{ messages }}": ToolFamily.PLAIN,
    "{% if tools %}<tool_call>{% endif %}": ToolFamily.HERMES,
    "{% if tools %}<tool_call><function={% endif %}": ToolFamily.PLAIN,
    "{% if tools %}[AVAILABLE_TOOLS][TOOL_CALLS]{% endif %}": ToolFamily.MISTRAL,
    '<|start_header_id|>{% if tools %}{"name": .., "parameters": ..}{% endif %}': ToolFamily.LLAMA3,
    "{% if tools %}<|tool|>{% endif %}": ToolFamily.PLAIN,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_family_is_read_off_the_template(template: str) -> None:
    assert detect_family(template) is TEMPLATES[template]


class Speaker:
    """Says random text under a grammar with one token per printable character, and four control tokens."""

    CHARS: ClassVar[list[str]] = [chr(code) for code in range(32, 127)] + ["\n", "ü"]

    def __init__(self) -> None:
        vocab = {char: index for index, char in enumerate(self.CHARS)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.add_special_tokens(["[TOOL_CALLS]", "</s>"])
        # as in Qwen: added, but not marked special
        tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
        self.special = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
        self._masks = GrammarMasks(tokenizer.to_str(), len(self.CHARS) + 4, [self.special["</s>"]])

    def say(self, grammar: Grammar, seed: int) -> str:
        chooser = np.random.default_rng(seed)
        texts = {**dict(enumerate(self.CHARS)), **{token: text for text, token in self.special.items()}}
        self._masks.start("r", grammar)
        said = ""
        while len(said) < 2000:
            bits = np.unpackbits(self._masks.mask("r").view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits)
            token = int(chooser.choice(allowed))
            self._masks.accept("r", token)
            if token == self.special["</s>"]:
                break
            said += texts[token]
        self._masks.release("r")
        return said


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return Speaker()


def forced(family: ToolFamily, choice: str | Json, special: dict[str, int], *, parallel: bool = True) -> ToolPlan:
    return plan_tools([WEATHER, STOP], choice, family=family, parallel=parallel, special_token_ids=special)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_model_forced_to_call_says_calls_that_the_parser_reads(family: ToolFamily, speaker: Speaker) -> None:
    named_plan = forced(family, named("get_weather"), speaker.special)
    any_plan = forced(family, "required", speaker.special)
    for seed in range(5):
        for plan in (named_plan, any_plan):
            parser = plan.parser()
            assert plan.grammar is not None and parser is not None
            text = speaker.say(plan.grammar, seed)
            if len(text) >= 2000:
                continue
            answer = parse_complete(parser, text)
            assert answer.content is None and answer.calls, text
            assert plan is any_plan or len(answer.calls) == 1
            for call in answer.calls:
                arguments = json.loads(call.arguments)
                assert call.name in ("get_weather", "stop_all")
                if call.name == "get_weather":
                    assert arguments["city"] in ("Bern", "Zürich") and arguments["unit"] in ("C", "F")


def test_forcing_without_parallel_calls_ends_after_one(speaker: Speaker) -> None:
    for family in FAMILIES:
        plan = forced(family, "required", speaker.special, parallel=False)
        assert plan.grammar is not None
        text = speaker.say(plan.grammar, 3)
        assert text.count('"name": "get_weather"') + text.count('"name": "stop_all"') == 1


def test_a_tool_without_parameters_is_called_with_no_arguments(speaker: Speaker) -> None:
    for family in FAMILIES:
        plan = forced(family, named("stop_all"), speaker.special)
        parser = plan.parser()
        assert plan.grammar is not None and parser is not None
        (call,) = parse_complete(parser, speaker.say(plan.grammar, 1)).calls
        assert (call.name, json.loads(call.arguments)) == ("stop_all", {})


def test_forcing_grammars_pass_the_gate_and_strict_tools_may_not() -> None:
    async def run() -> None:
        gate = GrammarGate(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])), LimitsConfig())
        try:
            for family in FAMILIES:
                for special in ({}, {"[TOOL_CALLS]": 151_000, "<tool_call>": 151_001, "</tool_call>": 151_002}):
                    await gate.check(forced(family, "required", special).grammar, param="tools")
            unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
            loose = plan_tools([tool(parameters=unique)], "required", family=ToolFamily.HERMES)
            await gate.check(loose.grammar, param="tools")
            strict = plan_tools([tool(parameters=unique, strict=True)], "required", family=ToolFamily.HERMES)
            with pytest.raises(InvalidRequest, match="uniqueItems"):
                await gate.check(strict.grammar, param="tools")
        finally:
            await gate.close()

    asyncio.run(run())


def test_text_that_spells_a_control_token_is_never_answered_by_that_token(speaker: Speaker) -> None:
    assert speaker.say(Grammar("lark", 'start: "[TOOL_CALLS]"'), 0) == ""
