"""Pickles are opened by one process that runs nothing: tensors and plain values pass, everything else is refused."""

import io
import json
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters_store.convert.dispatch import convert
from adapters_store.convert.tensor_files import open_tensors, plain_values, unread_keys
from adapters_store.convert.unpickle import translate
from adapters_store.converter import run_child
from adapters_store.errors import CorruptUpload, UnsafePickle, UnsupportedFormat
from adapters_store.parts import TRANSLATED_PART
from adapters_store.unpickled import translate_pickles
from tests.store.folders import lora_config, lora_tensors, open_store, write_folder

NAME = "adapter_model.bin"


class Calls:
    """Pickles as a call: what every attack is made of."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def in_process(module: str, arguments: list[str], folder: Path, timeout_s: int) -> bytes:
    """Stand in for the child: the same translation, without its walls."""
    assert module == "adapters_store.convert.unpickle"
    try:
        translate(Path(arguments[0]), Path(arguments[1]), int(arguments[2]))
    except UnsafePickle as error:
        return json.dumps({"code": error.code, "message": error.message}).encode()
    return b"{}"


def source_of(folder: Path, value: object, name: str = NAME, *, legacy: bool = False) -> Path:
    """Return a staging folder with one pickle."""
    source = folder / "source"
    source.mkdir()
    torch.save(value, source / name, _use_new_zipfile_serialization=not legacy)
    return source


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "before torch 1.6"])
def test_tensors_of_every_kind_and_plain_values_pass_exactly(legacy: bool, tmp_path: Path) -> None:
    shared = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 7
    value = {
        "a.weight": shared,
        "a.view": shared.T,
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "brain": torch.nn.Parameter(torch.tensor([[0.25]], dtype=torch.bfloat16)),
        "double": torch.tensor([0.1], dtype=torch.float64),
        "signs": torch.tensor([-1, 0, 1], dtype=torch.int8),
        "mask": torch.tensor([True, False]),
        "long": torch.tensor([1 << 40]),
        "scalar": torch.tensor(2.5),
        "array": np.array([[1, 2]], dtype=np.int32),
        "nested": {"size": shared.shape, "steps": [np.int64(3), *range(40)], "rank": 8, "alpha": 0.5, "note": "x"},
    }
    source = source_of(tmp_path, value, legacy=legacy)
    translate_pickles(source, in_process)
    assert sorted(path.name for path in source.iterdir()) == ["adapter_model.safetensors", TRANSLATED_PART]
    with open_tensors([source / "adapter_model.safetensors"]) as files:
        np.testing.assert_array_equal(files.floats("a.weight"), shared.numpy())
        np.testing.assert_array_equal(files.floats("a.view"), shared.numpy().T)
        assert files.floats("half").tolist() == [1.5, -2.0] and files.floats("brain").tolist() == [[0.25]]
        assert files.floats("double")[0] == np.float32(0.1) and files.floats("scalar").shape == ()
        assert files.integers("signs").tolist() == [-1, 0, 1] and files.integers("mask").tolist() == [1, 0]
        assert files.integers("array").tolist() == [[1, 2]]
        assert files.integers("long").tolist() == [1 << 40]
        assert files.integers("nested.steps").tolist() == [3, *range(40)]
    assert plain_values(source) == {
        "nested.size": [3, 4], "nested.rank": 8, "nested.alpha": 0.5, "nested.note": "x"
    }  # fmt: skip


def test_what_training_left_beside_the_weights_is_named_and_not_read(tmp_path: Path) -> None:
    value = {
        "state_dict": {"a": torch.ones(2)},
        "epoch": 3,
        "optimizer": {"param_groups": [{"params": [0]}], "state": {0: {"m": torch.ones(2)}}},
    }
    source = source_of(tmp_path, value, "last.ckpt")
    translate_pickles(source, in_process)
    with open_tensors([source / "last.safetensors"]) as files:
        assert files.names == {"state_dict.a"}
    assert plain_values(source) == {"epoch": 3}
    assert unread_keys(source) == ("epoch", "optimizer") and unread_keys(source, ("epoch",)) == ("optimizer",)


def gadget(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Calls(subprocess.check_call, ["touch", str(marker)]), protocol=2))


def archive_of(path: Path, stream: bytes) -> None:
    """Write torch's archive with another stream in the place of its pickle."""
    raw = io.BytesIO()
    torch.save({"a": torch.ones(2)}, raw)
    with zipfile.ZipFile(raw) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for member in old.infolist():
            new.writestr(member.filename, stream if member.filename.endswith("data.pkl") else old.read(member))


def gadget_in_an_archive(path: Path, marker: Path) -> None:
    archive_of(path, pickle.dumps({"a": Calls(subprocess.check_call, ["touch", str(marker)])}, protocol=2))


def builtin_gadget(path: Path, marker: Path) -> None:
    torch.save({"a": Calls(eval, f"open({str(marker)!r}, 'w')")}, path)


def an_own_class(path: Path, marker: Path) -> None:
    torch.save({"a": torch.nn.Linear(2, 2)}, path)


def compressed(path: Path, marker: Path) -> None:
    raw = io.BytesIO()
    torch.save({"a": torch.zeros(1 << 16)}, raw)
    with zipfile.ZipFile(raw) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))


def a_storage_seen_a_million_times(path: Path, marker: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, path)


