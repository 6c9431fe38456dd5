"""The tester's own correctness: what it measures against a server with known delays, which keeps its own record.

Both sides share one virtual clock, so every figure must agree exactly, on any machine.
"""

import random
import statistics
from itertools import pairwise
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from loadtest.client import Client
from loadtest.metrics import Slo, jain, percentile, spread, summarise
from loadtest.samples import Sample
from loadtest.sse import EventReader
from loadtest.workload import build_plan
from tests.loadtest.runs import Ran, make_scenario, run_against
from tests.loadtest.synthetic_server import Body, Script
from tests.loadtest.virtual_time import run_virtually

# the clocks are one; what remains is the rounding of sums of doubles
EXACT = pytest.approx


def drawn_script(body: Body, number: int) -> Script:
    """Answer with delays of the request's own."""
    rng = random.Random(number)
    return Script(tuple(rng.uniform(0.001, 0.4) for _ in range(rng.randint(1, 12))))


def by_index(ran: Ran) -> dict[int, int]:
    """Return the server's number of each request, told by its seed."""
    return {int(str(served.body["seed"])) - 5: number for number, served in enumerate(ran.server.served)}


def test_every_moment_is_the_servers_own(tmp_path: Path) -> None:
    ran = run_against(tmp_path, make_scenario(request={"ignore_eos": False}), drawn_script)
    places = by_index(ran)
    assert len(ran.samples) == len(ran.server.served) == 20
    for sample in ran.samples:
        served = ran.server.served[places[sample.index]]
        gaps = drawn_script({}, places[sample.index]).gaps_s
        assert sample.is_ok and sample.is_counted
        assert sample.num_output_tokens == len(gaps)
        assert sample.sent_s + ran.start_s == EXACT(served.received_s, abs=1e-9)
        assert [moment + ran.start_s for moment in sample.token_at_s] == EXACT(served.sent_s, abs=1e-9)
        assert sample.ttft_s == EXACT(gaps[0], abs=1e-9)
        assert sample.ttft_sent_s == EXACT(gaps[0], abs=1e-9)
        assert sample.gaps_s() == EXACT(list(gaps[1:]), abs=1e-9)
        assert sample.e2e_s == EXACT(sum(gaps), abs=1e-9)
        if len(gaps) > 1:
            assert sample.tpot_s == EXACT(sum(gaps[1:]) / (len(gaps) - 1), abs=1e-9)
        else:
            assert sample.tpot_s is None


def test_the_summary_is_what_the_servers_record_says(tmp_path: Path) -> None:
    ran = run_against(tmp_path, make_scenario(request={"ignore_eos": False}), drawn_script)
    slo = Slo(ttft_s=0.25, itl_s=0.3)
    summary = summarise(ran.samples, slo)
    records = [[served.received_s, *served.sent_s] for served in ran.server.served]
    firsts = [record[1] - record[0] for record in records]
    gaps = [after - before for record in records for before, after in pairwise(record[1:])]
    wall_s = max(served.ended_s for served in ran.server.served) - min(record[0] for record in records)
    good = sum(
        record[1] - record[0] <= 0.25 and all(after - before <= 0.3 for before, after in pairwise(record[1:]))
        for record in records
    )
    assert 0 < good < len(records)
    assert summary.wall_s == EXACT(wall_s, abs=1e-9)
    assert summary.goodput_per_s == EXACT(good / wall_s)
    assert summary.attainment == EXACT(good / len(records))
    assert summary.output_tokens_per_s == EXACT(sum(len(record) - 1 for record in records) / wall_s)
    assert summary.ttft_s.p50 == EXACT(statistics.median(firsts))
    assert summary.ttft_s.p99 == EXACT(float(np.percentile(firsts, 99)))
    assert summary.itl_s.p90 == EXACT(float(np.percentile(gaps, 90)))
    assert summary.itl_s.mean == EXACT(statistics.fmean(gaps))


def test_an_open_loop_sends_when_requests_are_due_although_nothing_is_answered(tmp_path: Path) -> None:
    scenario = make_scenario(num_requests=150, request={"timeout_s": 3000})
    ran = run_against(tmp_path, scenario, lambda body, number: Script((1000.0, 0.1, 0.1)))
    due = [request.at_s for request in build_plan(scenario).requests]
    received = [served.received_s - ran.start_s for served in ran.server.served]
    assert max(received) < 1000.0
    assert received == EXACT(due, abs=1e-9)
    assert ran.server.num_connections == 150


