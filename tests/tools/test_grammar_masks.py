"""Random sampling under the mask always ends in a text of the grammar, on real tokenizers."""

import json
import re
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, models

from serve.engine.grammar import BitMask, GrammarMasks
from serve.messages import Grammar

pytestmark = pytest.mark.shared_data
EOS = 2


class Speaker:
    """Says random text under a grammar, one token at a time."""

    def __init__(self, masks: GrammarMasks, tokenizer: Tokenizer, eos: int) -> None:
        self.masks = masks
        self.tokenizer = tokenizer
        self.eos = eos
        self.ends = [eos] + [tokenizer.encode(end, add_special_tokens=False).ids[-1] for end in ("}", '"', "]")]

    def say(self, grammar: Grammar, seed: int, *, max_tokens: int = 400) -> str | None:
        """Return a whole text; None when it did not end in time."""
        chooser = np.random.default_rng(seed)
        self.masks.start("r", grammar)
        ids: list[int] = []
        try:
            while len(ids) < max_tokens:
                allowed = allowed_ids(self.masks.mask("r"))
                ends = np.intersect1d(allowed, self.ends)
                # an end as soon as one may come, half of the time: texts stay short
                choices = ends if len(ends) and chooser.random() < 0.5 else allowed
                token = int(choices[chooser.integers(len(choices))])
                self.masks.accept("r", token)
                if token == self.eos:
                    return self.tokenizer.decode(ids, skip_special_tokens=False)
                ids.append(token)
        finally:
            self.masks.release("r")
        return None

    def can_say(self, grammar: Grammar, text: str) -> bool:
        """Say whether this whole text may be generated, character by character (a forced one comes alone)."""
        ids = [self.tokenizer.encode(char, add_special_tokens=False).ids[-1] for char in text]
        self.masks.start("c", grammar)
        try:
            for token in [*ids, self.eos]:
                if token not in allowed_ids(self.masks.mask("c")):
                    return False
                self.masks.accept("c", token)
        finally:
            self.masks.release("c")
        return True


def allowed_ids(mask: BitMask) -> NDArray[np.int64]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


@cache
def _speaker(folder: Path, vocab_size: int, eos: int) -> Speaker:
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(text)
    # GPT-2's file pads and cuts to 512
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return Speaker(GrammarMasks(text, vocab_size, [eos]), tokenizer, eos)


@pytest.fixture(params=["stories260k-hf", "gpt2"])
def speaker(request: pytest.FixtureRequest, shared_data: Path) -> Speaker:
    if request.param == "gpt2":
        return _speaker(shared_data / "tokenizers" / "gpt2", 50257, 50256)
    return _speaker(shared_data / "models" / "stories260k-hf", 512, EOS)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def test_random_text_under_a_schema_is_json_of_that_schema(speaker: Speaker) -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    ended = 0
    for seed in range(12):
        text = speaker.say(grammar, seed)
        if text is None:
            continue
        ended += 1
        data = json.loads(text)
        assert set(data) == {"name", "age", "tags"}
        assert isinstance(data["age"], int) and 0 <= data["age"] <= 130
        assert len(data["name"]) <= 12 and set(data["tags"]) <= {"a", "b"} and len(data["tags"]) <= 3
    assert ended >= 9


def test_random_text_under_a_regex_matches_it(speaker: Speaker) -> None:
    pattern = r"(yes|no), [a-f]{2,5}-[0-9]{3}( äö)?"
    for seed in range(12):
        text = speaker.say(Grammar("regex", pattern), seed)
        assert text is not None and re.fullmatch(pattern, text)


def test_any_object_is_an_object_and_nothing_else(shared_data: Path) -> None:
    speaker = _speaker(shared_data / "tokenizers" / "gpt2", 50257, 50256)
    grammar = Grammar("json_schema", '{"type":"object"}')
    assert speaker.can_say(grammar, '{"a": [1, {}],\n  "b": 2}')
    assert not speaker.can_say(grammar, "[1]")
    assert not speaker.can_say(grammar, '{"a": 1')
    assert not speaker.can_say(grammar, '{"a": 1}}')
    assert speaker.can_say(grammar, json.dumps({"a": [1, {"b": 2}], "c": {}}, indent=4))
    assert speaker.can_say(grammar, '{\n\t"a":1}')
    # a weak model's favourite end
    assert not speaker.can_say(grammar, '{"a":  1}')
    assert not speaker.can_say(grammar, "{\n\n}")


