"""How structures lie in memory that Python fills and the C sources in `native/` read.

Invariant: a change here is a change there, and raises `ABI` and `CHORALE_ABI` together.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_MEMBERS = 3
# `CHORALE_ABI` of the sources
ABI = 3


class Threads(ctypes.Structure):
    """Torch's pool; `parallel` is the address of its entry point, 0: the calling thread alone."""

    _fields_ = (("parallel", ctypes.c_void_p), ("num_threads", ctypes.c_int64))


class Member(ctypes.Structure):
    """One site of a fused one."""

    _fields_ = (
        ("bt", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("out_begin", ctypes.c_int64),
        ("rank_begin", ctypes.c_int64),
    )


class Site(ctypes.Structure):
    """A fused site of a slab."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("num_ranks", ctypes.c_int64),
        ("in_dim", ctypes.c_int64),
        ("num_members", ctypes.c_int64),
        ("members", Member * MAX_MEMBERS),
    )


class AttendCall(ctypes.Structure):
    """Rows that attend."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "out")),
        *((name, ctypes.c_int64) for name in ("q_stride", "out_stride")),
        *((name, ctypes.c_void_p) for name in ("k", "v", "rows", "slots", "context_lengths")),
        *((name, ctypes.c_int64) for name in ("num_rows", "slots_stride", "num_heads", "num_kv_heads", "head_dim")),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_double),
    )


class PlaceCall(ctypes.Structure):
    """Heads to be turned and cached."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("heads", "values")),
        *((name, ctypes.c_int64) for name in ("heads_stride", "values_stride")),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "k", "v", "slots")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_heads", "num_kv_heads", "head_dim", "rotary_dim")),
    )


@dataclass(frozen=True, slots=True)
class LowRankMember:
    """One site's `bt [capacity, rank, width]`, its first column of y and of the bridge."""

    bt: Tensor
    out_begin: int
    rank_begin: int


class LowRankSite:
    """A fused site of a slab as the kernel reads it; keeps the tensors alive that it points into."""

    def __init__(self, a: Tensor, members: Sequence[LowRankMember]) -> None:
        """Take `a [capacity, R, D]` and at most `MAX_MEMBERS` members, all contiguous bf16.

        Raises:
            ValueError: the kernel cannot read this.
        """
        tensors = [a, *(member.bt for member in members)]
        if len(members) > MAX_MEMBERS or not all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in tensors):
            raise ValueError(f"{len(members)} members of {a.dtype}: at most {MAX_MEMBERS}, contiguous, in bfloat16")
        self.num_ranks: int = a.shape[1]
        self._tensors = tensors
        found = [Member(m.bt.data_ptr(), *m.bt.shape[1:], m.out_begin, m.rank_begin) for m in members]
        self._struct = Site(a.data_ptr(), a.shape[1], a.shape[2], len(members), (Member * MAX_MEMBERS)(*found))
        self.address = ctypes.addressof(self._struct)


class RunTable:
    """Which rows of a step meet which position of a slab."""

    def __init__(self, runs: Sequence[tuple[int, int, int]]) -> None:
        """Take (first row, number of rows, position) of each run."""
        self._table = torch.tensor(runs, dtype=torch.int64)
        self.address = self._table.data_ptr()
        self.num_runs = len(runs)