def test_a_tester_that_was_late_adds_its_lateness_to_ttft_but_not_to_ttft_from_sent(tmp_path: Path) -> None:
    scenario = make_scenario(num_requests=40, arrivals={"kind": "uniform", "rate": 10.0})
    ran = run_against(tmp_path, scenario, lambda body, number: Script((0.005, 0.01, 0.01)), stall=(1.0001, 2.0))
    late = [sample for sample in ran.samples if sample.sent_s - sample.scheduled_s > 1e-6]
    assert len(late) == 20
    for sample in ran.samples:
        assert sample.ttft_s is not None and sample.ttft_sent_s is not None
        assert sample.ttft_s == EXACT(sample.ttft_sent_s + sample.sent_s - sample.scheduled_s, abs=1e-9)
    assert summarise(ran.samples, Slo()).send_lag_s.max == EXACT(1.9001, abs=1e-6)
    assert max(sample.ttft_sent_s or 0.0 for sample in late) == EXACT(0.005, abs=1e-9)


@pytest.mark.parametrize("concurrency", [1, 3, 128])
def test_a_closed_loop_keeps_exactly_its_clients_busy(tmp_path: Path, concurrency: int) -> None:
    count = 4 * concurrency
    scenario = make_scenario(num_requests=count, arrivals={"kind": "closed", "concurrency": concurrency})
    ran = run_against(tmp_path, scenario, lambda body, number: Script((0.5, 0.25, 0.25)))
    assert ran.server.num_connections == concurrency
    # equal work: it comes in four full rounds of a second
    starts = sorted(served.received_s - ran.start_s for served in ran.server.served)
    assert starts == EXACT([float(number // concurrency) for number in range(count)], abs=1e-9)
    summary = summarise(ran.samples, Slo())
    assert summary.output_tokens_per_s == EXACT(3 * concurrency)
    assert ran.progress.num_done == count and ran.progress.num_tokens == 3 * count


FAILURES = {
    "http_429": Script((0.1,), status=429),
    "http_500": Script((0.1,), status=500),
    "cut": Script((0.1, 0.1), end="cut"),
    "cut-after-a-proper-end": Script((0.1, 0.1), end="ended"),
    "error": Script((0.1, 0.1), end="error"),
    "timeout": Script((0.1, 0.1), end="hang"),
    "short": Script((0.1, 0.1)),
    "malformed": Script((0.1, 0.1), end="malformed"),
}


@pytest.mark.parametrize("failure", list(FAILURES))
def test_each_way_to_fail_has_its_name_and_is_a_miss(tmp_path: Path, failure: str) -> None:
    good = Script((0.1, 0.1, 0.1))
    scenario = make_scenario(request={"timeout_s": 4.0}, arrivals={"kind": "uniform", "rate": 1.0})
    ran = run_against(tmp_path, scenario, lambda body, number: FAILURES[failure] if number % 4 == 0 else good)
    failed = [sample for sample in ran.samples if not sample.is_ok]
    failure = failure.partition("-")[0]
    assert {sample.failure for sample in failed} == {failure}
    assert [sample.index for sample in failed] == [0, 4, 8, 12, 16]
    assert all(sample.detail and sample.ttft_s is None and sample.e2e_s is None for sample in failed)
    expected_end_s = {"timeout": 4.0, "short": 0.2}.get(failure)
    if expected_end_s is not None:
        assert [sample.end_s - sample.sent_s for sample in failed] == EXACT([expected_end_s] * 5, abs=1e-6)
    summary = summarise(ran.samples, Slo(ttft_s=1.0))
    assert summary.failures == {failure: 5} and summary.num_ok == 15
    assert summary.attainment == 0.75
    assert summary.ttft_s.p50 == EXACT(0.1)
    # a quarter failed: beyond 75 % there is no time that was kept
    assert summary.ttft_s.p90 == summary.e2e_s.p99 == float("inf")
    assert summary.ttft_s.mean == EXACT(0.1)


def test_a_connection_that_is_refused_is_a_failure_not_a_crash(tmp_path: Path) -> None:
    sample = Sample(0, "m", None, None, 4, 3, scheduled_s=0.0)

    async def send() -> None:
        connector = aiohttp.UnixConnector(str(tmp_path / "nobody.sock"))
        async with Client("http://synthetic", connector=connector) as client:
            await client.send("/v1/completions", b"{}", sample)

    run_virtually(send())
    assert sample.failure == "connect" and sample.status is None
    assert "nobody.sock" in sample.detail


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("cut_into", [0, 1, 3, 7])
@pytest.mark.parametrize("is_chat", [False, True], ids=["completions", "chat"])
def test_however_the_bytes_are_cut_the_answer_is_the_same(
    tmp_path: Path, newline: str, cut_into: int, is_chat: bool
) -> None:
    texts = ("Grüße ", "data: [DONE]", "日本\n\n")
    script = Script((0.1, 0.2, 0.3), newline=newline, cut_into=cut_into, is_chat=is_chat, texts=texts)
    scenario = make_scenario(num_requests=2, request={"kind": "chat" if is_chat else "tokens"})
    ran = run_against(tmp_path, scenario, lambda body, number: script)
    for sample in ran.samples:
        assert sample.failure is None and sample.text == "".join(texts)
        assert sample.gaps_s() == EXACT([0.2, 0.3], abs=1e-9)
        assert sample.num_prompt_tokens == 7 and sample.num_output_tokens == 3


def test_an_event_of_several_lines_is_one_event_wherever_its_bytes_are_cut() -> None:
    for newline in (b"\n", b"\r\n", b"\r"):
        stream = newline.join([b"data: a", b"data:b", b"event: x", b"", b": comment", b"", b"data: c", b"", b""])
        for size in range(1, len(stream) + 1):
            reader = EventReader()
            events = [e for begin in range(0, len(stream), size) for e in reader.feed(stream[begin : begin + size])]
            assert events == [b"a\nb", b"c"], (newline, size)


def test_no_request_waits_for_a_connection() -> None:
    async def limit() -> int:
        async with Client("http://127.0.0.1:1") as client:
            assert client.session.connector is not None
            return client.session.connector.limit

    assert run_virtually(limit()) == 0


def test_without_usage_tokens_are_counted_as_pieces_and_that_is_said(tmp_path: Path) -> None:
    ran = run_against(tmp_path, make_scenario(num_requests=4), lambda body, number: Script(end="no_usage"))
    assert all(sample.is_ok and not sample.is_counted and sample.num_output_tokens == 3 for sample in ran.samples)


def test_an_answer_whose_token_shows_no_text_has_come_when_it_ends(tmp_path: Path) -> None:
    scenario = make_scenario(num_requests=1, request={"ignore_eos": False})
    ran = run_against(tmp_path, scenario, lambda body, number: Script((0.3,), texts=("",)))
    assert ran.samples[0].failure is None
    assert ran.samples[0].ttft_s == EXACT(0.3, abs=1e-9)


def test_tenants_send_with_keys_of_their_own(tmp_path: Path) -> None:
    scenario = make_scenario(tenants={"count": 6, "popularity": "distinct"})
    ran = run_against(tmp_path, scenario, lambda body, number: Script(), keys=("ka", "kb", "kc"))
    for served in ran.server.served:
        tenant = (int(str(served.body["seed"])) - 5) % 6
        assert served.authorization == f"bearer {('ka', 'kb', 'kc')[tenant % 3]}"
        assert served.body["model"] == f"a{tenant % 4}"
    assert summarise(ran.samples, Slo()).tenant_fairness == 1.0
    late_for_one = summarise(ran.samples, Slo(ttft_s=0.0001))
    assert late_for_one.goodput_per_s == 0.0


def test_percentiles_agree_with_numpy_and_know_infinity() -> None:
    rng = random.Random(1)
    for count in (1, 2, 3, 10, 101):
        values = sorted(rng.expovariate(1.0) for _ in range(count))
        for quantile in (0.0, 0.5, 0.9, 0.99, 1.0):
            assert percentile(values, quantile) == EXACT(float(np.percentile(values, 100 * quantile)))
    infinite = float("inf")
    assert percentile([1.0, infinite], 0.5) == infinite
    assert percentile([infinite, infinite], 0.5) == infinite
    assert spread([], 2).p50 == infinite
    assert spread([1.0, 2.0, 3.0], 1).p50 == 2.5
    assert np.isnan(spread([]).p50)


def test_jains_index_knows_equal_and_unequal() -> None:
    assert jain([0.3, 0.3, 0.3]) == EXACT(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == EXACT(0.25)
    assert jain([0.0, 0.0]) == 1.0


def test_goodput_asks_for_every_target_that_is_set() -> None:
    sample = Sample(0, "m", None, None, 4, 3, scheduled_s=1.0, sent_s=1.5, end_s=4.0)
    sample.token_at_s, sample.num_output_tokens = [2.0, 2.5, 4.0], 3
    met = [Slo(), Slo(ttft_s=1.0), Slo(itl_s=1.5), Slo(tpot_s=1.0), Slo(e2e_s=3.0), Slo(1.0, 1.5, 1.0, 3.0)]
    missed = [Slo(ttft_s=0.99), Slo(itl_s=1.49), Slo(tpot_s=0.99), Slo(e2e_s=2.99), Slo(1.0, 1.5, 1.0, 2.99)]
    assert all(slo.is_met_by(sample) for slo in met)
    assert not any(slo.is_met_by(sample) for slo in missed)
    sample.failure = "cut"
    assert not Slo().is_met_by(sample)
