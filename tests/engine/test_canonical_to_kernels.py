"""What the store writes is what the kernels compute: canonical files of rare ops, opened and run on the CPU.

The expected outputs are numpy's, from the arrays that were written; nothing of the readers is shared.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from adapter_kernels.cpu import CpuDelta
from adapter_kernels.image import AdapterImage
from adapter_kernels.route import build_route
from adapters_store.base import SITES
from adapters_store.blobs import open_image
from adapters_store.convert.adapter_writer import encode_signs
from adapters_store.gates import Experts, GateOptions
from adapters_store.ops import Csr, Module
from serve.engine.site_rows import site_rows
from tests.engine.arena_adapters import BASE
from tests.kernels.cpu_steps import Base, place
from tests.kernels.random_adapters import SHAPES
from tests.store.canonical_files import manifest, write

Array = npt.NDArray[np.float32]
WHERE = Module(1, SITES.index("o_proj"), 0, has_bias=False)
# o_proj maps 24 inputs to 16 outputs
NUM_OUT, NUM_IN = 16, 24


class Values:
    """Random values, and their bytes under the tensors' names."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(1)
        self.raw: dict[str, bytes] = {}

    def normal(self, kind: str, *shape: int) -> Array:
        values = self._random.standard_normal(shape).astype(np.float32)
        self.raw[WHERE.tensor(kind)] = values.tobytes()
        return values

    def sparse(self, nnz: int, *, is_ternary: bool) -> Array:
        """Return a dense matrix of `nnz` values, and keep it as a sparse one."""
        flat = np.sort(self._random.choice(NUM_OUT * NUM_IN, nnz, replace=False))
        starts = np.searchsorted(flat // NUM_IN, np.arange(NUM_OUT + 1))
        self.raw[WHERE.tensor("csr.indptr")] = starts.astype("<i4").tobytes()
        self.raw[WHERE.tensor("csr.col")] = (flat % NUM_IN).astype("<i4").tobytes()
        if is_ternary:
            negative = self._random.random(nnz) < 0.5
            self.raw[WHERE.tensor("csr.sign")] = encode_signs(negative)
            scale = self.normal("csr.scale", 1)
            values = np.where(negative, -scale, scale)
        else:
            values = self.normal("csr.val", nnz)
        matrix = np.zeros(NUM_OUT * NUM_IN, dtype=np.float32)
        matrix[flat] = values
        return matrix.reshape(NUM_OUT, NUM_IN)

    def turns(self, size: int) -> Array:
        """Return orthogonal blocks as one matrix, and keep them as blocks."""
        blocks = np.linalg.qr(self._random.standard_normal((NUM_IN // size, size, size)))[0].astype(np.float32)
        self.raw[WHERE.tensor("in_blockdiag")] = blocks.tobytes()
        whole = np.zeros((NUM_IN, NUM_IN), dtype=np.float32)
        for place_of, block in enumerate(blocks):
            own = slice(place_of * size, (place_of + 1) * size)
            whole[own, own] = block
        return whole

    def pairs(self, group: int) -> Array:
        """Return the matrix that turns pairs of outputs, and keep its two vectors."""
        c0, c1 = self.normal("rot2.c0", NUM_OUT), self.normal("rot2.c1", NUM_OUT)
        matrix, half = np.diag(c0), group // 2
        for first in (i for i in range(NUM_OUT) if i % group < half):
            matrix[first, first + half], matrix[first + half, first] = -c1[first], c1[first + half]
        return matrix


def run(tmp_path: Path, module: Module, values: Values, x: Array, base: Base) -> Array:
    """Write one module, open it as a server does and run the site: [T, out]."""
    made = write(tmp_path / "new", manifest(module, base=BASE), values.raw)
    (tmp_path / "new").rename(tmp_path / made.digest())
    opened = open_image(tmp_path, made.digest())
    data = torch.frombuffer(bytearray(opened.data), dtype=torch.uint8)
    (placed,) = place([AdapterImage(data, torch.float32, site_rows(opened), SHAPES)], torch.float32)
    y = CpuDelta(build_route([placed], [len(x)])).apply(1, "o", torch.from_numpy(x), base)
    found: Array = y.numpy()
    return found


@pytest.fixture
def x() -> Array:
    return np.random.default_rng(2).standard_normal((5, NUM_IN)).astype(np.float32)


@pytest.fixture
def weight() -> Array:
    return np.random.default_rng(3).standard_normal((NUM_OUT, NUM_IN)).astype(np.float32)


@pytest.fixture
def bias() -> Array:
    return np.random.default_rng(4).standard_normal(NUM_OUT).astype(np.float32)


@pytest.mark.parametrize("is_ternary", [False, True])
def test_every_rare_op_in_one_module(is_ternary: bool, tmp_path: Path, x: Array, weight: Array, bias: Array) -> None:
    values = Values()
    sparse, dense = values.sparse(31, is_ternary=is_ternary), values.normal("dense", NUM_OUT, NUM_IN)
    out_scale, in_scale = values.normal("out_scale", NUM_OUT), values.normal("in_scale", NUM_IN)
    turns, pairs = values.turns(8), values.pairs(4)
    own_bias = values.normal("bias", NUM_OUT)
    module = replace(WHERE, has_bias=True, has_out_scale=True, has_in_scale=True, csr=Csr(31, is_ternary=is_ternary))
    module = replace(module, has_dense=True, blockdiag=8, rot2_group=4)
    found = run(tmp_path, module, values, x, Base(torch.from_numpy(weight), torch.from_numpy(bias)))
    product = ((x * in_scale) @ turns @ weight.T * out_scale) @ pairs.T
    np.testing.assert_allclose(found, product + bias + own_bias + x @ (sparse + dense).T, atol=2e-4)


def test_a_gate_of_every_option(tmp_path: Path, x: Array, weight: Array) -> None:
    values = Values()
    gate, gate_bias = values.normal("G", 4, NUM_IN), values.normal("Gb", 4)
    a, bt = values.normal("A", 8, NUM_IN), values.normal("BT", 8, NUM_OUT)
    options = GateOptions("unit", "abs", has_bias=True, select_all=True, weight="sigmoid", mix="rank")
    module = replace(WHERE, experts=Experts((2,) * 4, 4, 0.25, options))
    found = run(tmp_path, module, values, x, Base(torch.from_numpy(weight), None))
    logits = np.abs(x / np.linalg.norm(x, axis=1, keepdims=True) @ gate.T + gate_bias)
    shares = 1 / (1 + np.exp(-logits / 0.25))
    mixed_a = np.einsum("te,eri->tri", shares, a.reshape(4, 2, NUM_IN))
    mixed_bt = np.einsum("te,ero->tro", shares, bt.reshape(4, 2, NUM_OUT))
    expected = x @ weight.T + np.einsum("ti,tri,tro->to", x, mixed_a, mixed_bt)
    np.testing.assert_allclose(found, expected, atol=2e-4)
