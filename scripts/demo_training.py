"""Training and asking in plain torch: batches of equal-length chats, one loop for base and adapters, greedy answers.

Owns no text and no files. Invariant: with the same seed, thread count and torch version the loop is deterministic; only
the assistant's tokens are learnt.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from scripts.demo_tokenizer import END_ID, PAD_ID, ROLE_IDS
from scripts.demo_world import Conversation, Turn

IGNORED = -100
# Chats are drawn in pools and sorted by length inside one, so that a batch carries little padding.
POOL_SIZE = 2048


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train; the learning rate warms up, then falls as a cosine to a tenth."""

    num_steps: int
    batch_tokens: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int = 60

    def learning_rate_at(self, step: int) -> float:
        """Give the learning rate of one step."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
        return self.learning_rate * warm * (0.05 + 0.95 * share)


@dataclass(frozen=True, slots=True)
class Example:
    """One chat as token ids, and the labels: the assistant's tokens, the rest ignored."""

    token_ids: list[int]
    labels: list[int]


def encode_conversation(tokenizer: Tokenizer, conversation: Conversation) -> Example:
    """Write a chat as the chat template writes it."""
    token_ids: list[int] = []
    labels: list[int] = []

    def put(role: str, text: str) -> None:
        ids = tokenizer.encode(f"{text}<|end|>").ids
        token_ids.extend([ROLE_IDS[role], *ids])
        labels.extend([IGNORED, *(ids if role == "assistant" else [IGNORED] * len(ids))])

    if conversation.system is not None:
        put("system", conversation.system)
    for turn in conversation.turns:
        put("user", turn.user)
        put("assistant", turn.assistant)
    return Example(token_ids, labels)


def batches(examples: Iterator[Example], batch_tokens: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches of at most `batch_tokens` padded tokens, in random order within a pool."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        pool = sorted(islice(examples, POOL_SIZE), key=lambda example: len(example.token_ids))
        found: list[list[Example]] = [[]]
        for example in pool:
            if (len(found[-1]) + 1) * len(example.token_ids) > batch_tokens:
                found.append([])
            found[-1].append(example)
        for index in torch.randperm(len(found), generator=generator).tolist():
            yield found[index]


def pad(rows: list[list[int]], filler: int) -> Tensor:
    """Pad rows on the right to the longest."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def train(
    model: nn.Module, examples: Iterator[Example], schedule: Schedule, seed: int, report: Callable[[str], None]
) -> float:
    """Train the parameters that require gradients; return the mean loss of the last tenth of the steps."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)
    losses: list[float] = []
    num_tokens, began = 0, time.monotonic()
    model.train()
    for step, batch in enumerate(islice(batches(examples, schedule.batch_tokens, seed), schedule.num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(step)
        # Right padding needs no mask: a causal model's real tokens never look at what comes after them.
        token_ids = pad([example.token_ids for example in batch], PAD_ID)
        labels = pad([example.labels for example in batch], IGNORED)
        logits = model(input_ids=token_ids).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        num_tokens += token_ids.numel()
        if (step + 1) % 50 == 0 or step + 1 == schedule.num_steps:
            mean = sum(losses[-50:]) / len(losses[-50:])
            rate = num_tokens / (time.monotonic() - began)
            report(f"step {step + 1}/{schedule.num_steps} loss {mean:.4f} {rate:.0f} tokens/s")
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


@torch.inference_mode()
def answer(model: nn.Module, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int = 64) -> list[str]:
    """Answer each prompt greedily, as one chat turn; prompts of equal length share a batch."""
    rows = [tokenizer.encode(f"<|user|>{prompt}<|end|><|assistant|>").ids for prompt in prompts]
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)
    answers = [""] * len(prompts)
    model.eval()
    for indices in by_length.values():
        token_ids = torch.tensor([rows[index] for index in indices])
        given: list[torch.Tensor] = []
        cache = None
        is_open = torch.ones(len(indices), dtype=torch.bool)
        while len(given) < max_new_tokens and bool(is_open.any()):
            output = model(input_ids=token_ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            newest = torch.where(is_open, output.logits[:, -1].argmax(-1), END_ID)
            is_open &= newest != END_ID
            given.append(newest)
            token_ids = newest[:, None]
        for index, row in zip(indices, torch.stack(given, dim=1).tolist(), strict=True):
            answers[index] = tokenizer.decode(row[: row.index(END_ID)] if END_ID in row else row)
    return answers


def share_right(model: nn.Module, tokenizer: Tokenizer, turns: list[Turn]) -> float:
    """Measure how many questions get exactly the right answer."""
    given = answer(model, tokenizer, [turn.user for turn in turns])
    return sum(text == turn.assistant for text, turn in zip(given, turns, strict=True)) / len(turns)
