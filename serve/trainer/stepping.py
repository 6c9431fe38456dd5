"""One optimiser step and one validation: losses over micro-batches, gradients, clipping, AdamW.

Owns the numbers of a step. Invariants: the loss is the mean over all learnt tokens of the step, however it is cut into
micro-batches or shared between processes; a loss or gradient that is not finite moves no parameter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapters_store.jobs.spec import TrainSpec
from serve.trainer.batching import IGNORED, Batch
from serve.trainer.data import Data
from serve.trainer.encoding import Row
from serve.trainer.methods.method import SHOWN, Attached, Losses
from serve.trainer.progress import TrainingFailed
from serve.trainer.world import World


@dataclass(frozen=True, slots=True)
class StepResult:
    """Means over the step's learnt tokens; `tokens` counts those that were looked at, learnt or not."""

    loss: float
    accuracy: float
    tokens: int
    extra: dict[str, float] = field(default_factory=dict)


def make_optimizer(trained: dict[str, nn.Parameter], spec: TrainSpec) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters in the order of their names; vectors do not decay."""
    ordered = [trained[name] for name in sorted(trained)]
    groups = [
        {"params": [parameter for parameter in ordered if parameter.dim() > 1], "weight_decay": spec.weight_decay},
        {"params": [parameter for parameter in ordered if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=True)


class Stepper:
    """Runs steps of one attached model."""

    def __init__(self, attached: Attached, data: Data, spec: TrainSpec, device: str, world: World) -> None:
        self._attached = attached
        self._data = data
        self._spec = spec
        self._device = device
        self._world = world
        self._parameters = list(attached.trained().values())
        self.optimizer = make_optimizer(attached.trained(), spec)

    def step(self, rows: Sequence[Row], micro_rows: int, learning_rate: float, number: int) -> StepResult:
        """Take step `number` with these rows; raises TrainingFailed on NaN and infinity."""
        self._attached.model.train()
        total = sum(row.num_learnt for row in rows)
        own = rows[self._world.rank :: self._world.size]
        sums = _Sums()
        for begin in range(0, len(own), micro_rows):
            batch = self._data.batch(list(own[begin : begin + micro_rows]), self._spec, self._device)
            losses = self._attached.forward(batch, batch.num_learnt / total)
            loss = sums.add(batch, losses) / total
            torch.autograd.backward(loss if losses.extra is None else loss + losses.extra)
        self._world.sum_gradients(self._parameters)
        summed = sums.over(self._world, self._device)
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._spec.max_grad_norm))
        if not math.isfinite(summed.loss) or not math.isfinite(norm):
            raise TrainingFailed(
                "nan",
                f"the loss is {summed.loss / total:.4g} and the gradient's norm {norm:.4g} at step {number}, with "
                f"learning rate {learning_rate:.3g}: nothing was published; lower the learning rate",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return summed.result(total, sum(len(row.token_ids) for row in rows))

    @torch.no_grad()
    def validate(self) -> StepResult:
        """Return loss and accuracy over the validation rows."""
        self._attached.model.eval()
        rows = sorted(self._data.valid, key=lambda row: len(row.token_ids))
        total = sum(row.num_learnt for row in rows)
        sums = _Sums()
        size = max(1, self._spec.batch_size or 1) * self._world.size
        for begin in range(0, len(rows), size):
            own = rows[begin : begin + size][self._world.rank :: self._world.size]
            if own:
                batch = self._data.batch(own, self._spec, self._device)
                sums.add(batch, self._attached.forward(batch, batch.num_learnt / total))
        return sums.over(self._world, self._device).result(total, sum(len(row.token_ids) for row in rows))


class _Sums:
    """Sums over learnt tokens, and over labelled tokens for what a method shows."""

    def __init__(self) -> None:
        self.loss = 0.0
        self._num_right = 0.0
        # every process sums the same names, whatever rows it had
        self._shown = dict.fromkeys(SHOWN, 0.0)
        self._counted = 0.0

    def add(self, batch: Batch, losses: Losses) -> Tensor:
        """Count one forward pass; return its summed loss."""
        is_learnt = batch.labels != IGNORED
        logits, labels = losses.logits[is_learnt].float(), batch.labels[is_learnt]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        self.loss += float(loss.detach())
        self._num_right += int((logits.argmax(-1) == labels).sum())
        for name, value in losses.shown.items():
            self._shown[name] += value
        self._counted += losses.counted
        return loss

    def over(self, world: World, device: str) -> "_Sums":
        """Return the sums over all processes."""
        own = [self.loss, self._num_right, self._counted, *(self._shown[name] for name in SHOWN)]
        self.loss, self._num_right, self._counted, *shown = world.sum_numbers(own, device)
        self._shown = dict(zip(SHOWN, shown, strict=True))
        return self

    def result(self, total: int, tokens: int) -> StepResult:
        """Return the means."""
        extra = {name: value / self._counted for name, value in self._shown.items()} if self._counted else {}
        return StepResult(self.loss / total, self._num_right / total, tokens, extra)
