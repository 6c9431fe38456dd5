"""What launchers launch, without launching it: each call's kernel with the very signature a GPU would compile.

Owns the translation from a launch's arguments to a signature, by the rules of triton's own runtime: tensors and
integers are specialised on divisibility by 16, integers also on being 1. Needs a process in which TRITON_INTERPRET is
not set. Invariant: no kernel runs, so what launchers return is unwritten memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}
_OPTIONS = {"num_warps", "num_stages"}
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: the kernel, what it would be compiled for, and its grid."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    # parameter indices whose values are divisible by 16
    divisible: tuple[int, ...]
    options: dict[str, int]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def key(self) -> str:
        """Equal for launches that compile to the same code."""
        return repr((self.name, self.signature, sorted(self.constexprs.items(), key=str), self.divisible, self.options))

    def attributes(self) -> dict[tuple[int], list[list[object]]]:
        """The specialisations as `triton.compiler.ASTSource` takes them."""
        return {(index,): [list(pair) for pair in _DIVISIBLE] for index in self.divisible}


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record every launch made inside instead of running it."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(kernel: Any, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        launches.append(_launch(kernel, args, kwargs, grid))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def _launch(kernel: Any, args: tuple[object, ...], kwargs: dict[str, object], grid: object) -> Launch:
    options = {name: value for name, value in kwargs.items() if name in _OPTIONS and name not in kernel.arg_names}
    bound = kernel.signature.bind(*args, **{name: value for name, value in kwargs.items() if name not in options})
    bound.apply_defaults()
    signature, constexprs, divisible = {}, {}, []
    for index, parameter in enumerate(kernel.params):
        value = bound.arguments[parameter.name]
        is_free = parameter.do_not_specialize
        is_unaligned = is_free or parameter.do_not_specialize_on_alignment
        kind = "constexpr" if parameter.is_constexpr else _kind(value, is_free=is_free)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constexprs[parameter.name] = value
        elif _is_divisible(value) and not is_unaligned:
            divisible.append(index)
    assert isinstance(grid, tuple), "launchers of this package pass plain grids"
    numbers = {name: int(value) for name, value in options.items()}  # type: ignore[call-overload]
    return Launch(kernel, signature, constexprs, tuple(divisible), numbers, grid)


def _kind(value: object, *, is_free: bool) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if value is None or value is True or value is False:
        return "constexpr" if value is None else "u1"
    if isinstance(value, int):
        if value == 1 and not is_free:
            return "constexpr"
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel takes no {type(value).__name__}")


def _is_divisible(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return type(value) is int and value % 16 == 0
