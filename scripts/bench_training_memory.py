"""Peak training memory of LoRA and S2FT at equal budgets on a 0.5B-shaped base of random weights, side by side.

Owns one process per method, so that a peak is that method's alone; both take the trainer's own layers, batches and
optimiser. Invariant: what is compared is the growth of resident memory over the loaded base, measured the same way.

Run it from the repository's root: `python -m scripts.bench_training_memory` (minutes on two cores, 4 GB of memory).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from adapters_store.jobs.spec import TrainSpec
from adapters_store.strict_json import Json
from scripts.demo_report import environment
from serve.trainer.batching import IGNORED, make_batch
from serve.trainer.encoding import Row
from serve.trainer.loading import attach
from serve.trainer.methods.method import Setting
from serve.trainer.stepping import make_optimizer

REPORT = Path("docs/benchmarks/training-memory.md")
_MIB = 1 << 20
# Qwen2.5-0.5B's shape
_SHAPE = Qwen2Config(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
# parameters per layer: rank 16 on all seven linear layers is 366,592; 408 slices of 896 values come next from below
_METHODS: Mapping[str, dict[str, Json]] = {
    "LoRA": {"family": "lora", "rank": 16},
    "S²FT": {"family": "s2ft", "target_modules": ["o_proj", "down_proj"], "ratio": 0.071},
}

_PAGE = """
## Memory on a 0.5 B-shaped base

[scripts/bench_training_memory.py](../../scripts/bench_training_memory.py): random weights in Qwen2.5-0.5B's shape,
fp32, {steps} steps of one row of {tokens} tokens, every token learnt, one process per method. Memory is the peak of the
resident set over the loaded base. {environment}

| method | trained parameters | peak over the base MiB | seconds per step |
|---|---|---|---|
"""


def measure(name: str, num_tokens: int, num_steps: int) -> dict[str, float]:
    """Train in this process and return what it took."""
    torch.manual_seed(0)
    spec = TrainSpec.parse({**_METHODS[name], "learning_rate": 1e-4}).resolved(1)
    model = Qwen2ForCausalLM(_SHAPE)
    model.requires_grad_(False)
    attached = attach(model, Setting(spec, (), (), ()))
    attached.model.train()
    optimizer = make_optimizer(attached.trained(), spec)
    ids = torch.randint(0, _SHAPE.vocab_size, (num_tokens,)).tolist()
    batch = make_batch([Row(tuple(ids), (True,) * num_tokens, (None,) * num_tokens)], {}, pad_id=0)
    before, seconds = _resident_bytes(), []
    for _ in range(num_steps):
        began = time.perf_counter()
        logits = attached.forward(batch, 1.0).logits
        torch.autograd.backward(
            nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    return {
        "trained": sum(parameter.numel() for parameter in attached.trained().values()),
        "peak_bytes": _peak_since_reset() - before,
        "seconds": min(seconds),
    }


def _resident_bytes() -> int:
    """Return the resident set, and let the kernel count its peak anew from here."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _peak_since_reset() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) << 10


def main() -> None:
    """Measure every method in a process of its own and write the table."""
    parser = argparse.ArgumentParser(description="Peak training memory of LoRA and S2FT on a 0.5B-shaped base.")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--method", choices=sorted(_METHODS), help="measure this one here and print JSON")
    options = parser.parse_args()
    if options.method is not None:
        print(json.dumps(measure(options.method, options.tokens, options.steps)))
        return
    found = {}
    for name in _METHODS:
        command = [sys.executable, "-m", "scripts.bench_training_memory", "--method", name]
        command += ["--tokens", str(options.tokens), "--steps", str(options.steps)]
        found[name] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    page = _PAGE.format(steps=options.steps, tokens=options.tokens, environment=environment("as above"))
    for name, own in found.items():
        page += f"| {name} | {own['trained']:,.0f} | {own['peak_bytes'] / _MIB:.0f} | {own['seconds']:.1f} |\n"
    REPORT.write_text(page, encoding="utf-8")
    print(page)
    if found["S²FT"]["peak_bytes"] >= found["LoRA"]["peak_bytes"]:
        raise SystemExit("S²FT took no less memory than LoRA")


if __name__ == "__main__":
    main()
