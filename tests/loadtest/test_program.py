"""The program as a person runs it: arguments in, files and exit status out, against a scripted server over TCP."""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import pytest

from loadtest.__main__ import main
from loadtest.client import Client
from loadtest.environment import read_environment
from loadtest.errors import LoadtestError
from loadtest.results import read_results
from loadtest.samples import Sample, read_samples, write_samples
from loadtest.scenario import Scenario
from loadtest.verify import Verdict, verify
from loadtest.workload import build_plan
from tests.loadtest.runs import make_scenario
from tests.loadtest.synthetic_server import Body, Script, SyntheticServer
from tests.loadtest.virtual_time import run_virtually

MODELS = {"data": [{"id": "base"}, {"id": "fr", "parent": "base"}, {"id": "sql", "parent": "base"}]}
SCENARIO = """
name = "mine <b>"
about = "a & b"
num_requests = 6
[arrivals]
kind = "closed"
concurrency = 3
[lengths]
prompt = { kind = "fixed", value = 4 }
output = { kind = "fixed", value = 2 }
[adapters]
count = 2
popularity = "distinct"
[[sweep]]
field = "adapters.count"
values = [1, 2]
"""


class Answers(BaseHTTPRequestHandler):
    """Lists models; streams two tokens, unless the model's name says to fail."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        found = self.path == "/v1/models"
        self._send(200 if found else 404, json.dumps(MODELS if found else {}).encode(), "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["model"] == "broken":
            self._send(503, b"{}", "application/json")
            return
        events = [{"choices": [{"text": f"{body['model']} "}]}, {"choices": [{"text": "x", "finish_reason": "length"}]}]
        usage = {"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": 2}}
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in [*events, usage]) + "data: [DONE]\n\n"
        self._send(200, text.encode(), "text/event-stream")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def listening() -> Iterator[str]:
    """Run the server in threads; yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Return the address of a server for the module."""
    with listening() as address:
        yield address


@pytest.fixture
def scenario_file(tmp_path: Path) -> Path:
    """Return a scenario's file."""
    path = tmp_path / "mine.toml"
    path.write_text(SCENARIO, encoding="utf-8")
    return path


