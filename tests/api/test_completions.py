"""POST /v1/completions: the forms of a prompt, echo, prompt logprobs."""

import json

import openai
import pytest
from tokenizers import Tokenizer

from serve.api.answer import Output
from serve.api.completions import CompletionReply
from serve.api.generation import Generation
from serve.api.output import OutputRules
from serve.api.schemas_completions import CompletionRequest
from serve.api.target import Target
from serve.messages import Started, TokenLogprobs
from serve.text.tokenizer import TextTokenizer
from tests.api.api_server import ApiServer
from tests.api.byte_tokenizer import IM_END, VOCAB_SIZE
from tests.api.fake_engine import text_ids
from tests.api.fake_store import BASE
from tests.api.test_detokenizer import SENTENCEPIECE


def test_openai_python_reads_a_completion(client: openai.OpenAI, api: ApiServer) -> None:
    answer = client.completions.create(model=BASE, prompt="Say", max_tokens=5)
    assert answer.choices[0].text == "Hello" and answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"


def test_the_default_is_sixteen_tokens(api: ApiServer) -> None:
    api.complete()
    assert api.engine.submits[0].sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [text_ids("ab")]),
        (["ab", "c"], [text_ids("ab"), text_ids("c")]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, IM_END]], [[97], [98, IM_END]]),
        ("a<|im_end|>", [[97, IM_END]]),
    ],
)
def test_every_form_of_a_prompt_is_read(api: ApiServer, prompt: object, expected: list[list[int]]) -> None:
    assert api.complete(prompt).status_code == 200
    assert [submit.prompt_token_ids for submit in api.engine.submits] == expected


@pytest.mark.parametrize(
    "prompt",
    [None, "", [], [[]], [["a"]], [1, "a"], [True], [1.0], [-1], [VOCAB_SIZE], [[1], []], {"a": 1}, 5, [1, [2]]],
)
def test_what_is_no_prompt_is_refused(api: ApiServer, prompt: object) -> None:
    answer = api.complete(prompt)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "prompt"
    assert not api.engine.submits


def test_prompts_and_choices_are_numbered_prompt_by_prompt(api: ApiServer) -> None:
    api.engine.script.write = lambda submit: [*submit.prompt_token_ids, *text_ids(submit.request_id[-1]), IM_END]
    answer = api.complete(["ab", "c"], n=2).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "ab0"),
        (1, "ab1"),
        (2, "c0"),
        (3, "c1"),
    ]
    assert answer["usage"]["prompt_tokens"] == 3
    assert len({submit.group_id for submit in api.engine.submits}) == 2


def test_echo_puts_the_prompt_first(api: ApiServer) -> None:
    assert api.complete("Say: ", echo=True).json()["choices"][0]["text"] == "Say: Hello world"
    assert api.complete([72, 105, 32], echo=True).json()["choices"][0]["text"] == "Hi Hello world"


def test_offsets_of_an_echoed_prompt_of_ids_point_into_its_text() -> None:
    # a control token under normalisation: the tokenizers library's own decoding shows it though told to skip it
    described = json.loads(SENTENCEPIECE.to_str())
    described["added_tokens"][0]["normalized"] = True
    tokenizer = TextTokenizer(Tokenizer.from_str(json.dumps(described)), {})
    pieces = [described["model"]["vocab"][piece] for piece in ("<s>", "▁a", "▁b")]
    body = CompletionRequest.read({"model": BASE, "prompt": pieces, "echo": True, "logprobs": 0})
    generation = Generation([pieces], [], 1, None, OutputRules(), Target(BASE, None), 0, "wait")
    scores = [TokenLogprobs(token_id, -1.0, [], []) for token_id in pieces[1:]]
    started = Started("r", num_cached_tokens=0, queue_s=0.0, adapter_load_s=0.0, prompt_logprobs=scores)
    choice = CompletionReply(tokenizer, body, generation).choice(Output(0, " a", started=started))
    assert choice["text"] == "a b a"
    assert isinstance(choice["logprobs"], dict) and choice["logprobs"]["text_offset"] == [0, 0, 1]


def test_echo_with_logprobs_scores_the_prompt_as_lm_eval_needs_it(api: ApiServer) -> None:
    body = {"echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0, "seed": 1234}
    answer = api.complete([[97, 98, 99], [100, 101]], **body).json()
    for choice, prompt in zip(answer["choices"], ([97, 98, 99], [100, 101]), strict=True):
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(prompt) + 1}
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        # what lm-eval sums, and how it decides "greedy"
        scored = list(zip(logprobs["token_logprobs"][1:-1], logprobs["top_logprobs"][1:-1], strict=True))
        assert all(logprob == max(top.values()) for logprob, top in scored)
        assert choice["text"] == bytes(prompt).decode() + "H"
        assert logprobs["text_offset"] == list(range(len(prompt) + 1))


def test_no_tokens_with_echo_scores_the_prompt_alone(api: ApiServer) -> None:
    answer = api.complete("abc", echo=True, max_tokens=0, logprobs=1).json()
    choice = answer["choices"][0]
    assert choice["text"] == "abc" and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == 3
    assert answer["usage"]["completion_tokens"] == 0


def test_streamed_echo_comes_with_the_first_chunk(api: ApiServer) -> None:
    with api.openai() as client:
        chunks = list(client.completions.create(model=BASE, prompt="ab", echo=True, logprobs=1, stream=True))
    assert chunks[0].choices[0].text == "ab"
    assert chunks[0].choices[0].logprobs is not None and chunks[0].choices[0].logprobs.tokens == ["a", "b"]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abHello world"
    offsets = [offset for chunk in chunks if (found := chunk.choices[0].logprobs) for offset in found.text_offset or []]
    assert offsets == sorted(offsets) and offsets[0] == 0


def test_logprobs_keep_the_likelier_of_two_tokens_with_one_text(api: ApiServer) -> None:
    # 0xC3 and 0xC4 are both half a character: both read as U+FFFD
    api.engine.script.write = lambda submit: [0xC3, IM_END]
    top = api.complete(logprobs=2).json()["choices"][0]["logprobs"]["top_logprobs"][0]
    assert top == {"\ufffd": -0.5}


def test_suffix_is_refused(api: ApiServer) -> None:
    error = api.complete(suffix="end").json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "suffix")
