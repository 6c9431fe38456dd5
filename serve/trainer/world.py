"""The processes that train one job together, through accelerate; alone, a world of one.

Owns what passes between them: sums. Every process computes its own rows of a step and the gradients are summed, so a
step means the same for any number of processes. Invariant: only the first one writes files.
"""

from collections.abc import Iterable

import torch
from accelerate import PartialState
from torch import Tensor, nn


class World:
    """The processes of one job. All must call the same methods in the same order."""

    def __init__(self, *, is_cpu: bool) -> None:
        self._state = PartialState(cpu=is_cpu)
        self.rank = int(self._state.process_index)
        self.size = int(self._state.num_processes)

    @property
    def is_first(self) -> bool:
        """Does this process write?"""
        return self.rank == 0

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._sum(parameter.grad)

    def sum_numbers(self, numbers: list[float], device: str) -> list[float]:
        """Return the sums over the processes."""
        if self.size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
        return list(self._sum(tensor).tolist())

    def wait(self) -> None:
        """Return when every process has come here."""
        self._state.wait_for_everyone()

    def _sum(self, tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor
