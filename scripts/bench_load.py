"""A closed-loop load: a fixed number of clients, each sending its next request as soon as its last one ended.

Speaks the completions API with token-id prompts, streaming, so that any OpenAI-compatible server runs the same work.
"""

import asyncio
import random
import statistics
import time
from dataclasses import dataclass

import httpx


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_requests` requests over `models` in turn; every prompt is random, so no prefix is ever shared."""

    models: list[str]
    concurrency: int
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What one run measured; times in seconds."""

    tokens_per_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    e2e_p50_s: float
    num_failed: int


def run_load(url: str, workload: Workload, vocab: int) -> LoadResult:
    """Run a workload to its end."""
    return asyncio.run(_run(url, workload, vocab))


async def _run(url: str, workload: Workload, vocab: int) -> LoadResult:
    rng = random.Random(workload.seed)
    jobs = [
        (workload.models[i % len(workload.models)], [rng.randrange(2, vocab) for _ in range(workload.prompt_tokens)])
        for i in range(workload.num_requests)
    ]
    pending = iter(jobs)
    times: list[tuple[float, float]] = []
    failures: list[str] = []
    limits = httpx.Limits(max_connections=workload.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=1200, limits=limits) as client:

        async def work() -> None:
            for model, prompt in pending:
                try:
                    times.append(await _request(client, model, prompt, workload.output_tokens))
                except (httpx.HTTPError, ValueError) as error:
                    failures.append(str(error))

        begin = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(workload.concurrency)))
        seconds = time.perf_counter() - begin
    if failures:
        print("failed:", failures[0][:300])
    ttft = sorted(first for first, _ in times) or [float("nan")]
    ends = [end for _, end in times] or [float("nan")]
    return LoadResult(
        tokens_per_s=len(times) * workload.output_tokens / seconds,
        ttft_p50_s=statistics.median(ttft),
        ttft_p90_s=ttft[int(0.9 * (len(ttft) - 1))],
        e2e_p50_s=statistics.median(ends),
        num_failed=len(failures),
    )


async def _request(client: httpx.AsyncClient, model: str, prompt: list[int], output_tokens: int) -> tuple[float, float]:
    body = {"model": model, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True}
    begin = time.perf_counter()
    first = None
    usage = None
    async with client.stream(
        "POST", "/v1/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}}
    ) as response:
        if response.status_code != 200:
            raise ValueError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - begin
                usage = line if '"completion_tokens"' in line else usage
    if first is None or usage is None or f'"completion_tokens":{output_tokens}' not in usage.replace(" ", ""):
        raise ValueError(f"{model}: the stream ended without {output_tokens} tokens: {usage}")
    return first, time.perf_counter() - begin
