"""Scenario files, plans and traces: what they mean, and that whatever means nothing is refused by name."""

import json
import re
from pathlib import Path

import pytest

from loadtest.__main__ import SCENARIOS
from loadtest.errors import InvalidScenario, InvalidTrace
from loadtest.scenario import load_scenarios
from loadtest.traces import FILES, read_trace
from loadtest.workload import build_plan
from tests.loadtest.runs import make_scenario

VALID = """
name = "mine"
num_requests = 10
[arrivals]
kind = "poisson"
rate = 4.0
[lengths]
prompt = { kind = "fixed", value = 8 }
output = { kind = "fixed", value = 3 }
[adapters]
count = 4
[smoke]
"arrivals.rate" = 9.0
"""

# a line of VALID, what it becomes, and what the refusal must name
BAD = {
    "unknown-key": ("num_requests = 10", "num_request = 10", "num_request"),
    "unknown-nested": ("rate = 4.0", "rate = 4.0\ncv = 2.0", "cv"),
    "no-name": ('name = "mine"', "", "name"),
    "zero-rate": ("rate = 4.0", "rate = 0.0", "arrivals.rate"),
    "text-rate": ("rate = 4.0", 'rate = "4"', "arrivals.rate"),
    "nan-rate": ("rate = 4.0", "rate = nan", "arrivals.rate"),
    "infinite-rate": ("rate = 4.0", "rate = inf", "arrivals.rate"),
    "unknown-arrivals": ('"poisson"', '"possion"', "possion"),
    "no-end": ("num_requests = 10", "", "num_requests"),
    "closed-without-number": (
        'num_requests = 10\n[arrivals]\nkind = "poisson"\nrate = 4.0',
        'duration_s = 4\n[arrivals]\nkind = "closed"\nconcurrency = 2',
        "num_requests",
    ),
    "boolean-number": ("num_requests = 10", "num_requests = true", "num_requests"),
    "no-requests": ("num_requests = 10", "num_requests = 0", "num_requests"),
    "unknown-popularity": ("count = 4", 'count = 4\npopularity = "hot"', "hot"),
    "backward-skew": ("count = 4", 'count = 4\npopularity = "skewed"\nexponent = 0.5', "exponent"),
    "share-over-one": ("count = 4", "count = 4\nbase_share = 1.5", "base_share"),
    "trace-lengths-alone": ('{ kind = "fixed", value = 8 }', '{ kind = "trace" }', "trace"),
    "empty-uniform": ('{ kind = "fixed", value = 8 }', '{ kind = "uniform", low = 9, high = 8 }', "high"),
    "weights-short": (
        '{ kind = "fixed", value = 8 }',
        '{ kind = "choice", values = [1, 2], weights = [1] }',
        "weights",
    ),
    "churn-of-nothing": ("count = 4", "count = 0\n[churn]\nevery_s = 1\ncount = 2", "churn"),
    "unknown-change": ("count = 4", 'count = 4\n[churn]\nevery_s = 1\ncount = 2\nkinds = ["rename"]', "rename"),
    "empty-sweep": ("[smoke]", '[[sweep]]\nfield = "arrivals.rate"\nvalues = []\n[smoke]', "values"),
    "sweep-of-nothing": ("[smoke]", '[[sweep]]\nfield = "arrivals.rat"\nvalues = [1]\n[smoke]', "rat"),
    "not-toml": ("count = 4", "count = = 4", "mine.toml"),
    "reversed-ids": ("[smoke]", "[request]\nfirst_id = 9\nlast_id = 8\n[smoke]", "last_id"),
}


def write(folder: Path, text: str) -> Path:
    """Write a scenario file."""
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("case", BAD)
def test_what_means_nothing_is_refused_by_name(tmp_path: Path, case: str) -> None:
    old, new, named = BAD[case]
    assert old in VALID
    with pytest.raises(InvalidScenario, match=re.escape(named)):
        load_scenarios(write(tmp_path, VALID.replace(old, new, 1)))


