"""The converters' self-test convicts planted mistakes: what does not act as its source is never published."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters_store.convert import meteora, s2ft
from adapters_store.convert.dispatch import convert
from adapters_store.convert.meteora import _Foreign
from adapters_store.convert.s2ft_delta import Selection, read_selection
from adapters_store.errors import ConversionFailed
from adapters_store.formats import Declared
from adapters_store.gates import Experts
from adapters_store.manifest import Module
from adapters_store.strict_json import Json
from tests.store.folders import TINY, open_store
from tests.store.tiny_checkpoints import (
    MHA,
    S2ft,
    TinyBase,
    meteora_checkpoint,
    mixture,
    s2ft_checkpoint,
    write_checkpoint,
)

CHOSEN = S2ft(v=[[2], [0]], o=[[1], [3]], up=[[5, 20], [1]], down=[[20, 3, 7], [4]])
OPTIONS: dict[str, Json] = {"top_k": 2, "temperature": 2.0, "rank": [2, 3, 1], "alpha": [4, 3, 2]}


def shifted(selection: Selection) -> Selection:
    return replace(selection, indices=selection.indices - 1 if selection.indices[0] else selection.indices + 1)


def scaled(selection: Selection) -> Selection:
    return replace(selection, values=selection.values * np.float32(1.01))


def shuffled(selection: Selection) -> Selection:
    return replace(selection, values=selection.values[::-1])


def incomplete(selection: Selection) -> Selection:
    values = selection.values.copy()
    values[0, 0] = 0
    return replace(selection, values=values)


@pytest.mark.parametrize("mistake", [shifted, scaled, shuffled, incomplete])
def test_a_wrong_selection_is_never_published(
    mistake: Callable[[Selection], Selection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    write_checkpoint(tmp_path / "ft", s2ft_checkpoint(base, CHOSEN)[0])

    def wrong(*arguments: object) -> Selection | None:
        found = read_selection(*arguments)  # type: ignore[arg-type]
        return None if found is None else mistake(found)

    monkeypatch.setattr(s2ft, "read_selection", wrong)
    store = open_store(tmp_path / "store", base.dims, base_dir=base.folder, convert=convert)
    with pytest.raises(ConversionFailed, match="does not act as its source"):
        store.put_dir("a", tmp_path / "ft")
    assert store.list() == []


def folded_twice(foreign: _Foreign, module: Module, kind: str) -> bytes:
    options = foreign.options
    again = replace(foreign, options=replace(options, scalings=tuple(s * s for s in options.scalings)))
    return _Foreign.encoded(again, module, kind, "float32")


def never_folded(foreign: _Foreign, module: Module, kind: str) -> bytes:
    again = replace(foreign, options=replace(foreign.options, scalings=(1.0,) * 3))
    return _Foreign.encoded(again, module, kind, "float32")


def gates_swapped(foreign: _Foreign, module: Module, kind: str) -> bytes:
    raw = _Foreign.encoded(foreign, module, kind, "float32")
    return np.frombuffer(raw, dtype="<f4").reshape(3, -1)[::-1].tobytes() if kind == "G" else raw


def b_not_transposed(foreign: _Foreign, module: Module, kind: str) -> bytes:
    raw = _Foreign.encoded(foreign, module, kind, "float32")
    return np.frombuffer(raw, dtype="<f4").reshape(6, -1).T.tobytes() if kind == "BT" else raw


@pytest.mark.parametrize("mistake", [folded_twice, never_folded, gates_swapped, b_not_transposed])
def test_a_wrong_mixture_is_never_published(
    mistake: Callable[[_Foreign, Module, str], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    write_checkpoint(tmp_path / "ft", meteora_checkpoint(base, mixture(TINY, (2, 3, 1))))

    class Wrong(_Foreign):
        def encoded(self, module: Module, kind: str, dtype: str) -> bytes:
            return mistake(self, module, kind)

    monkeypatch.setattr(meteora, "_Foreign", Wrong)
    store = open_store(tmp_path / "store", base.dims, base_dir=base.folder, convert=convert)
    with pytest.raises(ConversionFailed, match=r"does not act as its source|bug of the server"):
        store.put_dir("a", tmp_path / "ft", declared=Declared("meteora", OPTIONS))


@pytest.mark.parametrize(("field", "value"), [("top_k", 1), ("temperature", 2.1)])
def test_a_gate_that_weighs_otherwise_is_never_published(
    field: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    write_checkpoint(tmp_path / "ft", meteora_checkpoint(base, mixture(TINY, (2, 3, 1))))

    def other(ranks: tuple[int, ...], top_k: int, temperature: float) -> Experts:
        made = Experts(ranks, top_k, temperature)
        return replace(made, top_k=int(value)) if field == "top_k" else replace(made, temperature=value)

    monkeypatch.setattr(meteora, "Experts", other)
    store = open_store(tmp_path / "store", base.dims, base_dir=base.folder, convert=convert)
    with pytest.raises(ConversionFailed):
        store.put_dir("a", tmp_path / "ft", declared=Declared("meteora", OPTIONS))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(4))
def test_a_right_conversion_is_never_convicted(seed: int, dtype: str, tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    store = open_store(tmp_path / "store", base.dims, image_dtype=dtype, base_dir=base.folder, convert=convert)
    write_checkpoint(tmp_path / "s2ft", s2ft_checkpoint(base, CHOSEN, seed=seed)[0])
    store.put_dir("a", tmp_path / "s2ft")
    write_checkpoint(tmp_path / "mix", meteora_checkpoint(base, mixture(MHA, (2, 3, 1), seed=seed)), "F32")
    store.put_dir("b", tmp_path / "mix", declared=Declared("auto", OPTIONS))
    assert [version.family for version in store.list()] == ["s2ft", "meteora"]
