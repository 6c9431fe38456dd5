"""The tester against the real server: every answer token-exact under load, while adapters are changed beneath it."""

from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.results import read_results
from loadtest.samples import read_samples
from tests.conftest import StartServer
from tests.live_server import LiveServer
from tests.tiny_model import write_tiny_adapter, write_tiny_model

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def served(live_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    """Return a server of a tiny model in fp32, where answers do not depend on the batch."""
    return live_server(write_tiny_model(tmp_path_factory.mktemp("tiny") / "model"), "--dtype", "float32")


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a PEFT folder."""
    return write_tiny_adapter(tmp_path_factory.mktemp("adapters"), "one", rank=4, seed=3).folder


SCENARIO = """
name = "exchange"
num_requests = 36
[arrivals]
kind = "closed"
concurrency = 6
[lengths]
prompt = { kind = "uniform", low = 4, high = 24 }
output = { kind = "uniform", low = 4, high = 24 }
[adapters]
count = 3
popularity = "zipf"
base_share = 0.2
[request]
last_id = 200
return_token_ids = true
[churn]
every_s = 0.05
count = 3
absent_s = 0.05
"""


def test_every_answer_is_token_exact_while_adapters_are_exchanged(
    served: LiveServer, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = tmp_path / "exchange.toml"
    scenario.write_text(SCENARIO, encoding="utf-8")
    out = tmp_path / "out"
    arguments = [str(scenario), "--url", served.url, "--adapter-folder", str(adapter_folder), "--verify"]
    assert main([*arguments, "--out", str(out)]) == 0, capsys.readouterr()
    run = read_results(out / "results.json")["runs"][0]  # type: ignore[index]
    verdict = run["verdict"]
    assert verdict["mismatches"] == [] and verdict["by_token_ids"]
    assert verdict["num_equal"] + verdict["num_incomparable"] == 36
    assert [change["kind"] for change in run["changes"]] == ["delete", "evict", "replace"]
    samples = read_samples(out / "samples.jsonl")["exchange"]
    # what a deleted name answered cannot be asked again; all others must have been compared
    deleted = {change["adapter"] for change in run["changes"] if change["kind"] == "delete"}
    others = sum(sample.model not in deleted for sample in samples)
    assert set(verdict["why"]) <= {"its version is gone", "failed under load"}
    assert verdict["num_equal"] >= others > 15
    assert all(sample.num_output_tokens == sample.output_tokens for sample in samples if sample.is_ok)
    assert len({tuple(sample.token_ids) for sample in samples if sample.is_ok}) > 20
    with served.client() as client:
        left = [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert len(left) == 1, "what the tester uploaded, it deletes"


def test_a_session_that_cannot_go_on_takes_its_adapters_away(
    served: LiveServer, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = tmp_path / "exchange.toml"
    scenario.write_text(SCENARIO, encoding="utf-8")
    arguments = [str(scenario), "--url", served.url, "--adapter-folder", str(adapter_folder)]
    # the first run uploads its adapters; the second cannot be made
    smaller = ["--set", "num_requests=4", "--set", "churn.count=1", "--model", "nobody"]
    assert main([*arguments, *smaller, "--out", str(tmp_path / "out")]) == 2
    assert "http_404" in capsys.readouterr().err
    with served.client() as client:
        assert len(client.get("/v1/models").json()["data"]) == 1
