"""Limits over HTTP: refused before any work, told in headers, given back on every way out of a request."""

import itertools
from collections.abc import Iterator

import httpx
import pytest

from serve.api.state import ApiState
from serve.cli.serve_command import read_tenant_limits
from serve.config import TenantLimits
from serve.errors import EngineFailed, RateLimited, StartError
from serve.tenants.limits import TenantLimiter
from tests.api.api_server import wait_until
from tests.api.byte_tokenizer import write_model_dir
from tests.api.fake_engine import Script
from tests.api_guard.whole_api import BASE, WholeApi, whole_api

LIMITS = TenantLimits(requests_per_minute=6, tokens_per_minute=1000, max_concurrent=2)
MINUTE_US = 60_000_000


class LimitedApi:
    """The whole API with limits, by the clock of the test."""

    def __init__(self, api: WholeApi, state: ApiState) -> None:
        self.api = api
        self.engine = api.engine
        assert isinstance(state.limiter, TenantLimiter)
        self.limiter = state.limiter
        self.now_us = 10 * MINUTE_US
        self.limiter._now_us = lambda: self.now_us

    def complete(self, prompt: object = "Hi", **fields: object) -> httpx.Response:
        return self.api.http.post("/v1/completions", json={"model": BASE, "prompt": prompt, **fields})

    def chat(self, **fields: object) -> httpx.Response:
        body = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], **fields}
        return self.api.http.post("/v1/chat/completions", json=body)

    @property
    def tokens_left(self) -> int:
        standing = self.limiter.standings("local").tokens
        assert standing is not None
        return standing.remaining

    @property
    def num_running(self) -> int:
        accounts = self.limiter._accounts.get("local")
        return accounts.num_running if accounts is not None else 0


@pytest.fixture(scope="module")
def shared_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LimitedApi]:
    folder = tmp_path_factory.mktemp("limits")
    states: list[ApiState] = []
    # on a busy machine the server may close an idle connection just as the next request leaves
    fresh = httpx.Limits(max_keepalive_connections=0)
    with (
        whole_api(write_model_dir(folder / "model"), folder / "store", tenant_limits=LIMITS, states=states) as api,
        httpx.Client(base_url=api.http.base_url, timeout=120, limits=fresh) as http,
    ):
        api.http = http
        yield LimitedApi(api, states[0])


@pytest.fixture
def limited(shared_api: LimitedApi) -> Iterator[LimitedApi]:
    shared_api.engine.reset()
    shared_api.now_us += 100 * MINUTE_US
    yield shared_api
    wait_until(lambda: shared_api.num_running == 0, "every request has left")
    shared_api.now_us += 100 * MINUTE_US
    assert shared_api.tokens_left == 1000


def test_the_seventh_request_of_a_minute_is_refused_before_any_work(limited: LimitedApi) -> None:
    answers = [limited.complete(max_tokens=1) for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 6 + [429]
    refused = answers[-1]
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.headers["retry-after"] == "10"
    assert refused.headers["x-ratelimit-limit-requests"] == "6"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(limited.engine.submits) == 6 and len(limited.engine.admitted) == 6
    limited.now_us += 10_000_000
    assert limited.complete(max_tokens=1).status_code == 200


def test_every_answer_tells_what_is_left(limited: LimitedApi) -> None:
    headers = limited.complete("Hi", max_tokens=5, ignore_eos=True).headers
    assert headers["x-ratelimit-limit-requests"] == "6" and headers["x-ratelimit-remaining-requests"] == "5"
    assert headers["x-ratelimit-reset-requests"] == "10s"
    assert headers["x-ratelimit-limit-tokens"] == "1000" and int(headers["x-ratelimit-remaining-tokens"]) < 1000
    for answer in (limited.api.http.get("/v1/models"), limited.complete(max_tokens=-1)):
        assert "x-ratelimit-limit-tokens" in answer.headers
    for path in ("/livez", "/metrics", "/nowhere"):
        assert "x-ratelimit-limit-tokens" not in limited.api.http.get(path).headers
    assert len([name for name in headers if name.startswith("x-ratelimit-")]) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_in_the_end_a_request_costs_its_usage(limited: LimitedApi, stream: bool) -> None:
    for ask in (limited.complete, limited.chat):
        before = limited.tokens_left
        answer = ask(max_tokens=200, stream=stream, n=2)
        assert answer.status_code == 200
        wait_until(lambda: limited.num_running == 0, "the request has left")
        used = len(b"Hello world") + 1
        prompt = len(limited.engine.submits[-1].prompt_token_ids)
        assert before - limited.tokens_left == prompt + 2 * used


def test_tokens_that_are_asked_for_are_charged_before_any_work(limited: LimitedApi) -> None:
    for refused in (
        limited.complete(max_tokens=1001),
        limited.chat(max_tokens=1001),
        limited.chat(max_completion_tokens=501, n=2),
        limited.complete("x" * 4100),
        limited.api.http.post("/v1/embeddings", json={"model": BASE, "input": "x" * 4100}),
    ):
        assert refused.status_code == 429, refused.text
        assert "1000 a minute" in refused.json()["error"]["message"]
    assert not limited.engine.submits and not limited.engine.admitted and not limited.engine.embeds
    assert limited.tokens_left == 1000


def test_a_refused_or_failed_request_pays_for_what_was_computed_alone(limited: LimitedApi) -> None:
    assert limited.complete(max_tokens=100, model="nobody").status_code == 404
    assert limited.complete(max_tokens=100, temperature=-1).status_code == 400
    assert limited.tokens_left == 1000
    limited.engine.script.error, limited.engine.script.error_after = EngineFailed("broken"), 3
    assert limited.complete("Hi", max_tokens=100).status_code == 500
    assert limited.tokens_left == 1000 - 2 - 3


def test_an_embedding_costs_its_input(limited: LimitedApi) -> None:
    assert limited.api.http.post("/v1/embeddings", json={"model": BASE, "input": ["four", "five!"]}).status_code == 200
    assert limited.tokens_left == 1000 - 9


def test_a_third_request_at_once_is_refused_and_the_place_comes_back(limited: LimitedApi) -> None:
    limited.engine.script = Script(hold_after=1)
    body = {"model": BASE, "prompt": "Hi", "max_tokens": 9, "stream": True}
    with (
        limited.api.http.stream("POST", "/v1/completions", json=body) as first,
        limited.api.http.stream("POST", "/v1/completions", json=body) as second,
    ):
        assert (first.status_code, second.status_code) == (200, 200)
        refused = limited.complete()
        assert refused.status_code == 429 and "2 at once" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "1"
    # both clients are gone in the middle of their streams
    wait_until(lambda: limited.num_running == 0, "the places came back")
    limited.engine.script = Script()
    assert limited.complete(max_tokens=1).status_code == 200


def test_tenants_do_not_share_an_account() -> None:
    ticks = itertools.count()
    limiter = TenantLimiter(LIMITS, now_us=lambda: next(ticks))
    for tenant in ("a", "b"):
        limiter.charge(tenant, 1000)
    for tenant in ("a", "b"):
        with pytest.raises(RateLimited):
            limiter.charge(tenant, 1000)


@pytest.mark.parametrize(
    "values",
    [
        ["requests=5"],
        ["requests-per-minute"],
        ["requests-per-minute=0"],
        ["requests-per-minute=-1"],
        ["requests-per-minute=1.5"],
        ["max-adapters=1", "max-adapters=2"],
        [""],
    ],
)
def test_a_bound_that_is_none_is_refused(values: list[str]) -> None:
    with pytest.raises(StartError, match="--tenant-limit"):
        read_tenant_limits(values)


def test_bounds_are_read() -> None:
    read = read_tenant_limits(["tokens-per-minute=1000", "max-adapter-bytes=1", "max-concurrent=3"])
    assert read == TenantLimits(tokens_per_minute=1000, max_adapter_bytes=1, max_concurrent=3)
    assert read_tenant_limits([]) == TenantLimits()