def test_smoke_and_overrides_replace_keys_in_that_order(tmp_path: Path) -> None:
    path = write(tmp_path, VALID)
    assert load_scenarios(path)[0].arrivals.rate == 4.0
    assert load_scenarios(path, is_smoke=True)[0].arrivals.rate == 9.0
    assert load_scenarios(path, ["arrivals.rate=7", "slo.ttft_s=1.5"], is_smoke=True)[0].arrivals.rate == 7.0
    assert load_scenarios(path, ["slo.ttft_s=1.5"])[0].slo.ttft_s == 1.5
    for bad in ("arrivals.rate", "arrivals.rate=fast", "name.x=1", "=3"):
        with pytest.raises(InvalidScenario, match=re.escape(bad.partition("=")[0] or "=3")):
            load_scenarios(path, [bad])


def test_sweeps_are_crossed_and_labelled(tmp_path: Path) -> None:
    sweeps = (
        '[[sweep]]\nfield = "arrivals.rate"\nvalues = [1, 2]\n[[sweep]]\nfield = "adapters.count"\nvalues = [3, 5]\n'
    )
    runs = load_scenarios(write(tmp_path, VALID + sweeps))
    assert [run.label for run in runs] == [f"rate {rate}, count {count}" for rate in (1, 2) for count in (3, 5)]
    assert [(run.arrivals.rate, run.adapters.count) for run in runs] == [(1, 3), (1, 5), (2, 3), (2, 5)]
    # an override of what is swept ends the sweep: it would be lost otherwise
    fixed = load_scenarios(tmp_path / "mine.toml", ["arrivals.rate=9"])
    assert [(run.arrivals.rate, run.adapters.count) for run in fixed] == [(9, 3), (9, 5)]


def test_every_scenario_that_comes_along_reads_and_plans() -> None:
    paths = sorted(SCENARIOS.glob("*.toml"))
    assert len(paths) >= 10
    for path in paths:
        for run in [*load_scenarios(path), *load_scenarios(path, is_smoke=True)]:
            if run.arrivals.kind != "trace":
                plan = build_plan(run)
                assert len(plan.requests) == run.num_requests
                assert all(request.adapter is None or request.adapter < run.adapters.count for request in plan.requests)


def test_a_plan_is_the_same_everywhere_and_changes_with_the_seed() -> None:
    churn = {"every_s": 1.0, "count": 6}
    plan = build_plan(make_scenario(churn=churn))
    # constants: another machine or Python must draw the very same load
    assert plan.digest() == "721bc947e8a25871"
    bursts = {"kind": "gamma", "rate": 3.0, "cv": 2.0}
    lengths = {"prompt": {"kind": "lognormal", "median": 20, "sigma": 0.5}, "output": {"kind": "fixed", "value": 3}}
    zipf = {"count": 9, "popularity": "zipf"}
    large = make_scenario(num_requests=2000, arrivals=bursts, lengths=lengths, adapters=zipf, churn=churn)
    assert build_plan(large).digest() == "0e3975501d5b507c"
    assert plan.digest() == build_plan(make_scenario(churn=churn)).digest()
    assert plan.digest() != build_plan(make_scenario(churn=churn, seed=6)).digest()


def test_changing_the_popularity_leaves_arrivals_and_lengths_alone() -> None:
    lengths = {"prompt": {"kind": "uniform", "low": 1, "high": 99}, "output": {"kind": "fixed", "value": 3}}
    one = build_plan(make_scenario(lengths=lengths))
    other = build_plan(make_scenario(lengths=lengths, adapters={"count": 4, "popularity": "zipf"}))
    assert [request.adapter for request in one.requests] != [request.adapter for request in other.requests]
    assert [(r.at_s, r.prompt, r.output_tokens) for r in one.requests] == [
        (r.at_s, r.prompt, r.output_tokens) for r in other.requests
    ]


def test_changes_come_in_turn_and_never_repeat_contents() -> None:
    plan = build_plan(make_scenario(churn={"every_s": 0.5, "count": 30}))
    assert [change.at_s for change in plan.changes] == [0.5 * (index + 1) for index in range(30)]
    assert [change.kind for change in plan.changes[:4]] == ["delete", "evict", "replace", "delete"]
    contents = [(change.adapter, change.revision) for change in plan.changes if change.kind != "evict"]
    assert len(set(contents)) == len(contents) == 20 and all(revision > 0 for _, revision in contents)


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def plant(folder: Path, name: str, text: str) -> Path:
    """Write a trace file into a folder of traces."""
    path = folder / FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return folder


def test_traces_are_replayed_at_their_times_faster_and_shorter(tmp_path: Path) -> None:
    rows = "2023-11-16 18:15:47.5000000,40,20\n2023-11-16 18:15:46.5000000,100,10\n2023-11-16 18:15:50.5000001,900,30\n"
    plant(tmp_path, "azure-conv", AZURE + rows)
    lengths = {"prompt": {"kind": "trace"}, "output": {"kind": "trace"}, "scale": 0.5, "max_prompt": 100}
    arrivals = {"kind": "trace", "trace": "azure-conv", "speed": 2.0}
    plan = build_plan(make_scenario(num_requests=None, arrivals=arrivals, lengths=lengths), tmp_path)
    assert [(r.at_s, r.prompt.num_tokens, r.output_tokens) for r in plan.requests] == [(0.0, 50, 5), (0.5, 20, 10)]
    assert plan.num_left_out == 1
    later = build_plan(
        make_scenario(num_requests=None, arrivals=arrivals | {"skip_s": 0.5}, lengths=lengths | {"max_prompt": 500}),
        tmp_path,
    )
    assert [request.at_s for request in later.requests] == [pytest.approx(0.25), pytest.approx(1.75)]


def test_mooncakes_shared_blocks_are_shared_prompts(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 1500, "input_length": 1030, "output_length": 5, "hash_ids": [1, 2, 4]},
    ]
    plant(tmp_path, "mooncake-conversation", "".join(json.dumps(row) + "\n" for row in rows))
    lengths = {"prompt": {"kind": "trace"}, "output": {"kind": "trace"}, "scale": 0.1}
    arrivals = {"kind": "trace", "trace": "mooncake-conversation"}
    plan = build_plan(make_scenario(num_requests=None, arrivals=arrivals, lengths=lengths), tmp_path)
    assert [request.at_s for request in plan.requests] == [0.0, 1.5]
    assert [request.prompt.block_tokens for request in plan.requests] == [51, 51]
    assert [request.prompt.num_tokens for request in plan.requests] == [110, 103]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("azure-conv", "", "no request"),
        ("azure-conv", AZURE, "no request"),
        ("azure-conv", AZURE + "yesterday,1,2\n", ":2"),
        ("azure-conv", AZURE + "2023-11-16 18:15:46.6805900,374\n", ":2"),
        ("azure-code", AZURE + "2023-11-16 18:15:46.68,many,4\n", ":2"),
        ("mooncake-conversation", '{"timestamp": 1}\n', ":1"),
        ("mooncake-conversation", "[1]\n", ":1"),
        ("mooncake-synthetic", "half a line", ":1"),
    ],
)
def test_a_damaged_trace_is_refused_with_its_line(tmp_path: Path, name: str, text: str, named: str) -> None:
    with pytest.raises(InvalidTrace, match=re.escape(named)):
        read_trace(plant(tmp_path, name, text), name)


def test_a_trace_that_is_not_there_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InvalidTrace, match="--traces"):
        read_trace(None, "azure-conv")
    with pytest.raises(InvalidTrace, match="--traces"):
        read_trace(tmp_path, "azure-conv")
    with pytest.raises(InvalidTrace, match="azure-code, azure-conv"):
        read_trace(tmp_path, "google")


@pytest.mark.shared_data
def test_the_recorded_traces_read_whole(shared_data: Path) -> None:
    folder = shared_data / "traces"
    counts = {name: len(read_trace(folder, name)) for name in FILES}
    assert counts == {
        "azure-code": 8819,
        "azure-conv": 19366,
        "mooncake-conversation": 12031,
        "mooncake-synthetic": 3993,
    }
    for name in ("azure", "mooncake"):
        run = load_scenarios(SCENARIOS / f"{name}.toml", is_smoke=True)[0]
        assert len(build_plan(run, folder).requests) == run.num_requests
