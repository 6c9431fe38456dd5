"""Orders of rows, and packing: rows that share a line do not see each other.

Owns the comparison of packed and unpacked losses, token by token. Invariant: they differ by no more than rounding, and
the comparison would notice a mask that lets rows see their neighbours.
"""

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters_store.jobs.spec import TrainSpec
from serve.trainer.batching import IGNORED, Batch, balanced_order, epoch_order, make_batch, task_of
from serve.trainer.encoding import Row
from serve.trainer.loading import load_base
from tests.trainer.tiny_base import VOCAB_SIZE


def rows_of(lengths: list[int]) -> list[Row]:
    generator = torch.Generator().manual_seed(11)
    return [
        Row(
            tuple(torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist()),
            (False, *[True] * (length - 1)),
            (None,) * length,
        )
        for length in lengths
    ]


@torch.no_grad()
def token_losses(model: nn.Module, batch: Batch) -> dict[int, list[float]]:
    """Return the losses of learnt tokens by the token to be predicted, in order."""
    more = {} if batch.mask is None else {"attention_mask": batch.mask, "position_ids": batch.positions}
    logits: Tensor = model(input_ids=batch.token_ids, **more).logits
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, ignore_index=IGNORED, reduction="none")
    found: dict[int, list[float]] = {}
    for label, loss in zip(batch.labels.flatten().tolist(), losses.flatten().tolist(), strict=True):
        if label != IGNORED:
            found.setdefault(label, []).append(loss)
    return {label: sorted(values) for label, values in found.items()}


def largest_difference(one: dict[int, list[float]], other: dict[int, list[float]]) -> float:
    assert one.keys() == other.keys()
    pairs = (pair for label in one for pair in zip(one[label], other[label], strict=True))
    return max(abs(a - b) for a, b in pairs)


def test_packed_rows_have_the_losses_that_they_have_alone(tiny_base: Path) -> None:
    model = load_base(tiny_base, TrainSpec(), "cpu")
    rows = rows_of([9, 30, 2, 17, 5, 24, 11])
    alone = token_losses(model, make_batch(rows, {}, pad_id=0))
    packed = make_batch(rows, {}, pad_id=0, packed_length=40)
    assert packed.token_ids.shape[0] < len(rows)
    assert packed.num_learnt == sum(row.num_learnt for row in rows)
    assert largest_difference(alone, token_losses(model, packed)) < 1e-4
    # the same lines under a plain causal mask: contamination that the comparison must see
    causal = torch.ones_like(packed.mask).tril() if packed.mask is not None else None
    leaky = Batch(packed.token_ids, packed.labels, packed.tasks, causal, packed.positions)
    assert largest_difference(alone, token_losses(model, leaky)) > 0.1
    shifted = torch.arange(packed.token_ids.shape[1]).expand_as(packed.token_ids)
    moved = Batch(packed.token_ids, packed.labels, packed.tasks, causal, shifted)
    assert largest_difference(alone, token_losses(model, moved)) > 0.1


def test_an_epoch_s_order_is_a_permutation_of_its_own() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(50, 1, 0) == orders[0]


def test_a_balanced_order_shows_every_task_equally_often() -> None:
    tasks = ["common"] * 90 + ["rare"] * 6 + [None] * 3
    order = balanced_order(tasks, seed=4, epoch=0)
    assert len(order) == len(tasks)
    assert Counter(tasks[i] for i in order) == {"common": 33, "rare": 33, None: 33}
    # every rare row as often as any other of them, give or take one
    assert set(Counter(i for i in order if tasks[i] == "rare").values()) <= {5, 6}
    assert balanced_order(tasks, seed=4, epoch=1) != order


def test_a_row_s_task_is_that_of_its_learnt_tokens() -> None:
    ids = (7, 8, 9)
    assert task_of(Row(ids, (False, True, True), (None, "a", "a"))) == "a"
    assert task_of(Row(ids, (False, True, True), ("b", "a", "a"))) == "a"
    assert task_of(Row(ids, (False, True, True), ("a", "a", "b"))) is None


def test_a_gate_s_label_is_the_task_of_the_token_to_come() -> None:
    row = Row((7, 8, 9, 6), (False, False, True, True), (None, None, "a", "b"))
    batch = make_batch([row], {"a": 0, "b": 1}, pad_id=0)
    assert batch.tasks.tolist() == [[IGNORED, 0, 1, IGNORED]]
    assert batch.labels.tolist() == [[IGNORED, 9, 6, IGNORED]]
