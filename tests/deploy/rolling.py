"""Clients that stream without a pause while servers behind a proxy are restarted one after the other.

Owns the load and its account: every request is either a complete, correct stream or a failure with its reason.
Invariant: nothing is retried here; what the proxy does by itself is part of what is tested.
"""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field

import httpx

NUM_CLIENTS = 6
# nothing here is about speed: what has not come by then does not come
TIMEOUT_S = 600.0
MAX_TOKENS = 6


@dataclass(slots=True)
class Account:
    """What became of the requests."""

    num_good: int = 0
    # reason -> how many
    failures: Counter[str] = field(default_factory=Counter)


class Load:
    """Closed-loop clients of one address, each with several adapters in turn; `stop` ends them with what they run."""

    def __init__(self, url: str, models: list[str]) -> None:
        self._url = url
        self._models = models
        self._is_stopping = False
        self._expected: dict[str, str] = {}
        self._goal = 0
        self._has_reached = asyncio.Event()
        self.account = Account()

    async def learn(self) -> None:
        """Note each model's answer, before anything is restarted."""
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_S, trust_env=False) as client:
            for model in self._models:
                self._expected[model] = await _stream(client, model)

    async def run(self) -> None:
        """Send until `stop`."""
        async with asyncio.TaskGroup() as group:
            for number in range(NUM_CLIENTS):
                group.create_task(self._client(number))

    async def reach(self, num_good: int, running: "asyncio.Task[None]") -> None:
        """Return once so many requests have succeeded, or one has failed, or the clients have ended."""
        self._goal = num_good
        self._note()
        reached = asyncio.create_task(self._has_reached.wait())
        await asyncio.wait({reached, running}, return_when=asyncio.FIRST_COMPLETED)
        reached.cancel()

    def stop(self) -> None:
        """Let every client finish its request and leave."""
        self._is_stopping = True

    async def _client(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_S, trust_env=False) as client:
            while not self._is_stopping:
                number += 1
                model = self._models[number % len(self._models)]
                try:
                    text = await _stream(client, model)
                except (httpx.HTTPError, BrokenStream) as error:
                    self.account.failures[f"{type(error).__name__}: {error}"[:200]] += 1
                    self._note()
                    continue
                if text == self._expected[model]:
                    self.account.num_good += 1
                else:
                    self.account.failures[f"{model} said {text!r}, not {self._expected[model]!r}"] += 1
                self._note()

    def _note(self) -> None:
        if self._goal and (self.account.failures or self.account.num_good >= self._goal):
            self._has_reached.set()


class BrokenStream(Exception):
    """The answer was no 200, or its stream did not end as it must."""


async def _stream(client: httpx.AsyncClient, model: str) -> str:
    body = {"model": model, "prompt": "ab", "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
    text, reason, is_done = "", None, False
    async with client.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as response:
        if response.status_code != 200:
            raise BrokenStream(f"{response.status_code}: {(await response.aread())[:120]!r}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise BrokenStream(f"{event['error']['code']} in the stream")
                choice = event["choices"][0]
                text += choice["text"]
                reason = choice["finish_reason"] or reason
    if not is_done or reason != "length":
        raise BrokenStream(f"the stream ended with {reason!r}, [DONE] {is_done}")
    return text
