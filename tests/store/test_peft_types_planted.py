"""The self-test convicts a wrong reduction of any kind of adapter."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from adapters_store.convert.lora_factors import LoraValues
from adapters_store.convert.peft_types import PEFT_TYPES
from adapters_store.convert.tuner import Factors, Served
from adapters_store.errors import ConversionFailed
from tests.store.peft_folders import SWEPT, Folders

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    yield Folders(tmp_path_factory.mktemp("planted"))


def scaled_frame(good: Factors) -> Factors:
    """Return what lies beside A, B and bias a hundredth larger."""
    sparse, turn = good.sparse, good.rotation
    return replace(
        good,
        sparse=None if sparse is None else replace(sparse, values=sparse.values * 1.01),
        blocks=None if good.blocks is None else good.blocks * 1.01,
        rotation=None if turn is None else replace(turn, c0=turn.c0 * 1.01),
    )


def moved_frame(good: Factors) -> Factors:
    """Return what lies beside A, B and bias in other places."""
    sparse, turn = good.sparse, good.rotation
    return replace(
        good,
        sparse=None if sparse is None else replace(sparse, values=np.roll(sparse.values, 1)),
        blocks=None if good.blocks is None else good.blocks.swapaxes(1, 2),
        rotation=None if turn is None else replace(turn, c1=-turn.c1),
    )


PLANTED: dict[str, Callable[[Factors], Factors]] = {
    "a scaling is off by a hundredth": lambda good: replace(
        scaled_frame(good), b=good.b * 1.01, bias=None if good.bias is None else good.bias * 1.01
    ),
    "rows of A are in another order": lambda good: replace(
        moved_frame(good), a=np.roll(good.a, 1, axis=1), bias=None if good.bias is None else np.roll(good.bias, 1)
    ),
    "outputs are shifted by one": lambda good: replace(
        moved_frame(good), b=np.roll(good.b, 1, axis=0), bias=None if good.bias is None else np.roll(good.bias, 1)
    ),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED.keys())
@pytest.mark.parametrize("name", SWEPT)
def test_a_planted_bug_in_the_reduction_of_any_kind_is_found(
    name: str, planted: Callable[[Factors], Factors], folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = folders.saved[name]
    kind = PEFT_TYPES[str(saved.config["peft_type"])]
    assert isinstance(kind, Served)
    delta_class = getattr(sys.modules[kind.read.__module__], "_Delta", LoraValues)
    sound = delta_class.factors
    monkeypatch.setattr(delta_class, "factors", lambda delta: planted(sound(delta)))
    with pytest.raises(ConversionFailed):
        folders.convert(saved.config, saved.tensors)
