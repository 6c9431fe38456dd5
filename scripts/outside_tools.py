"""The outside load testers that must agree with ours: how each is started, and how its own report is read.

Owns their command lines and formats (guidellm 0.8, inference-perf 0.7, wrk 4.1). Invariant: what is returned was
measured by the tool itself; moments are brought to the machine's monotonic clock, so that they can be laid over ours.
"""

import json
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

RATE, PROMPT_TOKENS, OUTPUT_TOKENS = 1.0, 128, 16


@dataclass(frozen=True, slots=True)
class Told:
    """What a tool says: its window, how many requests, and medians in ms; None: it does not measure that."""

    begin_s: float
    end_s: float
    num_requests: int
    ttft_ms: float | None
    itl_ms: float | None
    tpot_ms: float | None
    e2e_ms: float


@dataclass(frozen=True, slots=True)
class Target:
    """The server under test, and where a tool may write."""

    url: str
    model: str
    adapters: tuple[str, str]
    tokenizer: Path
    folder: Path
    seconds: int


def guidellm_command(program: Path, target: Target) -> list[str]:
    """Return the command line: `RATE` requests a second, synthetic text of a set length.

    Constant, not Poisson: on a busy machine its Poisson profile sent 90 requests at 3 a second within 14 s.
    """
    synthetic = f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"
    command = [str(program), "run", "--disable-console-interactive"]
    backend = f"kind=openai_http,target={target.url},model={target.model},request_format=/v1/completions"
    command += ["--backend", backend, "--profile", f"kind=constant,rate={RATE:g}", "--data", synthetic]
    command += ["--constraint", f"kind=max_requests,count={int(RATE * target.seconds)}"]
    command += ["--tokenizer", f"kind=hf_auto,model={target.tokenizer}"]
    return [*command, "--output", f"kind=json,path={target.folder / 'guidellm.json'}"]


def read_guidellm(target: Target) -> Told:
    """Read its report; what it calls ITL is (last - first) / (tokens - 1), our TPOT."""
    report = json.loads((target.folder / "guidellm.json").read_text(encoding="utf-8"))
    rows = report["benchmarks"][0]["requests"]["successful"]
    # its moments are wall-clock ones
    shift_s = time.monotonic() - time.time()
    return Told(
        begin_s=min(row["request_start_time"] for row in rows) + shift_s,
        end_s=max(row["request_end_time"] for row in rows) + shift_s,
        num_requests=len(rows),
        ttft_ms=statistics.median(row["time_to_first_token_ms"] for row in rows),
        itl_ms=None,
        tpot_ms=statistics.median(row["inter_token_latency_ms"] for row in rows),
        e2e_ms=1000 * statistics.median(row["request_latency"] for row in rows),
    )


def inference_perf_command(program: Path, target: Target) -> list[str]:
    """Write its configuration, which splits the traffic over two adapters, and return the command line."""
    lengths = [
        f"{{min: {n}, max: {n}, mean: {n}, std_dev: 0, total_count: 1000}}" for n in (PROMPT_TOKENS, OUTPUT_TOKENS)
    ]
    split = "".join(f"    - {{name: {name}, split: 0.5}}\n" for name in target.adapters)
    config = (
        f"load:\n  type: poisson\n  num_workers: 1\n  stages:\n    - {{rate: {RATE:g}, duration: {target.seconds}}}\n"
        f"  lora_traffic_split:\n{split}"
        "api: {type: completion, streaming: true}\n"
        f"server: {{type: vllm, model_name: {target.model}, base_url: '{target.url}', ignore_eos: true}}\n"
        f"tokenizer: {{pretrained_model_name_or_path: {target.tokenizer}}}\n"
        f"data:\n  type: random\n  input_distribution: {lengths[0]}\n  output_distribution: {lengths[1]}\n"
        "report: {request_lifecycle: {summary: true, per_request: true}}\n"
        f"storage: {{local_storage: {{path: {target.folder / 'inference-perf'}}}}}\n"
    )
    path = target.folder / "inference-perf.yml"
    path.write_text(config, encoding="utf-8")
    return [str(program), "-c", str(path)]


def read_inference_perf(target: Target) -> Told:
    """Read its report; its TPOT counts tokens by tokenising the text again, so it is not taken."""
    folder = target.folder / "inference-perf"
    rows = json.loads((folder / "per_request_lifecycle_metrics.json").read_text(encoding="utf-8"))
    told = json.loads((folder / "summary_lifecycle_metrics.json").read_text(encoding="utf-8"))["successes"]
    latency = told["latency"]
    return Told(
        begin_s=min(row["start_time"] for row in rows),
        end_s=max(row["end_time"] for row in rows),
        num_requests=told["count"],
        ttft_ms=1000 * latency["time_to_first_token"]["median"],
        itl_ms=1000 * latency["inter_token_latency"]["median"],
        tpot_ms=None,
        e2e_ms=1000 * latency["request_latency"]["median"],
    )


def wrk_command(program: Path, target: Target) -> list[str]:
    """Write its script, a plain POST per request, and return the command line."""
    body = {"model": target.model, "prompt": list(range(20, 20 + PROMPT_TOKENS)), "max_tokens": OUTPUT_TOKENS}
    text = json.dumps(body | {"temperature": 0, "ignore_eos": True})
    script = target.folder / "post.lua"
    lines = ['wrk.method = "POST"', f"wrk.body = [[{text}]]", 'wrk.headers["Content-Type"] = "application/json"']
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [str(program), "-t", "1", "-c", "1", "-d", f"{target.seconds}s", "--timeout", "60s", "--latency"]
    return [*command, "-s", str(script), f"{target.url}/v1/completions"]


def read_wrk(printed: str, begin_s: float, end_s: float) -> Told:
    """Read what it printed.

    Raises:
        ValueError: it printed no figures, or answers other than 2xx.
    """
    if "Non-2xx" in printed or "Socket errors" in printed:
        raise ValueError(f"wrk met failures:\n{printed}")
    found = re.search(r"50%\s+([\d.]+)(us|ms|s)", printed), re.search(r"(\d+) requests in", printed)
    if found[0] is None or found[1] is None:
        raise ValueError(f"wrk printed no figures:\n{printed}")
    e2e_ms = float(found[0][1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[0][2]]
    return Told(begin_s, end_s, int(found[1][1]), None, None, None, e2e_ms)
