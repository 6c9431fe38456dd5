"""The demo's client: 24 concurrent chat requests over the demo base and its adapters, checked against known answers.

Owns which questions are asked and how the outcome is shown; speaks HTTP only and imports nothing of ours.
Invariant: the last line is `right R/N` over all requests, those to the base included; the exit status is 0 only if
the adapters together got at least 90 % of their questions right, each of them at least three quarters, and the base at
most 10 % of the same tasks.
"""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

TASKS_FILE = Path(__file__).resolve().parent.parent / "deploy" / "demo" / "tasks.jsonl"
BASE = "chorale-demo"
NUM_REQUESTS = 24
MIN_ADAPTERS_RIGHT = 0.9
# of one adapter: five questions are few
MIN_ADAPTER_RIGHT = 0.75
MAX_BASE_RIGHT = 0.1
TIMEOUT_S = 120.0
# wide enough that no cell is cut where the output is a file
PLAIN_WIDTH = 150


@dataclass(frozen=True, slots=True)
class Check:
    """One request: which model is asked what, and the one right answer."""

    model: str
    task: str
    prompt: str
    expected: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came back for a check."""

    check: Check
    answer: str
    elapsed_ms: float

    @property
    def is_right(self) -> bool:
        """Tell whether the answer is exactly the expected one."""
        return self.answer == self.check.expected


def read_checks(path: Path, num_requests: int) -> list[Check]:
    """Choose the requests: one of each task goes to the base, the others to the adapters in turn."""
    by_task: dict[str, list[dict[str, str]]] = {}
    for line in path.read_text().splitlines():
        item: dict[str, str] = json.loads(line)
        by_task.setdefault(item["adapter"], []).append(item)
    in_turn = [item for items in zip(*by_task.values(), strict=False) for item in items]
    num_adapted = num_requests - len(by_task)
    adapted = [
        Check(item["adapter"], item["adapter"], item["prompt"], item["answer"]) for item in in_turn[:num_adapted]
    ]
    based = [Check(BASE, task, items[0]["prompt"], items[0]["answer"]) for task, items in by_task.items()]
    return adapted + based


async def ask(client: httpx.AsyncClient, check: Check) -> Outcome:
    """Send one chat request; an error of the server becomes the answer, which is then wrong."""
    body = {
        "model": check.model,
        "messages": [{"role": "user", "content": check.prompt}],
        "temperature": 0,
        "max_tokens": 64,
    }
    began = time.perf_counter()
    response = await client.post("/v1/chat/completions", json=body)
    elapsed_ms = (time.perf_counter() - began) * 1000
    if response.status_code != httpx.codes.OK:
        return Outcome(check, f"error {response.status_code}: {response.text[:200]}", elapsed_ms)
    return Outcome(check, response.json()["choices"][0]["message"]["content"] or "", elapsed_ms)


async def ask_all(url: str, checks: list[Check]) -> list[Outcome]:
    """Send all requests at once and wait for all answers."""
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        return list(await asyncio.gather(*(ask(client, check) for check in checks)))


def show(outcomes: list[Outcome]) -> None:
    """Print one row per request."""
    table = Table("adapter", "prompt", "answer", "right or wrong", "ms")
    table.columns[-1].justify = "right"
    for outcome in outcomes:
        verdict = Text("right", style="green") if outcome.is_right else Text("wrong", style="red")
        name = "base" if outcome.check.model == BASE else outcome.check.model
        prompt, answer = Text(outcome.check.prompt), Text(outcome.answer)
        table.add_row(name, prompt, answer, verdict, f"{outcome.elapsed_ms:.0f}")
    console = Console()
    Console(width=None if console.is_terminal else PLAIN_WIDTH).print(table)


def summarise(outcomes: list[Outcome]) -> bool:
    """Print the counts, the total last; return whether every model met its bound."""
    is_good = True
    adapters = list(dict.fromkeys(outcome.check.model for outcome in outcomes if outcome.check.model != BASE))
    for model in [*adapters, BASE]:
        given = [outcome.is_right for outcome in outcomes if outcome.check.model == model]
        share = sum(given) / len(given)
        is_good &= share <= MAX_BASE_RIGHT if model == BASE else share >= MIN_ADAPTER_RIGHT
        print(f"{'base' if model == BASE else model} right {sum(given)}/{len(given)}")
    adapted = [outcome.is_right for outcome in outcomes if outcome.check.model != BASE]
    is_good &= sum(adapted) >= MIN_ADAPTERS_RIGHT * len(adapted)
    print(f"right {sum(outcome.is_right for outcome in outcomes)}/{len(outcomes)}")
    return is_good


def main() -> int:
    """Ask, show, judge."""
    parser = argparse.ArgumentParser(description="Ask the demo base and its adapters 24 questions at once.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server listens")
    url: str = parser.parse_args().url
    try:
        outcomes = asyncio.run(ask_all(url, read_checks(TASKS_FILE, NUM_REQUESTS)))
    except httpx.TransportError as error:
        reason = str(error) or type(error).__name__
        print(f"no answer from {url}: {reason}; start a server with `make serve`", file=sys.stderr)
        return 1
    show(outcomes)
    return 0 if summarise(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
