"""A random two-layer base with the demo's tokenizer and template, small data files, and a way to run a job.

Owns what the trainer's tests share. Invariant: everything is seeded, and the base is written once per folder.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapters_store.jobs.spec import TrainSpec
from adapters_store.strict_json import Json
from serve.trainer.progress import AlwaysRun, Control, Finished, Progress, TrainingRun
from serve.trainer.train import run
from tests.live_server import REPO_ROOT

DEMO_BASE = REPO_ROOT / "deploy" / "demo" / "chorale-demo"
VOCAB_SIZE = 619
WORDS = ("lamp", "boat", "stone", "river", "cat", "drum", "candle", "ox")


def write_base(folder: Path, *, seed: int = 1, num_layers: int = 2) -> Path:
    """Write the base; 4 query heads over 2 key heads, so that a confusion of the two shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=num_layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=256,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=1,
                pad_token_id=0,
                initializer_range=0.2,
            )
        )
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_BASE / name, folder / name)
    return folder


def chat(user: str, answer: Json, **more: Json) -> dict[str, Json]:
    """Return one example of one turn."""
    messages: list[Json] = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def backwards(count: int, seed: int = 3) -> list[dict[str, Json]]:
    """Return examples of words and their letters backwards, of several lengths."""
    rng = Random(seed)
    found = []
    for _ in range(count):
        words = [rng.choice(WORDS) for _ in range(rng.choice((1, 1, 2, 4)))]
        found.append(chat(f'Write "{" ".join(words)}" backwards.', " ".join(word[::-1] for word in words)))
    return found


def write_lines(path: Path, lines: Iterable[dict[str, Json]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Place:
    """A base and a folder to work in."""

    base: Path
    root: Path
    lines: list[dict[str, Json]] = field(default_factory=lambda: backwards(24))

    def job(self, name: str, **spec: Json) -> TrainingRun:
        """Return a job on this place's data in the folder `name`."""
        path = write_lines(self.root / f"{name}.jsonl", self.lines)
        small: dict[str, Json] = {"max_length": 128, "batch_size": 4, "learning_rate": 0.01, "warmup": 0.0, "seed": 5}
        parsed = TrainSpec.parse({**small, **spec})
        return TrainingRun(self.base, path, None, parsed, self.root / name)


def finish(job: TrainingRun, control: Control | None = None) -> tuple[Finished, list[Progress]]:
    """Run a job to its end; return the last event and all of them."""
    events = list(run(job, control or AlwaysRun()))
    assert isinstance(events[-1], Finished)
    return events[-1], events


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file of an exported adapter."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
