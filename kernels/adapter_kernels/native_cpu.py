"""The compiled kernels of the CPU: adapters of a whole fused site, heads and attention, rows, on torch's own threads.

Owns the calls and the way into torch's pool of threads; the formulas are those of `reference.site_output` and
`reference_attention`. Invariant: where the library is absent or the processor lacks AVX-512-BF16 nothing changes but
the speed: torch computes.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter_kernels.attention_plan import AttendedRows
from adapter_kernels.native_layouts import ABI, AttendCall, LowRankSite, PlaceCall, RunTable, Threads

LIBRARY = Path(__file__).with_name("native") / "cpu_kernels.so"
MAX_HEAD_DIM = 256


class CpuKernels:
    """The library's calls."""

    def __init__(self, library: ctypes.CDLL, parallel: int | None) -> None:
        """Take the loaded library.

        Args:
            parallel: address of `GOMP_parallel` in the OpenMP that torch uses; None: one thread.
        """
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._add: Any = library.chorale_add_low_rank
        self._add.argtypes = (pointer, size, pointer, size, pointer, pointer, size, pointer, pointer)
        self._add.restype = None
        self._attend: Any = library.chorale_attend
        self._attend.argtypes = (pointer, pointer)
        self._attend.restype = None
        self._place: Any = library.chorale_place
        self._place.argtypes = (pointer, pointer)
        self._place.restype = None
        self._silu_mul: Any = library.chorale_silu_mul
        self._silu_mul.argtypes = (pointer, size, pointer, size, size, pointer)
        self._silu_mul.restype = None
        self._rms_norm: Any = library.chorale_rms_norm
        self._rms_norm.argtypes = (pointer, size, pointer, ctypes.c_double, pointer, size, size, pointer)
        self._rms_norm.restype = None
        self._argmax: Any = library.chorale_argmax
        self._argmax.argtypes = (pointer, size, size, size, pointer, pointer, pointer)
        self._argmax.restype = None
        self._threads = Threads(parallel, 1)
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
    def can_place(heads: Tensor, values: Tensor) -> bool:
        """Say whether `place` can do this: bf16, on the CPU, heads [N, E] side by side."""
        return all(t.dtype == torch.bfloat16 and _is_dense(t) and t.device.type == "cpu" for t in (heads, values))

    def place(
        self,
        heads: Tensor,
        values: Tensor,
        cosines: Tensor,
        sines: Tensor,
        k: Tensor,
        v: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Turn queries in place, turn keys into the cache, copy values into it.

        Args:
            heads: [T, H + K, E], queries first. values: [T, K, E]. cosines, sines: [T, .., R] contiguous, R even and at
                most E, as `serve.model.rotary.Rotation` has them. k, v: [slots, K, E], contiguous.
            slot_mapping: [T] int64, no value twice.
        """
        num_kv_heads = values.shape[1]
        self._threads.num_threads = torch.get_num_threads()
        call = PlaceCall(
            heads.data_ptr(),
            values.data_ptr(),
            heads.stride(0),
            values.stride(0),
            cosines.data_ptr(),
            sines.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            slot_mapping.data_ptr(),
            heads.shape[0],
            heads.shape[1] - num_kv_heads,
            num_kv_heads,
            heads.shape[2],
            cosines.shape[-1],
        )
        self._place(ctypes.addressof(call), self._threads_address)

    @staticmethod
    def can_attend(q: Tensor, soft_cap: float | None) -> bool:
        """Say whether `attend` can do this: bf16, no cap, heads [H, E] side by side and not too wide."""
        return q.dtype == torch.bfloat16 and soft_cap is None and q.shape[2] <= MAX_HEAD_DIM and _is_dense(q)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        rows: AttendedRows,
        scale: float,
        window: int | None,
    ) -> None:
        """Attend some rows of q [T, H, E], each by itself; see `paged_attention.paged_attention`.

        Args:
            k, v: [slots, K, E], contiguous. out: [T, H, E], of which only these rows are written.
        """
        self._threads.num_threads = torch.get_num_threads()
        call = AttendCall(
            q.data_ptr(),
            out.data_ptr(),
            q.stride(0),
            out.stride(0),
            k.data_ptr(),
            v.data_ptr(),
            rows.rows.data_ptr(),
            rows.slots.data_ptr(),
            rows.context_lengths.data_ptr(),
            rows.rows.shape[0],
            rows.slots_stride,
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


def _is_dense(heads: Tensor) -> bool:
    """Say whether the heads of a row [N, E] lie side by side."""
    return heads.stride()[1:] == (heads.shape[2], 1)


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
    if abi != ABI:
        return None, f"{path.name} is of other sources (ABI {abi}, not {ABI}); run the installation again"
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