def test_a_session_leaves_figures_samples_pictures_and_one_page(
    url: str, scenario_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [str(scenario_file), "--url", url, "--out", str(out), "--verify", "--api-key", "sk-secret"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "mine <b> (count 2)" in printed and "6 answers equal their solo run" in printed
    runs = read_samples(out / "samples.jsonl")
    assert list(runs) == ["mine <b> (count 1)", "mine <b> (count 2)"]
    assert [sample.model for sample in runs["mine <b> (count 2)"]] == ["fr", "sql", "fr", "sql", "fr", "sql"]
    value = read_results(out / "results.json")
    assert isinstance(value["runs"], list) and len(value["runs"]) == 2
    summary = value["runs"][1]["summary"]
    assert summary["num_ok"] == 6 and summary["output_tokens"] == 12 and summary["failures"] == {}
    assert value["runs"][1]["verdict"]["num_equal"] == 6
    pictures = sorted(out.glob("*.png"))
    assert len(pictures) == 3 and all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in pictures)
    everything = "".join(path.read_text(encoding="utf-8") for path in out.glob("*.*") if path.suffix != ".png")
    assert "sk-secret" not in everything


class Page(HTMLParser):
    """Collects a page's tags, what they point to, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.targets: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [value or "" for key, value in attrs if key in {"src", "href", "srcset", "action"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_everything_in_it_is_escaped(url: str, scenario_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(scenario_file), "--url", url, "--out", str(out)]) == 0
    source = (out / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    assert len(page.targets) == 3 and all(target.startswith("data:image/png;base64,") for target in page.targets)
    assert (
        not {
            "script",
            "link",
            "iframe",
        }
        & set(page.tags)
        and "url(" not in source
    )
    assert "mine <b>" in page.text and "a & b" in page.text and "count 2" in page.text


def test_failed_requests_make_a_status_of_1_and_are_shown(
    url: str, scenario_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(scenario_file), "--url", url, "--out", str(tmp_path / "out"), "--adapters", "fr,broken"]
    assert main(arguments) == 1
    assert "3 failed with http_503" in capsys.readouterr().out
    summary = read_results(tmp_path / "out" / "results.json")["runs"][1]["summary"]  # type: ignore[index]
    assert summary["failures"] == {"http_503": 3}
    assert summary["ttft_s"]["p99"] == float("inf")
    assert '"inf"' in (tmp_path / "out" / "results.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "name a scenario"),
        (["no-such-scenario"], "no-such-scenario"),
        (["FILE", "--set", "adapters.count=9"], "needs 9 adapters and the server lists 2"),
        (["FILE", "--set", 'arrivals={kind="trace",trace="azure-conv"}'], "--traces"),
        (["FILE", "--vocab", "100"], "outside the vocabulary of 100"),
        (["FILE", "--adapter-folder", "nowhere"], "adapter_config.json"),
        (["FILE", "--keys-file", "nowhere"], "--keys-file"),
        (["FILE", "--set", "churn={every_s=1,count=1}"], "--adapter-folder"),
        (["FILE", "--model", "broken", "--set", "num_requests=1"], "http_503"),
        (["--compare", "a.json", "b.json"], "a.json"),
    ],
)
def test_what_cannot_run_says_why_with_a_status_of_2(
    url: str, scenario_file: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(scenario_file) if argument == "FILE" else argument for argument in arguments]
    assert main([*given, "--url", url]) == 2
    assert named in capsys.readouterr().err


def test_no_server_is_said_so(scenario_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listening() as address:
        pass
    assert main([str(scenario_file), "--url", address]) == 2
    assert "is a server running there?" in capsys.readouterr().err


def test_two_files_are_compared_run_by_run(
    url: str, scenario_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (tmp_path / name for name in ("first", "second"))
    assert main([str(scenario_file), "--url", url, "--out", str(first)]) == 0
    assert main([str(scenario_file), "--url", url, "--out", str(second), "--set", "num_requests=4"]) == 0
    capsys.readouterr()
    assert main(["--compare", str(first / "results.json"), str(second / "results.json")]) == 0
    assert capsys.readouterr().out.count("another load, not compared") == 2
    value = json.loads((first / "results.json").read_text(encoding="utf-8"))
    value["runs"] = value["runs"][:1]
    value["runs"][0]["summary"]["output_tokens_per_s"] *= 2
    value["runs"][0]["summary"]["ttft_s"]["p50"] = "inf"
    (second / "results.json").write_text(json.dumps(value), encoding="utf-8")
    assert main(["--compare", str(first / "results.json"), str(second / "results.json")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"tokens/s .*2\.000.*better", printed)
    assert re.search(r"TTFT p50 ms .*missed.*worse", printed)
    assert "mine <b> (count 2): only in the first file" in printed


def test_a_file_of_another_kind_is_no_result(tmp_path: Path) -> None:
    for text in ("{}", "[]", "no json", '{"format": "chorale-loadtest/9"}'):
        path = tmp_path / "results.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(LoadtestError, match=re.escape("results.json")):
            read_results(path)


def test_samples_survive_their_file(tmp_path: Path) -> None:
    sample = Sample(3, "m", 1, 2, 10, 4, 0.5, 0.6, 1.5, [0.7, 0.9], 10, 4, True, 200, text='a\n"ü', token_ids=[1, 2])
    lost = Sample(4, "m", None, None, 10, 4, 0.5, failure="cut", detail="x")
    write_samples(tmp_path / "s.jsonl", "one", [sample, lost])
    write_samples(tmp_path / "s.jsonl", "two", [lost])
    assert read_samples(tmp_path / "s.jsonl") == {"one": [sample, lost], "two": [lost]}


def test_the_environment_holds_no_secret() -> None:
    for secret in (["--api-key", "sk-1"], ["--api-key=sk-1"]):
        command = str(read_environment(["punica", *secret, "--verify"])["command"])
        assert "sk-1" not in command and command.endswith("--verify")


def verify_with(folder: Path, scenario: Scenario, script: Callable[[Body, int], Script]) -> Verdict:
    """Send every planned request once for the record, then verify, against a scripted server."""

    async def check() -> Verdict:
        plan = build_plan(scenario)
        server = SyntheticServer(script)
        async with server.listening(folder / "s.sock"):
            connector = aiohttp.UnixConnector(str(folder / "s.sock"))
            async with Client("http://synthetic", connector=connector) as client:
                samples = []
                for request in plan.requests:
                    sample = Sample(request.index, "a", 0, None, 8, 3, 0.0)
                    await client.send("/v1/completions", b'{"seed": 0}', sample)
                    samples.append(sample)
                return await verify(client, scenario, plan, samples, {}, lambda: None)

    return run_virtually(check())


def test_an_answer_that_differs_alone_is_found(tmp_path: Path) -> None:
    def script(body: Body, number: int) -> Script:
        return Script(texts=("a", "b", "X" if number == 25 else "c"))

    verdict = verify_with(tmp_path, make_scenario(), script)
    assert verdict.num_equal == 19 and not verdict.by_token_ids
    assert [mismatch.index for mismatch in verdict.mismatches] == [5]
    assert (verdict.mismatches[0].under_load, verdict.mismatches[0].alone) == ("'abc'", "'abX'")


def test_other_token_ids_behind_the_same_text_are_found(tmp_path: Path) -> None:
    def script(body: Body, number: int) -> Script:
        return Script(texts=("a", "b", "c"), token_ids=(1, 2, 4 if number == 30 else 3))

    verdict = verify_with(tmp_path, make_scenario(), script)
    assert verdict.num_equal == 19 and verdict.by_token_ids
    assert [(one.index, one.under_load, one.alone) for one in verdict.mismatches] == [(10, "[1, 2, 3]", "[1, 2, 4]")]


def test_what_failed_is_never_called_equal(tmp_path: Path) -> None:
    def script(body: Body, number: int) -> Script:
        return Script(status=500) if number in (2, 24) else Script()

    verdict = verify_with(tmp_path, make_scenario(), script)
    # number 24 is the solo run of the request with index 5: number 22 was index 3, as index 2 is not asked again
    assert verdict.num_equal == 18 and verdict.mismatches == []
    assert verdict.why == {"failed under load": 1, "failed alone: http_500": 1}
    assert verdict.num_incomparable == 2


def test_the_tester_runs_in_any_event_loop() -> None:
    # Client may be made before there is a loop
    client = Client("http://nowhere/")
    assert client.url == "http://nowhere"
    with pytest.raises(RuntimeError):
        client.now_s()
    assert asyncio.run(_clock(client)) >= 0.0


async def _clock(client: Client) -> float:
    client.start_clock()
    return client.now_s()
