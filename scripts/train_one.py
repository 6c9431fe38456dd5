"""Train one adapter from a job in JSON on standard input, in this process, and tell what it cost.

Owns the measuring: seconds per step without the first, peak resident memory of the process. Invariant: one process
trains one adapter, so its peak is that adapter's alone.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

from adapters_store.jobs.spec import TrainSpec
from serve.trainer.progress import AlwaysRun, Finished, NamedAdapter, Started, StepDone, TrainingRun
from serve.trainer.train import run

_KIB = 1024


def main() -> None:
    """Read the job, train it, print one line of JSON."""
    given = json.load(sys.stdin)
    torch.set_num_threads(given.get("threads", 1))
    job = TrainingRun(
        base=Path(given["base"]),
        train_file=Path(given["train_file"]),
        valid_file=None,
        spec=TrainSpec.parse(given["spec"]),
        folder=Path(given["folder"]),
        experts=tuple(NamedAdapter(name, Path(folder)) for name, folder in given.get("experts", {}).items()),
        disjoint_with=tuple(NamedAdapter(name, Path(folder)) for name, folder in given.get("disjoint", {}).items()),
        code_version=given.get("code_version", ""),
    )
    seconds: list[float] = []
    facts: dict[str, float | int | str] = {}
    began = last = time.monotonic()
    resident = 0
    for event in run(job, AlwaysRun()):
        now = time.monotonic()
        if isinstance(event, Started):
            facts |= {"trainable": event.num_trainable, "examples": event.num_examples}
            resident = _resident()
        elif isinstance(event, StepDone):
            seconds.append(now - last)
            if event.step % 25 == 0 or event.step == event.total_steps:
                extra = "".join(f" {name} {value:.3f}" for name, value in event.extra.items())
                line = f"loss {event.train_loss:.4f} accuracy {event.train_mean_token_accuracy:.3f}{extra}"
                print(f"step {event.step}/{event.total_steps} {line} {now - began:.0f} s", file=sys.stderr, flush=True)
        elif isinstance(event, Finished):
            facts |= {"loss": event.metrics["train_loss"], "tokens": event.trained_tokens}
        last = now
    facts |= {
        "steps": len(seconds),
        "seconds_per_step": statistics.median(seconds[1:] or seconds),
        "minutes": (time.monotonic() - began) / 60,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB,
        "resident_before_bytes": resident,
    }
    print(json.dumps(facts))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
