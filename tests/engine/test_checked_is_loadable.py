"""What the store accepts, a server loads: mutants of canonical files, judged by the store and read by the kernels.

The two share no code. A mutant either is refused with an error of the store's, or loads finite and in range.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapter_kernels.image import AdapterImage
from adapter_kernels.profile import Profile
from adapter_kernels.rare_image import read_rare_sites
from adapter_kernels.slab import Slab
from adapters_store.base import SITES
from adapters_store.blobs import open_image
from adapters_store.canonical import check_adapter, layout
from adapters_store.errors import AdapterRefused
from adapters_store.gates import Experts, GateOptions
from adapters_store.manifest import Manifest
from adapters_store.ops import Csr, Module
from serve.engine.site_rows import site_rows
from tests.engine.arena_adapters import BASE
from tests.kernels.random_adapters import SHAPES
from tests.store.canonical_files import manifest, write

Q, DOWN = SITES.index("q_proj"), SITES.index("down_proj")
GATE = GateOptions("unit", "abs", has_bias=True, weight="softmax_all", mix="rank")
FULL = Module(
    0,
    Q,
    0,
    has_bias=True,
    experts=Experts((2, 2, 2), 2, 0.5, GATE),
    cols=3,
    rows=4,
    has_out_scale=True,
    has_in_scale=True,
    csr=Csr(9, is_ternary=True),
    has_dense=True,
    blockdiag=4,
    rot2_group=8,
)
MODULES = (FULL, Module(1, DOWN, 3, has_bias=False, cols=2, csr=Csr(5, is_ternary=False)))


def mutant(rng: random.Random, made: Manifest) -> tuple[Manifest, dict[str, bytes]]:
    """Change a size or an option of one module, or the bytes of one tensor, or both."""
    index = rng.randrange(len(MODULES))
    modules, changes = list(MODULES), {}
    if rng.random() < 0.6:
        field = rng.choice(["cols", "rows", "blockdiag", "rot2_group", "rank", "csr", "experts", "has_in_scale"])
        number = rng.choice([0, 1, 2, 3, 5, 6, 8, 16, 24, 40, -1])
        gate = replace(GATE, mix=rng.choice(["output", "rank"]), select_all=rng.random() < 0.5)
        value: dict[str, object] = {
            "csr": Csr(number, rng.random() < 0.5),
            "experts": Experts((2,) * rng.randrange(1, 4) + (rng.choice([1, 2]),), max(number, 1), 1.0, gate),
            "has_in_scale": False,
        }
        modules[index] = replace(modules[index], **{field: value.get(field, number)})  # type: ignore[arg-type]
    changed = manifest(*modules, base=made.base)
    if rng.random() < 0.6:
        slots = layout(changed.modules, made.base, "float32")
        slot = rng.choice([slot for slot in slots if not slot.name.startswith("pad.") and slot.end > slot.begin])
        raw = bytearray(rng.randbytes(slot.end - slot.begin) if rng.random() < 0.2 else bytes(slot.end - slot.begin))
        for _ in range(rng.randrange(4)):
            raw[rng.randrange(len(raw))] = rng.choice([1, 7, 127, 128, 255])
        changes[slot.name] = bytes(raw)
    return changed, changes


def load(folder: Path, digest: str) -> None:
    """Read everything as a load on the CPU does; raises ImageError, or fails."""
    opened = open_image(folder, digest)
    data = torch.frombuffer(bytearray(opened.data), dtype=torch.uint8)
    image = AdapterImage(data, torch.float32, site_rows(opened), SHAPES)
    slab = Slab(Profile.of(image), SHAPES, torch.float32)
    slab.write(0, image)
    rare = read_rare_sites(image, torch.float32)
    tensors = [tensor for site in rare.values() for tensor in site.tensors()]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    assert all(bool(torch.isfinite(tensor[0]).all()) for _, _, tensor in slab.tensors())


def judge(folder: Path, seed: int) -> bool:
    """Write a mutant; return whether the store takes it, after loading it."""
    changed, changes = mutant(random.Random(seed), manifest(*MODULES, base=BASE))
    try:
        made = write(folder / "new", changed, changes)
    except (ValueError, AssertionError):
        # sizes that no file can have end in numpy or in the writer
        return False
    try:
        check_adapter(folder / "new", BASE, "float32", 64, 1 << 20)
    except AdapterRefused:
        return False
    (folder / "new").rename(folder / made.digest())
    load(folder, made.digest())
    return True


def check_mutants(folder: Path, first: int, count: int) -> None:
    taken = 0
    for seed in range(first, first + count):
        own = folder / str(seed)
        own.mkdir()
        taken += judge(own, seed)
    # a mutator that breaks everything, or nothing, would prove nothing
    assert 0.1 * count < taken < 0.9 * count


def test_mutants_are_refused_or_loadable(tmp_path: Path) -> None:
    check_mutants(tmp_path, 0, 120)


@pytest.mark.slow
def test_many_mutants_are_refused_or_loadable(tmp_path: Path) -> None:
    check_mutants(tmp_path, 1000, 10_000)