def test_a_complete_grammar_allows_only_the_end_token(speaker: Speaker) -> None:
    speaker.masks.start("x", Grammar("lark", 'start: "a"'))
    speaker.masks.accept("x", int(allowed_ids(speaker.masks.mask("x"))[0]))
    assert list(allowed_ids(speaker.masks.mask("x"))) == [speaker.eos]
    speaker.masks.accept("x", speaker.eos)
    assert list(allowed_ids(speaker.masks.mask("x"))) == [speaker.eos]
    speaker.masks.release("x")
    speaker.masks.release("x")


def test_two_sequences_of_one_grammar_do_not_share_their_place(speaker: Speaker) -> None:
    grammar = Grammar("regex", "abc|abd")
    speaker.masks.start("one", grammar)
    first = allowed_ids(speaker.masks.mask("one"))
    speaker.masks.accept("one", int(first[0]))
    speaker.masks.start("two", grammar)
    assert list(allowed_ids(speaker.masks.mask("two"))) == list(first)
    for request_id in ("one", "two"):
        speaker.masks.release(request_id)


COSTLY = {
    "product of repetitions": r"(.{0,6000}){0,1000}",
    "many states": r".*(a|b).{200}(c|d).*e.{500}",
    "exponential": r"(a|b)*a(a|b){25}",
    "unicode": r"\p{L}{1,50}[^\p{Lu}]{1,50}",
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_grammar_takes_bounded_time_per_token_and_ends_its_sequence_when_it_fails(
    name: str, shared_data: Path
) -> None:
    speaker = _speaker(shared_data / "tokenizers" / "gpt2", 50257, 50256)
    chooser = np.random.default_rng(0)
    speaker.masks.start("c", Grammar("regex", COSTLY[name]))
    worst_s = 0.0
    for _ in range(60):
        started_s = time.process_time()
        allowed = allowed_ids(speaker.masks.mask("c"))
        worst_s = max(worst_s, time.process_time() - started_s)
        token = int(allowed[chooser.integers(len(allowed))])
        speaker.masks.accept("c", token)
        if token == speaker.eos:
            break
    speaker.masks.release("c")
    assert worst_s < 0.25


def test_a_grammar_that_fails_ends_its_sequence_and_harms_no_other(speaker: Speaker) -> None:
    speaker.masks.start("bad", Grammar("lark", "start: nothing_of_that_name"))
    assert list(allowed_ids(speaker.masks.mask("bad"))) == [speaker.eos]
    speaker.masks.accept("bad", speaker.eos)
    speaker.masks.release("bad")


def test_bits_past_the_tokenizers_own_tokens_are_never_set(shared_data: Path) -> None:
    text = (shared_data / "models" / "stories260k-hf" / "tokenizer.json").read_text(encoding="utf-8")
    masks = GrammarMasks(text, 600, [EOS])
    masks.start("r", Grammar("regex", "(.|\n)*"))
    mask = masks.mask("r")
    assert mask.shape == (19,) and max(allowed_ids(mask)) < 512


def test_a_tokenizer_that_cannot_spell_the_grammar_ends_the_sequence(shared_data: Path) -> None:
    # this one has neither braces nor bytes
    text = (shared_data / "models" / "tinystories-656k" / "tokenizer.json").read_text(encoding="utf-8")
    masks = GrammarMasks(text, 2048, [EOS])
    masks.start("r", Grammar("json_schema", '{"type":"object"}'))
    assert list(allowed_ids(masks.mask("r"))) == [EOS]


def test_a_tokenizer_that_llguidance_cannot_read_ends_constrained_sequences_only() -> None:
    masks = GrammarMasks(Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "e": 2}, merges=[])).to_str(), 3, [EOS])
    masks.start("r", Grammar("regex", "a"))
    assert list(allowed_ids(masks.mask("r"))) == [EOS]
    masks.accept("r", EOS)
    masks.release("r")
