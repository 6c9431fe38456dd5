"""Ask a real server held-out questions of the demo's tasks, and count exact answers.

Owns the server it starts and what is asked of it. Invariants: every question is held out of every training file; an
answer counts only if it is the expected one, character for character; all answers come over HTTP from `chorale serve`.
"""

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from adapters_store.strict_json import Json
from scripts.demo_data import Composite, composite_checks
from scripts.demo_products import BY_NAME, EXPERTS, MIXTURE, SEED, Product
from scripts.demo_tasks import check_turns

BASE_NAME = "chorale-demo"
_READY = re.compile(r"^chorale ready (http://\S+)$")
_STOP_TIMEOUT_S, _REQUEST_TIMEOUT_S = 30.0, 120.0
_MAX_TOKENS, _CONCURRENT = 72, 8
# checked against answers that training never saw, under another seed than the shipped checks
_CHECK_SEED = SEED + 7


@dataclass(frozen=True, slots=True)
class Share:
    """How many of some questions were answered right."""

    right: int
    asked: int

    @property
    def percent(self) -> float:
        """The share in percent."""
        return 100.0 * self.right / self.asked


@dataclass(frozen=True, slots=True)
class Question:
    """One chat: model, the user's messages in turn, adapters to compose (none: the model alone)."""

    model: str
    prompts: tuple[str, ...]
    adapters: tuple[str, ...] = ()


@contextmanager
def running_server(model: Path, store: Path) -> Iterator[str]:
    """Start a server over a store that holds all products; yield its address."""
    command = [sys.executable, "-m", "serve", "serve", "--model", str(model), "--store", str(store), "--port", "0"]
    command += ["--log-level", "warning", "--max-num-seqs", str(_CONCURRENT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if match := _READY.match(line.strip()):
                yield match[1]
                return
        raise SystemExit(f"the server ended with status {process.wait()} before it was ready")
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def measure(
    url: str, products: Sequence[Product], num_questions: int, num_composites: int
) -> dict[str, dict[str, Share]]:
    """Return shares by who was asked and what: a task's name, "composite" or "composite answers"."""
    tasks = [name for name in BY_NAME if any(product.task == name for product in products)]
    asked_of: dict[str, list[tuple[str, tuple[str, ...], str]]] = {"base": [("base", (), task) for task in tasks]}
    for product in products:
        own = EXPERTS if product.task is None else (product.task,)
        asked_of[product.name] = [(product.name, (), task) for task in own]
    sliced = [product for product in products if product.family == "s2ft"]
    if len(sliced) > 1:
        fused = tuple(product.name for product in sliced)
        asked_of["fused S2FT"] = [(BASE_NAME, fused, product.task) for product in sliced if product.task is not None]
    shares: dict[str, dict[str, Share]] = {}
    for who, entries in asked_of.items():
        for model, adapters, task in entries:
            name = BASE_NAME if model == "base" else model
            turns = check_turns(BY_NAME[task], num_questions, _CHECK_SEED, real_words_first=False)
            answers = _ask_all(url, [Question(name, (turn.user,), adapters) for turn in turns])
            right = sum(answer == turn.assistant for (answer,), turn in zip(answers, turns, strict=True))
            shares.setdefault(who, {})[task] = Share(right, len(turns))
    if not any(product.name == MIXTURE for product in products):
        return shares
    composites = composite_checks([BY_NAME[name] for name in EXPERTS], num_composites, _CHECK_SEED)
    for who in (MIXTURE, *EXPERTS):
        questions = [Question(who, tuple(turn.user for turn in each.turns)) for each in composites]
        shares[who] |= _composite_shares(_ask_all(url, questions), composites)
    return shares


def _composite_shares(answers: Sequence[Sequence[str]], composites: Sequence[Composite]) -> dict[str, Share]:
    verdicts = [
        [answer == turn.assistant for answer, turn in zip(given, each.turns, strict=True)]
        for given, each in zip(answers, composites, strict=True)
    ]
    whole, single = sum(all(each) for each in verdicts), sum(sum(each) for each in verdicts)
    num_single = sum(len(each) for each in verdicts)
    return {"composite": Share(whole, len(verdicts)), "composite answers": Share(single, num_single)}


def _ask_all(url: str, questions: Sequence[Question]) -> list[list[str]]:
    with (
        httpx.Client(base_url=url, timeout=_REQUEST_TIMEOUT_S, trust_env=False) as client,
        ThreadPoolExecutor(_CONCURRENT) as pool,
    ):
        return list(pool.map(lambda question: _ask(client, question), questions))


def _ask(client: httpx.Client, question: Question) -> list[str]:
    """Return the answers in turn; what was answered before is in the chat as it was given, right or wrong."""
    messages: list[Json] = []
    answers: list[str] = []
    for prompt in question.prompts:
        messages.append({"role": "user", "content": prompt})
        body: dict[str, Json] = {"model": question.model, "messages": messages, "temperature": 0}
        body["max_tokens"] = _MAX_TOKENS
        if question.adapters:
            body["adapters"] = [{"name": name, "weight": 1.0} for name in question.adapters]
        response = client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise SystemExit(f"{question.model} answers {response.status_code}: {response.text[:300]}")
        answers.append(str(response.json()["choices"][0]["message"]["content"]))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers
