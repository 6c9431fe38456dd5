"""Loads of adapters that act outside the linear layers: what they cost, what fails them, and what they leave behind."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from adapter_kernels.image import AdapterImage
from adapters_store.entries import (
    EmbedEntry,
    GateEntry,
    KvPrefixEntry,
    ModelEntries,
    NormEntry,
    PromptEntry,
    SiteEntry,
    TokenRowsEntry,
)
from adapters_store.gates import GateOptions
from tests.engine.test_adapter_arena import Loads, image_of
from tests.engine.test_device_arena import Device
from tests.kernels.model_adapters import HIDDEN, VOCAB
from tests.kernels.random_adapters import Ops, random_image

# zeros: token id 0, then room for any of the tensors below
BYTES_OF_OPS = 4 * VOCAB * HIDDEN


@dataclass(frozen=True)
class Case:
    """One op alone, its tensors from byte `begin` on: how many values they hold, and what messages call them."""

    at: Callable[[int], ModelEntries]
    num_values: int
    name: str


CASES = {
    "norm": Case(lambda begin: ModelEntries(norms=(NormEntry(-1, "norm", begin + 128),)), HIDDEN, "norm"),
    "rows": Case(
        lambda begin: ModelEntries(token_rows=(TokenRowsEntry("both", 1, begin, begin + 128),)),
        HIDDEN,
        "the rows of embed_tokens",
    ),
    "head rows": Case(
        lambda begin: ModelEntries(token_rows=(TokenRowsEntry("lm_head", 1, begin, begin + 128),)),
        HIDDEN,
        "the rows of lm_head",
    ),
    "embed": Case(
        lambda begin: ModelEntries(embed_lowrank=EmbedEntry(1, begin, begin + 128)), VOCAB + HIDDEN, "embed_tokens"
    ),
    "prompt": Case(lambda begin: ModelEntries(prompt_embeds=PromptEntry(3, begin + 128)), 3 * HIDDEN, "the prompt"),
    "prefix": Case(
        lambda begin: ModelEntries(kv_prefix=KvPrefixEntry(3, begin + 128, begin + 128)),
        2 * 3 * 2 * 2 * 4,
        "the prefix",
    ),
    "head": Case(
        lambda begin: ModelEntries(head=SiteEntry(-1, "lm_head", (1,), begin + 128, begin + 128, None)),
        HIDDEN + VOCAB,
        "lm_head",
    ),
    "gate": Case(
        lambda begin: ModelEntries(
            gates=(GateEntry("layers.1.mlp", 1, 3, 1, 1.0, GateOptions(), True, begin + 128, None),)
        ),
        3 * HIDDEN,
        "layers.1.mlp",
    ),
}


def with_room(image: AdapterImage) -> tuple[AdapterImage, int]:
    """Append bytes for ops, and say where they begin."""
    begin = image.data.numel()
    return replace(image, data=torch.cat((image.data, torch.zeros(BYTES_OF_OPS, dtype=torch.uint8)))), begin


@pytest.fixture
def loads() -> Loads:
    return Loads(torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_every_op_counts_its_bytes_and_fails_alone_when_it_is_not_finite(name: str, loads: Loads) -> None:
    case = CASES[name]
    image, begin = with_room(image_of(Ops((2,))))
    plain = loads.load(image).num_bytes
    loads.images.models["digest"] = case.at(begin)
    result = loads.load(image, 1)
    assert result.error is None and result.num_bytes == plain + 4 * case.num_values
    image.data[begin + 128 : begin + 132].view(torch.float32)[0] = float("inf")
    result = loads.load(image, 2)
    assert result.error is not None and result.error.startswith(f"{case.name}: a weight is not finite in torch.float32")
    loads.arena.close()


def test_whoever_comes_next_to_a_place_inherits_nothing(loads: Loads) -> None:
    image, begin = with_room(image_of(Ops((2,))))
    loads.images.models["digest"] = CASES["prompt"].at(begin)
    assert loads.load(image, 0).error is None
    del loads.images.models["digest"]
    assert loads.load(image, 1).error is None
    first = loads.arena.placement(0)
    assert first.extras is not None and loads.arena.placement(1).extras is None
    loads.arena.drop(0)
    assert loads.load(image, 2).error is None
    assert loads.arena.placement(2) == first and loads.arena.placement(2).extras is None
    loads.arena.close()


@pytest.mark.parametrize("name", CASES)
def test_a_device_refuses_the_load_and_goes_on(name: str) -> None:
    image, begin = with_room(random_image({(0, "q_proj"): 2}, torch.Generator().manual_seed(1)))
    device = Device({"0": image})
    device.store.models["0"] = CASES[name].at(begin)
    result = device.load("0", 0)
    assert result.error is not None and result.error.endswith("do not compute; serve it with --device cpu")
    del device.store.models["0"]
    assert device.load("0", 1).error is None
