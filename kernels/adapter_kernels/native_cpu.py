"""The compiled kernels of the CPU: adapters of a whole fused site, attention of all decodes, on torch's own threads.

Owns the layouts that the C sources in `native/` read and the way into torch's pool of threads; the formulas are those
of `reference.site_output` and `reference_attention`. Invariant: where the library is absent or the processor lacks
AVX-512-BF16 nothing changes but the speed: `cpu` and `paged_attention` then compute in torch.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter_kernels.attention_plan import DecodeGroup

LIBRARY = Path(__file__).with_name("native") / "cpu_kernels.so"
MAX_MEMBERS = 3
MAX_HEAD_DIM = 256
# `CHORALE_ABI` of the sources
_ABI = 2


class _Threads(ctypes.Structure):
    _fields_ = (("parallel", ctypes.c_void_p), ("num_threads", ctypes.c_int64))


class _Member(ctypes.Structure):
    _fields_ = (
        ("bt", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("out_begin", ctypes.c_int64),
        ("rank_begin", ctypes.c_int64),
    )


class _Site(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("num_ranks", ctypes.c_int64),
        ("in_dim", ctypes.c_int64),
        ("num_members", ctypes.c_int64),
        ("members", _Member * MAX_MEMBERS),
    )


class _DecodeCall(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "out")),
        *((name, ctypes.c_int64) for name in ("q_stride", "out_stride")),
        *((name, ctypes.c_void_p) for name in ("k", "v", "rows", "slots", "context_lengths")),
        *((name, ctypes.c_int64) for name in ("num_seqs", "max_context", "num_heads", "num_kv_heads", "head_dim")),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_double),
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
        found = [_Member(m.bt.data_ptr(), *m.bt.shape[1:], m.out_begin, m.rank_begin) for m in members]
        self._struct = _Site(a.data_ptr(), a.shape[1], a.shape[2], len(members), (_Member * MAX_MEMBERS)(*found))
        self.address = ctypes.addressof(self._struct)


class RunTable:
    """Which rows of a step meet which position of a slab."""

    def __init__(self, runs: Sequence[tuple[int, int, int]]) -> None:
        """Take (first row, number of rows, position) of each run."""
        self._table = torch.tensor(runs, dtype=torch.int64)
        self.address = self._table.data_ptr()
        self.num_runs = len(runs)


class CpuKernels:
    """The library's two calls."""

    def __init__(self, library: ctypes.CDLL, parallel: int | None) -> None:
        """Take the loaded library.

        Args:
            parallel: address of `GOMP_parallel` in the OpenMP that torch uses; None: one thread.
        """
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._add: Any = library.chorale_add_low_rank
        self._add.argtypes = (pointer, size, pointer, size, pointer, pointer, size, pointer, pointer)
        self._add.restype = None
        self._attend: Any = library.chorale_attend_decodes
        self._attend.argtypes = (pointer, pointer)
        self._attend.restype = None
        self._silu_mul: Any = library.chorale_silu_mul
        self._silu_mul.argtypes = (pointer, size, pointer, size, size, pointer)
        self._silu_mul.restype = None
        self._rms_norm: Any = library.chorale_rms_norm
        self._rms_norm.argtypes = (pointer, size, pointer, ctypes.c_double, pointer, size, size, pointer)
        self._rms_norm.restype = None
        self._argmax: Any = library.chorale_argmax
        self._argmax.argtypes = (pointer, size, size, size, pointer, pointer, pointer)
        self._argmax.restype = None
        self._threads = _Threads(parallel, 1)
        self._threads_address = ctypes.addressof(self._threads)

    def add_low_rank(self, site: LowRankSite, runs: RunTable, x: Tensor, y: Tensor) -> None:
        """Add to each run's rows of y [T, O] what its adapter makes of x [T, D]; both bf16, each row contiguous."""
        bridge = torch.empty(x.shape[0], site.num_ranks, dtype=torch.bfloat16)
        self._threads.num_threads = torch.get_num_threads()
        self._add(
            x.data_ptr(),
            x.stride(0),
            y.data_ptr(),
            y.stride(0),
            bridge.data_ptr(),
            runs.address,
            runs.num_runs,
            site.address,
            self._threads_address,
        )

    @staticmethod
    def can_attend(q: Tensor, soft_cap: float | None) -> bool:
        """Say whether `attend_decodes` can do this: bf16, no cap, heads [H, E] side by side and not too wide."""
        is_dense = q.stride()[1:] == (q.shape[2], 1)
        return q.dtype == torch.bfloat16 and soft_cap is None and q.shape[2] <= MAX_HEAD_DIM and is_dense

    def attend_decodes(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, decodes: DecodeGroup, scale: float, window: int | None
    ) -> None:
        """Attend the rows of q [T, H, E] that decode; see `paged_attention.paged_attention`.

        Args:
            k, v: [slots, K, E], contiguous. out: [T, H, E], of which only the decoding rows are written.
        """
        self._threads.num_threads = torch.get_num_threads()
        call = _DecodeCall(
            q.data_ptr(),
            out.data_ptr(),
            q.stride(0),
            out.stride(0),
            k.data_ptr(),
            v.data_ptr(),
            decodes.rows.data_ptr(),
            decodes.slots.data_ptr(),
            decodes.context_lengths.data_ptr(),
            decodes.rows.shape[0],
            decodes.max_context,
            q.shape[1],
            k.shape[1],
            q.shape[2],
            window or 0,
            scale,
        )
        self._attend(ctypes.addressof(call), self._threads_address)

    @staticmethod
    def can_read_rows(x: Tensor) -> bool:
        """Say whether the calls for rows can read this: a matrix of bf16 on the CPU, each row contiguous."""
        return x.ndim == 2 and x.dtype == torch.bfloat16 and x.stride(1) == 1 and x.device.type == "cpu"

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of gate | up [T, 2 I] bf16, each row contiguous: [T, I], rounded after each of the two."""
        num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(num_rows, width, dtype=torch.bfloat16)
        self._threads.num_threads = torch.get_num_threads()
        self._silu_mul(gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), num_rows, width, self._threads_address)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight [D] of x [T, D] bf16, each row contiguous: [T, D], rounded after each of the two."""
        num_rows, width = x.shape
        out = torch.empty(num_rows, width, dtype=torch.bfloat16)
        self._threads.num_threads = torch.get_num_threads()
        self._rms_norm(
            x.data_ptr(), x.stride(0), weight.data_ptr(), eps, out.data_ptr(), num_rows, width, self._threads_address
        )
        return out

    def argmax(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Largest value and its index of each row of x [T, V] bf16, V >= 1, as `x.max(dim=1)`: ([T], [T] int64)."""
        num_rows, width = x.shape
        values, indices = torch.empty(num_rows, dtype=torch.bfloat16), torch.empty(num_rows, dtype=torch.int64)
        self._threads.num_threads = torch.get_num_threads()
        self._argmax(
            x.data_ptr(),
            x.stride(0),
            num_rows,
            width,
            values.data_ptr(),
            indices.data_ptr(),
            self._threads_address,
        )
        return values, indices


@cache
def cpu_kernels() -> CpuKernels | None:
    """Load the library; None where the installation has none or the processor cannot run it."""
    library, _ = _load(LIBRARY)
    return None if library is None else CpuKernels(library, _gomp_parallel())


def why_absent() -> str | None:
    """Say why there are no compiled kernels, and the way out; None: there are."""
    return _load(LIBRARY)[1]


def _load(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library, or why it cannot be used."""
    if not path.exists():
        return None, "no C compiler was there when chorale was installed; install gcc and run the installation again"
    try:
        library = ctypes.CDLL(str(path))
        abi = library.chorale_abi()
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded ({error}); run the installation again"
    if abi != _ABI:
        return None, f"{path.name} is of other sources (ABI {abi}, not {_ABI}); run the installation again"
    if not library.chorale_is_supported():
        return None, "the processor has no AVX-512-BF16"
    return library, None


def _gomp_parallel() -> int | None:
    """Find the entry point of torch's OpenMP: a second runtime would fight it for the cores."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        entry = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
        if entry is not None:
            return ctypes.cast(entry, ctypes.c_void_p).value
    return None
