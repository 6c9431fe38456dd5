"""Sixty adapters over budgets for a few, 64 clients, changes all the time: every answer exact, everything given back.

The same campaign with 2,000 adapters and 100,000 requests is `test_the_whole_campaign`, or `python -m tests.campaign`.
"""

from pathlib import Path

import pytest

from tests.campaign.budgets import budget_options
from tests.campaign.campaign import Report, Scale, run_campaign
from tests.campaign.catalog import Catalog, History
from tests.campaign.judge import Asked, judge, judge_refusal
from tests.campaign.plan import MAX_TOKENS, PROMPTS
from tests.campaign.solo import SoloModel
from tests.conftest import StartServer
from tests.tiny_model import write_tiny_adapter, write_tiny_model

A, B = "a" * 64, "b" * 64


def _check_clean(report: Report) -> None:
    assert report.complaints == []
    assert report.outcomes["exact"] > 0.8 * report.scale.num_requests
    assert report.outcomes["left"] and report.outcomes["operated"] and report.outcomes["refused 404 model_not_found"]
    assert report.changes["publish"] and report.changes["delete"]
    # the budgets were too small for what was asked: adapters came and went all the time
    assert report.series["chorale_adapter_evictions_total"] > report.scale.num_requests / 10
    assert report.series["chorale_prefix_hit_tokens_total"] > 0
    assert report.series['chorale_requests_finished_total{reason="abort"}'] > 0


@pytest.mark.e2e
def test_a_small_campaign_is_clean(tmp_path: Path) -> None:
    scale = Scale(60, 800, changes_every=50, server_options=budget_options(num_host=24, num_device=8))
    _check_clean(run_campaign(tmp_path, scale))


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_the_whole_campaign(tmp_path: Path) -> None:
    scale = Scale(2000, 100_000, changes_every=150, server_options=budget_options(num_host=64, num_device=16))
    _check_clean(run_campaign(tmp_path, scale))


@pytest.mark.e2e
def test_the_solo_answers_are_what_the_server_answers_alone(tmp_path: Path, any_server: StartServer) -> None:
    model_dir = write_tiny_model(tmp_path / "tiny")
    solo = SoloModel(model_dir, PROMPTS, MAX_TOKENS)
    server = any_server(model_dir, "--device", "cpu", "--dtype", "float32", "--max-num-seqs", "1", "--no-prefix-cache")
    for seed in range(3):
        adapter = write_tiny_adapter(tmp_path, f"voice-{seed}", (2, 4, 8)[seed], seed=seed, num_sites=(7, 2, 4)[seed])
        answers = solo.answers(adapter.folder)
        assert answers is not None and answers != solo.answers(None)
        assert server.upload(adapter.name, adapter.folder).status_code == 201
        fields = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        assert [server.complete(adapter.name, prompt=prompt, **fields)["token_ids"] for prompt in PROMPTS] == answers


def test_what_was_acknowledged_before_a_request_was_sent_is_the_oldest_that_it_may_see() -> None:
    catalog = Catalog([[1]])
    for begin, digest, version in ((1.0, A, 1), (3.0, B, 2), (5.0, None, 0)):
        catalog.finish("x", catalog.begin("x", digest, begin), begin + 1.0, version)
    history = catalog.history("x")
    assert history.possible(0.0, 0.5) == {None}
    assert history.possible(1.2, 1.4) == {None, A}
    assert history.possible(2.5, 2.6) == {A}
    assert history.possible(2.5, 3.5) == {A, B}
    assert history.possible(4.5, 4.6) == {B}
    assert history.possible(4.5, 9.0) == {B, None}
    assert history.possible(6.5, 9.0) == {None}
    assert history.possible_version(1, 4.5, 4.6) == {A}
    assert history.possible_version(1, 4.5, 5.5) == {A, None}
    assert history.possible_version(1, 6.5, 7.0) == {None}
    assert not catalog.is_live("x")
    unfinished = catalog.begin("x", A, 8.0)
    assert catalog.is_changing("x") and history.possible(9.0, 9.5) == {None, A}
    catalog.finish("x", unfinished, 10.0, 3)
    assert history.possible(11.0, 12.0) == {A}
    assert History().possible(0.0, 1.0) == {None}


def test_the_judge_lets_nothing_pass_but_the_current_version_s_own_tokens() -> None:
    catalog = Catalog([[1, 2, 3]])
    catalog.learn(A, [[4, 5, 6]])
    catalog.learn(B, [[7, 8, 9]])
    catalog.finish("x", catalog.begin("x", A, 0.0), 1.0, 1)
    asked = Asked("x", None, (0,), 2, sent=2.0)
    assert judge(catalog, asked, A, [[4, 5]], 3.0, is_whole=True) is None
    assert judge(catalog, asked, A, [[4]], 3.0, is_whole=False) is None
    assert judge(catalog, asked, A, [[4, 5, 0]], 3.0, is_whole=False) is None
    for digest, tokens in ((A, [4]), (A, [4, 6]), (A, [4, 5, 6]), (A, [7, 8]), (B, [7, 8]), (None, [1, 2])):
        assert judge(catalog, asked, digest, [tokens], 3.0, is_whole=True) is not None
    assert judge(catalog, asked, A, [[5]], 3.0, is_whole=False) is not None
    base = Asked(None, None, (0,), 3, sent=2.0)
    assert judge(catalog, base, None, [[1, 2, 3]], 3.0, is_whole=True) is None
    assert judge(catalog, base, A, [[4, 5, 6]], 3.0, is_whole=True) is not None
    assert judge_refusal(catalog, asked, 429, "queue_full", 3.0) is None
    for status, code in ((404, "model_not_found"), (500, "engine_error"), (503, "engine_error"), (400, "queue_full")):
        assert judge_refusal(catalog, asked, status, code, 3.0) is not None
    catalog.finish("x", catalog.begin("x", None, 4.0), 5.0)
    assert judge_refusal(catalog, Asked("x", None, (0,), 2, sent=6.0), 404, "model_not_found", 7.0) is None