def dicts_in_dicts(path: Path, marker: Path) -> None:
    # deeper than a writer in Python could recurse
    archive_of(path, b"\x80\x02" + b"}X\x01\x00\x00\x00x" * 5000 + b"}" + b"s" * 5000 + b".")


def the_same_dict_without_end(path: Path, marker: Path) -> None:
    level: dict[str, object] = {str(i): 1 for i in range(60)}
    for _ in range(4):
        level = {str(i): level for i in range(60)}
    torch.save({**level, "a": torch.ones(1)}, path)


def no_dict(path: Path, marker: Path) -> None:
    torch.save([torch.ones(2)], path)


def no_tensor(path: Path, marker: Path) -> None:
    torch.save({"a": 1}, path)


def a_sparse_tensor(path: Path, marker: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, path)


def keys_that_collide(path: Path, marker: Path) -> None:
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, path)


def text_for_a_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(b"not a pickle at all")


def an_archive_in_parts(path: Path, marker: Path) -> None:
    torch.save({"a": torch.ones(2)}, path)
    raw = bytearray(path.read_bytes())
    # the locator at the end names a second disk
    raw[raw.rindex(b"PK\x06\x07") + 16] = 2
    path.write_bytes(bytes(raw))


def cut_off(path: Path, marker: Path) -> None:
    torch.save({"a": torch.ones(999)}, path)
    path.write_bytes(path.read_bytes()[:-700])


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (gadget, "check_call"),
        (gadget_in_an_archive, "check_call"),
        (builtin_gadget, "eval"),
        (an_own_class, "Linear"),
        (compressed, "compressed"),
        (a_storage_seen_a_million_times, "larger than what is stored"),
        (dicts_in_dicts, "more than"),
        (the_same_dict_without_end, "more than"),
        (no_dict, "a list"),
        (no_tensor, "no tensor"),
        (a_sparse_tensor, "no plain tensor"),
        (keys_that_collide, "two of its keys"),
        (text_for_a_pickle, "cannot read"),
        (an_archive_in_parts, "damaged"),
        (cut_off, "cannot read|damaged"),
    ],
)
def test_a_hostile_or_odd_pickle_is_refused_and_runs_nothing(
    write: Callable[[Path, Path], None], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    marker = tmp_path / "marker"
    write(tmp_path / "source" / NAME, marker)
    with pytest.raises(UnsafePickle, match=reason) as refusal:
        translate_pickles(tmp_path / "source", in_process)
    assert (refusal.value.code, refusal.value.param) == ("unsafe_pickle", "files")
    assert not marker.exists() and len(refusal.value.message) < 400


def a_storage_of_a_terabyte(path: Path) -> None:
    """Write the old form, whose storages say how large they are before their bytes come."""
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    # the number of elements, as the stream spells it: BININT1 4
    changed = raw.replace(b"cpuq\x06K\x04", b"cpuq\x06\x8a\x05" + struct.pack("<Q", 1 << 38)[:5])
    assert changed != raw
    path.write_bytes(changed)


def test_the_process_of_its_own_translates_refuses_and_survives_what_wants_too_much(tmp_path: Path) -> None:
    good = source_of(tmp_path, {"a": torch.arange(4.0), "step": 7})
    translate_pickles(good, run_child)
    with open_tensors([good / "adapter_model.safetensors"]) as files:
        assert files.floats("a").tolist() == [0.0, 1.0, 2.0, 3.0]
    assert plain_values(good) == {"step": 7}
    (tmp_path / "bad" / "source").mkdir(parents=True)
    a_storage_of_a_terabyte(tmp_path / "bad" / "source" / NAME)
    gadget(tmp_path / "bad" / "source" / "x.ckpt", tmp_path / "marker")
    with pytest.raises(UnsafePickle):
        translate_pickles(tmp_path / "bad" / "source", run_child)
    assert not (tmp_path / "marker").exists()


def test_what_all_pickles_together_become_has_one_limit(tmp_path: Path) -> None:
    stored = torch.zeros(1 << 18)
    # a megabyte that each of them repeats thirty times, of which each alone would pass
    repeated = {str(number): stored.view(-1) for number in range(30)}
    source = source_of(tmp_path, repeated, "a.ckpt")
    for name in ("b.ckpt", "c.ckpt", "d.ckpt"):
        torch.save(repeated, source / name)
    with pytest.raises(UnsafePickle, match=r"c\.ckpt grows beyond its limit"):
        translate_pickles(source, in_process)


def test_a_pickle_beside_its_safetensors_twin_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"a": torch.ones(1)})
    (source / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(CorruptUpload, match="send one of them"):
        translate_pickles(source, in_process)


def test_only_the_process_of_its_own_opens_a_pickle(tmp_path: Path) -> None:
    source = source_of(tmp_path, {"a": torch.ones(1)}, "x.ckpt")
    with pytest.raises(UnsupportedFormat), open_tensors([source / "x.ckpt"]):
        raise AssertionError("opened")


@pytest.mark.parametrize("name", ["a.pkl", "a.PICKLE", "x.joblib", "adapter_model.dill"])
def test_a_pickle_that_nothing_restricts_is_refused_before_a_byte_is_stored(name: str, tmp_path: Path) -> None:
    with open_store(tmp_path / "store").stage() as upload, pytest.raises(UnsupportedFormat):
        upload.open_part(name)


def test_the_converters_never_open_a_pickle_themselves(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", lora_config(), lora_tensors())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedFormat, match="safe_serialization=True"):
        open_store(tmp_path / "store", convert=convert).put_dir("a", folder)
