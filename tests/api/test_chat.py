"""POST /v1/chat/completions, not streamed: answers, choices, logprobs, headers."""

import openai
import pytest

from serve.errors import EngineFailed
from tests.api.api_server import ApiServer
from tests.api.byte_tokenizer import IM_END, IM_START
from tests.api.fake_engine import MAX_MODEL_LEN, text_ids
from tests.api.fake_store import BASE, digest_of


def test_openai_python_reads_an_answer_with_its_usage(api: ApiServer, client: openai.OpenAI) -> None:
    api.engine.script.num_cached_tokens = 16
    answer = client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "Hi"}])
    assert answer.choices[0].message.content == "Hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.completion_tokens == len("Hello world") + 1
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    assert answer.system_fingerprint is not None and answer.system_fingerprint.startswith("fp_")


def test_the_prompt_is_the_rendered_template_without_added_specials(api: ApiServer) -> None:
    api.chat("Hé")
    expected = [IM_START, *text_ids("user\nHé"), IM_END, *text_ids("\n"), IM_START, *text_ids("assistant\n")]
    assert api.engine.submits[0].prompt_token_ids == expected


def test_content_parts_are_joined_by_newlines(api: ApiServer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    api.http.post("/v1/chat/completions", json={"model": BASE, "messages": [{"role": "user", "content": parts}]})
    assert bytes(text_ids("user\none\ntwo")) in bytes(i for i in api.engine.submits[0].prompt_token_ids if i < 256)


def test_without_max_tokens_the_answer_may_fill_the_context(api: ApiServer) -> None:
    api.chat("Hi")
    submit = api.engine.submits[0]
    assert submit.sampling.max_tokens == MAX_MODEL_LEN - len(submit.prompt_token_ids)


def test_max_completion_tokens_wins_over_max_tokens(api: ApiServer) -> None:
    answer = api.chat(max_tokens=9, max_completion_tokens=4).json()
    assert answer["choices"][0]["message"]["content"] == "Hell"
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_prompt_beyond_the_context_is_refused_before_the_engine(api: ApiServer) -> None:
    answer = api.chat("x" * MAX_MODEL_LEN)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert api.chat("Hi", max_tokens=MAX_MODEL_LEN).json()["error"]["param"] == "max_tokens"
    assert not api.engine.submits


def test_truncate_prompt_tokens_keeps_the_end(api: ApiServer) -> None:
    api.chat("x" * 500 + "end", truncate_prompt_tokens=25)
    kept = api.engine.submits[0].prompt_token_ids
    assert len(kept) == 25 and kept[-11:] == [IM_START, *text_ids("assistant\n")]
    assert api.chat("x" * 2000, truncate_prompt_tokens=-1, max_tokens=10).status_code == 200
    assert len(api.engine.submits[1].prompt_token_ids) == MAX_MODEL_LEN - 10


def test_choices_share_a_group_and_have_seeds_of_their_own(api: ApiServer) -> None:
    answer = api.chat(n=3, seed=7).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert api.engine.admitted == [3]
    assert len({submit.group_id for submit in api.engine.submits}) == 1
    seeds = [submit.sampling.seed for submit in api.engine.submits]
    assert len(set(seeds)) == 3
    api.chat(seed=7)
    assert api.engine.submits[-1].sampling.seed in seeds, "choice 0 does not depend on n"
    assert answer["usage"]["completion_tokens"] == 3 * 12
    assert answer["usage"]["prompt_tokens"] == len(api.engine.submits[0].prompt_token_ids)


def test_without_a_seed_every_request_draws_its_own(api: ApiServer) -> None:
    api.chat()
    api.chat()
    first, second = api.engine.submits
    assert first.sampling.seed != second.sampling.seed


def test_logprobs_carry_bytes_also_of_half_characters(api: ApiServer) -> None:
    api.engine.script.write = lambda submit: [*text_ids("é"), IM_END]
    choice = api.chat(logprobs=True, top_logprobs=2).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert [entry["bytes"] for entry in entries[:2]] == [[0xC3], [0xA9]]
    assert [len(entry["top_logprobs"]) for entry in entries] == [2, 2, 2]
    assert choice["message"]["content"] == "é"


def test_sampling_fields_reach_the_engine(api: ApiServer) -> None:
    api.chat(
        temperature=0, top_p=0.5, top_k=-1, min_p=0.1, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5
    )
    sampling = api.engine.submits[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 0.5, 0, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1.0, -1.0, 1.5)
    api.chat(logit_bias={"65": 2, "66": -100}, stop_token_ids=[10], ignore_eos=True, min_tokens=3, priority=4)
    submit = api.engine.submits[1]
    assert submit.sampling.logit_bias == ((65, 2.0), (66, -100.0))
    assert submit.sampling.stop_token_ids == (10,) and submit.sampling.ignore_eos and submit.sampling.min_tokens == 3
    assert submit.priority == 4


def test_an_adapters_answer_names_it_in_the_headers(api: ApiServer) -> None:
    api.engine.script.adapter_load_s = 0.25
    answer = api.chat(model="poet")
    assert answer.headers["x-adapter-id"] == "poet"
    assert answer.headers["x-adapter-digest"] == f"sha256:{digest_of('poet', 2)}"
    assert answer.headers["x-adapter-cold-start-ms"] == "250"
    # none of it was this adapter's own fetch or load: it waited for others'
    assert answer.headers["server-timing"] == "queue;dur=250.0, fetch;dur=0.0, load;dur=0.0, prefill;dur=0.0"
    assert answer.json()["model"] == "poet"
    assert api.engine.submits[0].adapter_digest == digest_of("poet", 2)
    assert answer.json()["system_fingerprint"] != api.chat().json()["system_fingerprint"]


def test_a_deadline_reaches_the_engine_and_only_a_sound_one(api: ApiServer) -> None:
    api.chat(deadline_s=2.5)
    api.http.post("/v1/completions", json={"model": BASE, "prompt": "a", "deadline_s": 7})
    api.chat()
    assert [submit.deadline_s for submit in api.engine.submits] == [2.5, 7, None]
    for wrong in (0, -1, 86_401, "5", True):
        refused = api.http.post("/v1/completions", json={"model": BASE, "prompt": "a", "deadline_s": wrong})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "deadline_s", wrong


@pytest.mark.parametrize(
    ("fields", "version"),
    [
        ({"model": "poet@1"}, 1),
        ({"model": "poet:stable"}, 1),
        ({"model": f"{BASE}:poet"}, 2),
        ({"adapter_id": "poet"}, 2),
        ({"adapters": [{"name": "poet", "weight": 1}]}, 2),
    ],
)
def test_every_way_to_name_an_adapter_finds_it(api: ApiServer, fields: dict[str, object], version: int) -> None:
    assert api.chat(**fields).status_code == 200
    assert api.engine.submits[0].adapter_digest == digest_of("poet", version)


def test_a_final_message_can_be_continued(api: ApiServer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon "}]
    body = {"model": BASE, "messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert api.http.post("/v1/chat/completions", json=body).status_code == 200
    # the template trims, so does the continuation
    assert bytes(i for i in api.engine.submits[0].prompt_token_ids if i < 256).endswith(b"assistant\nOnce upon")
    assert api.http.post("/v1/chat/completions", json={**body, "add_generation_prompt": True}).status_code == 400


def test_return_token_ids_shows_prompt_and_output(api: ApiServer) -> None:
    choice = api.chat(return_token_ids=True).json()["choices"][0]
    assert choice["token_ids"] == [*text_ids("Hello world"), IM_END]
    assert choice["prompt_token_ids"] == api.engine.submits[0].prompt_token_ids


def test_a_failed_choice_fails_the_request_with_its_status(api: ApiServer, client: openai.OpenAI) -> None:
    api.engine.script.error, api.engine.script.error_after = EngineFailed("the step failed"), 3
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "Hi"}], n=2)
    assert raised.value.code == "engine_error"
