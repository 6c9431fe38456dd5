"""R14: hostile schemas, regexes and grammars are refused in bounded time and memory; good ones pass."""

import asyncio
import json
import time

import pytest
from tokenizers import Tokenizer, models

from serve.api.grammar_gate import GrammarGate
from serve.api.structured import requested_grammar
from serve.config import LimitsConfig
from serve.errors import InvalidRequest
from serve.messages import Grammar

LIMITS = LimitsConfig()


@pytest.fixture(autouse=True)
def _processor_time_alone_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no grammar be refused because this machine does much else."""
    monkeypatch.setattr("serve.api.grammar_gate._WALL_S", 240.0)


def ask(schema: object, *, strict: bool = True) -> Grammar | None:
    described = {"name": "answer", "strict": strict, "schema": schema}
    return requested_grammar({"type": "json_schema", "json_schema": described}, None, LIMITS)


def structured(**asked: object) -> Grammar | None:
    return requested_grammar(None, asked, LIMITS)


def byte_tokenizer(alphabet: str = "") -> Tokenizer:
    vocab = {char: index for index, char in enumerate(alphabet or [chr(code) for code in range(32, 127)])}
    return Tokenizer(models.BPE(vocab=vocab, merges=[]))


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


REFUSED_BEFORE_COMPILING = {
    "no schema": lambda: requested_grammar({"type": "json_schema"}, None, LIMITS),
    "schema that is no object": lambda: ask([1]),
    "unknown type": lambda: requested_grammar({"type": "xml"}, None, LIMITS),
    "no type": lambda: requested_grammar({}, None, LIMITS),
    "10 MB schema": lambda: ask({"enum": ["x" * (10 << 20)]}),
    "a million enum values": lambda: ask({"enum": list(range(1_000_000))}),
    "nesting past the limit": lambda: ask(nested(40)),
    "nesting of 100,000": lambda: structured(json="[" * 100_000),
    "remote reference": lambda: ask({"$ref": "http://169.254.169.254/latest"}),
    "file reference": lambda: ask({"properties": {"a": {"$ref": "file:///etc/passwd"}}}),
    "relative reference": lambda: ask({"items": {"$ref": "other.json"}}),
    "remote dynamic reference": lambda: ask({"$dynamicRef": "https://example.org/x"}),
    "two forms": lambda: requested_grammar({"type": "json_object"}, {"regex": "a"}, LIMITS),
    "two structured forms": lambda: structured(regex="a", choice=["a"]),
    "nothing asked": lambda: structured(),
    "unknown form": lambda: structured(path="/etc/passwd"),
    "regex that is no string": lambda: structured(regex=7),
    "empty choice": lambda: structured(choice=[]),
    "choice of numbers": lambda: structured(choice=[1, 2]),
    "control tokens by id": lambda: structured(grammar="start: <[0]>"),
    "string that is not JSON": lambda: structured(json="{"),
}


@pytest.mark.parametrize("case", REFUSED_BEFORE_COMPILING, ids=str)
def test_what_is_no_grammar_is_refused_before_it_is_compiled(case: str) -> None:
    started_s = time.monotonic()
    with pytest.raises(InvalidRequest) as caught:
        REFUSED_BEFORE_COMPILING[case]()
    assert caught.value.param is not None
    assert time.monotonic() - started_s < 240


HOSTILE = {
    "undefined rule": Grammar("lark", "start: nothing"),
    "rule of itself": Grammar("lark", "start: x\nx: x"),
    "garbage": Grammar("lark", "}}}{{{"),
    "bad regex": Grammar("regex", "(((("),
    "regex nested 5,000 deep": Grammar("regex", "(" * 5000 + "a" + ")" * 5000),
    "reference loop of 2,000": Grammar(
        "json_schema",
        json.dumps({"$ref": "#/$defs/0"} | {"$defs": {i: {"$ref": f"#/$defs/{(i + 1) % 2000}"} for i in range(2000)}}),
    ),
    "reference to itself": Grammar("json_schema", '{"$ref":"#"}'),
    "reference to nothing": Grammar("json_schema", '{"$ref":"#/$defs/none"}'),
    "pattern properties that overlap": Grammar(
        "json_schema", json.dumps({"type": "object", "patternProperties": {f"^(a{i}.*b)+$": {} for i in range(300)}})
    ),
    "product of alternatives": Grammar(
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"required": [f"p{i}{j}"]} for j in range(4)]} for i in range(12)]}),
    ),
    "a multiple of a large number": Grammar("json_schema", '{"type":"integer","multipleOf":123456789}'),
    # small enough for the memory limit
    "a second of CPU": Grammar("json_schema", '{"type":"integer","multipleOf":119993}'),
    "unknown keyword": Grammar("json_schema", '{"type":"array","uniqueItems":true}'),
    "false schema": Grammar("json_schema", '{"not":{}}'),
}
COSTLY = {"a multiple of a large number", "a second of CPU"}

HARMLESS = {
    # a large vocabulary exceeds the engine's own limits here, which ends the answer (see test_grammar_masks)
    "product of repetitions": Grammar("regex", "(.{0,6000}){0,1000}"),
    "nested quantifier": Grammar("regex", "(a+)+$"),
    "long repetition": Grammar("regex", ".{0,100000}"),
    "exponential automaton": Grammar("regex", "(a|b)*a(a|b){25}"),
    "unicode classes": Grammar("regex", r"\p{L}{1,50}[^\p{Lu}]{1,50}"),
    "left recursion": Grammar("lark", 'start: start "a" | "a"'),
    "ambiguous left recursion": Grammar("lark", 'start: start start | "a" | "b"'),
    "recursive schema": Grammar(
        "json_schema",
        '{"$ref":"#/$defs/n","$defs":{"n":{"type":"object","properties":{"next":{"$ref":"#/$defs/n"}}}}}',
    ),
    "long array": Grammar("json_schema", '{"type":"array","minItems":100000,"items":{"type":"integer"}}'),
    "control tokens of our own": Grammar("lark", 'start: <[151657]> "a"'),
}


def test_hostile_grammars_are_refused_and_the_gate_stays_open() -> None:
    async def run() -> None:
        gate = GrammarGate(byte_tokenizer(), LIMITS)
        good = Grammar("regex", "[a-z]+")
        try:
            for name, grammar in HOSTILE.items():
                started_s = time.monotonic()
                with pytest.raises(InvalidRequest) as caught:
                    await gate.check(grammar, param="response_format")
                assert caught.value.param == "response_format", name
                assert "\n" not in caught.value.message and "/src/" not in caught.value.message, name
                assert (name in COSTLY) <= ("ms of CPU" in caught.value.message), name
                assert time.monotonic() - started_s < 240, name
                await gate.check(good)
        finally:
            await gate.close()

    asyncio.run(run())


def test_harmless_grammars_that_look_hostile_pass() -> None:
    async def run() -> None:
        gate = GrammarGate(byte_tokenizer(), LIMITS)
        try:
            for grammar in HARMLESS.values():
                await gate.check(grammar)
        finally:
            await gate.close()

    asyncio.run(run())


def test_a_client_that_leaves_during_the_check_does_not_shift_the_answers() -> None:
    async def run() -> None:
        gate = GrammarGate(byte_tokenizer(), LIMITS)
        try:
            await gate.check(Grammar("regex", "warm"))
            for attempt in range(5):
                leaving = asyncio.create_task(gate.check(Grammar("regex", f"good{attempt}")))
                # enough turns for its question to be on its way
                for _ in range(attempt):
                    await asyncio.sleep(0)
                leaving.cancel()
                with pytest.raises(InvalidRequest, match="unknown name"):
                    await gate.check(Grammar("lark", f"start: nothing_{attempt}"))
                await gate.check(Grammar("regex", f"fine{attempt}"))
        finally:
            await gate.close()

    asyncio.run(run())


def test_a_verdict_is_kept_and_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.api.grammar_gate._MAX_VERDICTS", 10)

    async def run() -> None:
        gate = GrammarGate(byte_tokenizer(), LIMITS)
        try:
            for index in range(30):
                await gate.check(Grammar("regex", f"a{index}"))
            assert len(gate._verdicts) == 10
        finally:
            await gate.close()

    asyncio.run(run())


def test_json_is_refused_where_the_tokenizer_cannot_write_it() -> None:
    async def run() -> None:
        gate = GrammarGate(byte_tokenizer("abcdefgh "), LIMITS)
        with pytest.raises(InvalidRequest, match="no tokens for JSON"):
            await gate.check(Grammar("json_schema", '{"type":"object"}'))

    asyncio.run(run())


def test_the_forms_of_the_api_become_grammars() -> None:
    assert requested_grammar(None, None, LIMITS) is None
    assert requested_grammar({"type": "text"}, None, LIMITS) is None
    assert requested_grammar({"type": "json_object"}, None, LIMITS) == Grammar("json_schema", '{"type":"object"}')
    assert structured(json_object=True) == Grammar("json_schema", '{"type":"object"}')
    assert structured(regex="a+") == Grammar("regex", "a+")
    assert structured(choice=["ja", 'n"ein', "é\\"]) == Grammar("lark", 'start: "ja" | "n\\"ein" | "é\\\\"')
    assert structured(json='{"type":"null"}') == structured(json={"type": "null"})
    assert structured(grammar='start: "x"') == Grammar("lark", 'start: "x"')


def test_a_strict_schema_is_kept_whole_and_a_loose_one_may_drop_keywords() -> None:
    schema = {"type": "array", "uniqueItems": True, "x-guidance": {"whitespace_flexible": False}}
    strict, loose = ask(schema), ask(schema, strict=False)
    assert strict is not None and "x-guidance" not in strict.text
    assert loose is not None and json.loads(loose.text)["x-guidance"] == {"lenient": True}

    async def run() -> None:
        gate = GrammarGate(byte_tokenizer(), LIMITS)
        try:
            await gate.check(loose)
            with pytest.raises(InvalidRequest, match="uniqueItems"):
                await gate.check(strict)
        finally:
            await gate.close()

    asyncio.run(run())
