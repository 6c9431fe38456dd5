"""The cache's memory: zeros that cost nothing until they are written, and then no more than their own pages."""

import mmap
import sys

import pytest
import torch

from serve.model.kv_cache import KvCache
from serve.model.spec import ModelSpec, read_spec
from tests.model.paged_run import CPU
from tests.model.tiny_models import BY_NAME, save

BLOCK_SIZE, NUM_BLOCKS = 16, 65_536


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    with torch.random.fork_rng():
        return read_spec(save(BY_NAME["llama2"].build(), tmp_path_factory.mktemp("base")))


def resident_bytes() -> int:
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Rss:"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_written_block_takes_its_own_pages(spec: ModelSpec) -> None:
    # code that is read for the first time counts too
    KvCache.build(spec, 8, BLOCK_SIZE, torch.bfloat16, CPU).k[0][2:3].fill_(1.0)
    before = resident_bytes()
    cache = KvCache.build(spec, NUM_BLOCKS, BLOCK_SIZE, torch.bfloat16, CPU)
    tensors = (*cache.k, *cache.v)
    # large enough that the system would give pages of 2 MiB for them
    assert all(tensor.nbytes >= 8 << 20 for tensor in tensors)
    for tensor in tensors:
        tensor[NUM_BLOCKS // 2 : NUM_BLOCKS // 2 + 4].fill_(1.0)
    written = sum(tensor[:4].nbytes + mmap.PAGESIZE for tensor in tensors)
    assert resident_bytes() - before < written + (3 << 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_blocks_are_zeros_and_keep_what_is_written(spec: ModelSpec, dtype: torch.dtype) -> None:
    cache = KvCache.build(spec, 8, BLOCK_SIZE, dtype, CPU)
    assert len(cache.k) == len(cache.v) == spec.dims.num_hidden_layers
    for i, tensor in enumerate((*cache.k, *cache.v)):
        assert tensor.shape == (8, BLOCK_SIZE, spec.dims.num_key_value_heads, spec.dims.head_dim)
        assert tensor.dtype == dtype and not tensor.any()
        tensor.fill_(i + 1)
    assert [float(tensor.mean()) for tensor in (*cache.k, *cache.v)] == [i + 1 for i in range(2 * len(cache.k))]
