"""Rows as batches: the order of an epoch, padding or packing, and the tensors of one forward pass.

Owns which rows a step sees. Invariants: the order is a function of seed and epoch alone; a packed row never attends to
its neighbour (block-diagonal mask, positions from 0), so packing changes the time a step takes and nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.trainer.encoding import Row

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """B lines of T tokens. `labels[b, t]` is the token to be predicted at t, `tasks[b, t]` its task's number.

    Both are -100 where nothing is learnt. `mask` [B, 1, T, T] and `positions` [B, T] are None where lines hold one
    row each: a causal model's tokens never look at the padding behind them.
    """

    token_ids: Tensor
    labels: Tensor
    tasks: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None

    def to(self, device: str) -> "Batch":
        """Return the batch on a device."""
        rest = (None if tensor is None else tensor.to(device) for tensor in (self.mask, self.positions))
        return Batch(self.token_ids.to(device), self.labels.to(device), self.tasks.to(device), *rest)

    @property
    def num_learnt(self) -> int:
        """How many tokens are predicted."""
        return int((self.labels != IGNORED).sum())


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """Return a permutation of the rows."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return list(torch.randperm(num_rows, generator=generator).tolist())


def balanced_order(tasks: Sequence[str | None], seed: int, epoch: int) -> list[int]:
    """Return as many rows as there are, each kind of task as often as any other; None is a kind like the others."""
    groups: dict[str | None, list[int]] = {}
    for index in epoch_order(len(tasks), seed, epoch):
        groups.setdefault(tasks[index], []).append(index)
    # the same order of kinds in every process, whatever came first
    kinds = sorted(groups, key=lambda task: (task is None, task or ""))
    # a smaller kind's rows come again
    turns = -(-len(tasks) // len(kinds))
    order = []
    for turn in range(turns):
        order += [groups[kind][turn % len(groups[kind])] for kind in kinds]
    return order[: len(tasks)]


def task_of(row: Row) -> str | None:
    """Return the one task of a row's learnt tokens, None where there are several or none."""
    found = {task for task, is_learnt in zip(row.tasks, row.is_learnt, strict=True) if is_learnt}
    return next(iter(found)) if len(found) == 1 else None


def make_batch(
    rows: Sequence[Row], task_ids: Mapping[str, int], *, pad_id: int, packed_length: int | None = None
) -> Batch:
    """Return rows as one batch, each in a line of its own, or several in lines of at most `packed_length` tokens."""
    lines = [[row] for row in rows] if packed_length is None else _packed(rows, packed_length)
    width = max(sum(len(row.token_ids) for row in line) for line in lines)
    token_ids = torch.full((len(lines), width), pad_id)
    labels, tasks = (torch.full((len(lines), width), IGNORED) for _ in range(2))
    segments, positions = (torch.zeros((len(lines), width), dtype=torch.long) for _ in range(2))
    for b, line in enumerate(lines):
        begin = 0
        for number, row in enumerate(line, start=1):
            end = begin + len(row.token_ids)
            token_ids[b, begin:end] = torch.tensor(row.token_ids)
            # the row's last token predicts nothing, least of all its neighbour's first
            labels[b, begin : end - 1] = torch.tensor(_shifted_labels(row), dtype=torch.long)
            tasks[b, begin : end - 1] = torch.tensor(_shifted_tasks(row, task_ids), dtype=torch.long)
            segments[b, begin:end] = number
            positions[b, begin:end] = torch.arange(end - begin)
            begin = end
    if packed_length is None:
        return Batch(token_ids, labels, tasks)
    return Batch(token_ids, labels, tasks, _block_mask(segments), positions)


def _packed(rows: Sequence[Row], length: int) -> list[list[Row]]:
    """Return lines of rows in order, a row in the first line that has room for it."""
    lines: list[list[Row]] = []
    rooms: list[int] = []
    for row in rows:
        size = len(row.token_ids)
        index = next((i for i, room in enumerate(rooms) if room >= size), None)
        if index is None:
            lines.append([row])
            rooms.append(length - size)
        else:
            lines[index].append(row)
            rooms[index] -= size
    return lines


def _block_mask(segments: Tensor) -> Tensor:
    """Return [B, 1, T, T], True where a token may look: at earlier tokens of its own row."""
    same = segments[:, :, None] == segments[:, None, :]
    return (same & torch.ones_like(same).tril())[:, None]


def _shifted_labels(row: Row) -> list[int]:
    following = zip(row.token_ids[1:], row.is_learnt[1:], strict=True)
    return [token_id if is_learnt else IGNORED for token_id, is_learnt in following]


def _shifted_tasks(row: Row, task_ids: Mapping[str, int]) -> list[int]:
    return [IGNORED if task is None else task_ids.get(task, IGNORED) for task in row.tasks[1:]]
