"""Make the demo's base, `chorale-demo`, from scratch, the checks of its adapters' tasks, and the model card.

Owns the base's folder under the output; no text (demo_world.py, demo_tasks.py), no training loop (demo_training.py) and
no adapters: the project's own trainer makes those (train_demo.py). Invariant: every stage reads only what earlier
stages wrote, so `--stage` can repeat one of them alone.

Run it from the repository's root: `python -m scripts.make_demo_base --out deploy/demo` (about 40 minutes on one core).
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.demo_card import write_model_card
from scripts.demo_tasks import HELD_OUT_SHARE, TASKS, check_turns
from scripts.demo_tokenizer import END_ID, PAD_ID, build_tokenizer, save_tokenizer
from scripts.demo_training import Schedule, answer, encode_conversation, train
from scripts.demo_world import conversations

BASE_NAME = "chorale-demo"
SEED = 2026
BASE_SCHEDULE = Schedule(num_steps=2400, batch_tokens=2048, learning_rate=2.5e-3, weight_decay=0.1)
NUM_CHECKS = 24


@dataclass(frozen=True, slots=True)
class Scale:
    """How much to do: the real thing, or a miniature that only proves the pipeline."""

    hidden_size: int = 192
    num_layers: int = 6
    intermediate_size: int = 512
    max_base_steps: int = 1_000_000


SMOKE = Scale(64, 2, 128, max_base_steps=3)


def model_config(vocab_size: int, scale: Scale) -> LlamaConfig:
    """Give the base's shape."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=scale.hidden_size,
        intermediate_size=scale.intermediate_size,
        num_hidden_layers=scale.num_layers,
        num_attention_heads=scale.hidden_size // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


def make_base(out: Path, scale: Scale, report: Callable[[str], None]) -> None:
    """Build the tokenizer, train the base from random weights, save it in bf16."""
    folder = out / BASE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(SEED)
    save_tokenizer(tokenizer, folder)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(model_config(tokenizer.get_vocab_size(), scale))
    examples = (encode_conversation(tokenizer, conversation) for conversation in conversations(SEED + 1))
    schedule = replace(BASE_SCHEDULE, num_steps=min(BASE_SCHEDULE.num_steps, scale.max_base_steps))
    began = time.monotonic()
    loss = train(model, examples, schedule, SEED, report)
    minutes = (time.monotonic() - began) / 60
    model.generation_config.eos_token_id = END_ID
    model.generation_config.pad_token_id = PAD_ID
    model.bfloat16().save_pretrained(folder)
    write_results(out, "base", {"minutes": round(minutes, 1), "steps": schedule.num_steps, "loss": round(loss, 4)})


def load_base(out: Path) -> LlamaForCausalLM:
    """Load the saved base, rounded as it is, for computing in fp32."""
    return LlamaForCausalLM.from_pretrained(out / BASE_NAME, dtype=torch.float32)


def load_tokenizer(out: Path) -> Tokenizer:
    """Load the saved tokenizer."""
    return Tokenizer.from_file(str(out / BASE_NAME / "tokenizer.json"))


def write_checks(out: Path) -> None:
    """Write tasks.jsonl: held-out questions with their answers, for whoever wants to check a server."""
    lines = [
        json.dumps({"adapter": task.name, "prompt": turn.user, "answer": turn.assistant})
        for task in TASKS
        for turn in check_turns(task, NUM_CHECKS, SEED, real_words_first=True)
    ]
    (out / "tasks.jsonl").write_text("\n".join(lines) + "\n")


def write_card(out: Path) -> None:
    """Write the model card from the results so far."""
    shape: dict[str, float] = json.loads((out / BASE_NAME / "config.json").read_text())
    shape["parameters"] = load_base(out).num_parameters() / 1e6
    write_model_card(out / BASE_NAME / "README.md", read_results(out), shape, HELD_OUT_SHARE, NUM_CHECKS)


def read_results(out: Path) -> dict[str, dict[str, float]]:
    """Read what earlier stages measured."""
    path = out / "results.json"
    results: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    return results


def write_results(out: Path, name: str, facts: dict[str, float]) -> None:
    """Note what one stage measured, beside what others noted under the same name."""
    results = read_results(out)
    results[name] = {**results.get(name, {}), **facts}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def show_answers(out: Path, report: Callable[[str], None]) -> None:
    """Report what the base says to one question of each task."""
    turns = [check_turns(task, 1, SEED, real_words_first=True)[0] for task in TASKS]
    given = answer(load_base(out), load_tokenizer(out), [turn.user for turn in turns])
    for turn, text in zip(turns, given, strict=True):
        report(f"base: {turn.user!r} -> {text!r} (wanted {turn.assistant!r})")


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description="Train the demo base on generated text.")
    parser.add_argument("--out", type=Path, default=Path("deploy/demo"), help="folder to write to")
    parser.add_argument("--stage", choices=("all", "base", "checks"), default="all")
    parser.add_argument("--smoke", action="store_true", help="a miniature that only proves the pipeline")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; the shipped files were made with 1")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    scale = SMOKE if options.smoke else Scale()
    began = time.monotonic()

    def report(line: str) -> None:
        print(f"[{time.monotonic() - began:6.0f} s] {line}", flush=True)

    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage in ("all", "base"):
        make_base(options.out, scale, report)
        show_answers(options.out, report)
    write_checks(options.out)
    write_card(options.out)


if __name__ == "__main__":
    main()
