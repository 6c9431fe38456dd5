"""`scripts/demo.py` judges a server fairly: right is right, and every kind of failure ends with status 1.

Owns a stand-in server on loopback that answers from tasks.jsonl. Invariant: the stand-in is stopped with the test.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts.demo import BASE, NUM_REQUESTS, TASKS_FILE, read_checks

REPO_ROOT = Path(__file__).resolve().parents[2]
Reply = Callable[[str, str], str]
StartServer = Callable[[Reply], str]


class StandIn(ThreadingHTTPServer):
    """A server whose backlog holds all of the demo's connections at once."""

    request_queue_size = 64


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    servers: list[StandIn] = []

    def start(reply: Reply) -> str:
        class Answerer(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert body["temperature"] == 0
                text = reply(body["model"], body["messages"][-1]["content"])
                is_found = text != "missing"
                content = {"choices": [{"message": {"content": text}}]} if is_found else {"error": {"message": text}}
                payload = json.dumps(content).encode()
                self.send_response(200 if is_found else 404)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = StandIn(("127.0.0.1", 0), Answerer)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    try:
        yield start
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    items = [json.loads(line) for line in TASKS_FILE.read_text().splitlines()]
    return {item["prompt"]: item["answer"] for item in items}


def _asked() -> list[tuple[str, str]]:
    """Return each request's model and prompt."""
    return [(check.model, check.prompt) for check in read_checks(TASKS_FILE, NUM_REQUESTS)]


def run_demo(url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/demo.py", "--url", url]
    return subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=240)


def test_a_server_that_is_not_there_is_one_clear_line_and_status_one() -> None:
    done = run_demo("http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "make serve" in done.stderr


def test_an_adapter_that_fails_its_task_is_status_one(start_server: StartServer, answers: dict[str, str]) -> None:
    url = start_server(lambda model, prompt: "no" if model in (BASE, "reverse") else answers[prompt])
    done = run_demo(url)
    assert done.returncode == 1
    assert "reverse right 0/5" in done.stdout.splitlines()


@pytest.mark.parametrize(("num_wrong", "status"), [(1, 0), (2, 1)])
def test_of_an_adapter_s_five_questions_one_may_fail(
    num_wrong: int, status: int, start_server: StartServer, answers: dict[str, str]
) -> None:
    wrong = [prompt for model, prompt in _asked() if model == "zog"][:num_wrong]
    done = run_demo(start_server(lambda model, prompt: "no" if model == BASE or prompt in wrong else answers[prompt]))
    assert done.returncode == status, done.stdout
    assert f"zog right {5 - num_wrong}/5" in done.stdout.splitlines()


def test_three_adapters_that_fail_once_each_are_status_one(start_server: StartServer, answers: dict[str, str]) -> None:
    wrong = [next(prompt for model, prompt in _asked() if model == name) for name in ("zog", "shout", "reverse")]
    url = start_server(lambda model, prompt: "no" if model == BASE or prompt in wrong else answers[prompt])
    done = run_demo(url)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "right 17/24"


def test_a_base_that_knows_the_tasks_is_status_one(start_server: StartServer, answers: dict[str, str]) -> None:
    done = run_demo(start_server(lambda model, prompt: answers[prompt]))
    assert done.returncode == 1
    assert "base right 4/4" in done.stdout.splitlines()


def test_an_unknown_adapter_shows_the_server_s_error(start_server: StartServer, answers: dict[str, str]) -> None:
    url = start_server(lambda model, prompt: {BASE: "no", "zog": "missing"}.get(model, answers[prompt]))
    done = run_demo(url)
    assert done.returncode == 1
    assert "error 404" in done.stdout


def test_right_adapters_over_an_ignorant_base_are_status_zero(
    start_server: StartServer, answers: dict[str, str]
) -> None:
    done = run_demo(start_server(lambda model, prompt: "I do not know." if model == BASE else answers[prompt]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["base right 0/4", "right 20/24"]


def test_the_requests_are_balanced_and_the_base_is_asked_every_task() -> None:
    checks = read_checks(TASKS_FILE, NUM_REQUESTS)
    assert len(checks) == NUM_REQUESTS
    tasks = {check.task for check in checks}
    assert {check.task for check in checks if check.model == BASE} == tasks
    for task in tasks:
        assert sum(check.model == task for check in checks) == 5
