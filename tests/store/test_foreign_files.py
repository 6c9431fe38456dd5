"""Foreign files that come in by other ways, and those that are damaged, incomplete or ask for what is not served."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from adapters_store.base import BaseDims, read_base_dims
from adapters_store.convert.dispatch import convert
from adapters_store.convert.options import ConvertOptions
from adapters_store.converter import convert_in_child
from adapters_store.errors import AdapterRefused
from adapters_store.formats import Declared
from adapters_store.manifest import parse_manifest
from adapters_store.store import AdapterStore
from adapters_store.strict_json import Json
from adapters_store.unpickled import translate_pickles
from tests.model.tiny_models import BY_NAME, save
from tests.store.folders import (
    TINY,
    lora_config,
    lora_tensors,
    open_store,
    safetensors_bytes,
    write_folder,
)
from tests.store.foreign_damage import SPOILED, State, add_to, model
from tests.store.foreign_models import MAKERS
from tests.store.test_unpickle import in_process
from tests.store.tiny_checkpoints import GQA, S2ft, TinyBase, Weights, meteora_checkpoint, mixture, s2ft_checkpoint

# PEFT's own words about its own kinds
pytestmark = pytest.mark.filterwarnings("ignore")


def convert_here(source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert in this process, pickles included."""
    translate_pickles(source, in_process)
    convert(source, target, options)


def as_torch(weights: Weights) -> State:
    return {name: torch.from_numpy(values.copy()).to(torch.bfloat16) for name, values in weights.items()}


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one file", "shards"])
def test_the_official_pickle_of_s2ft_is_what_its_safetensors_are(is_sharded: bool, tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", GQA)
    weights = as_torch(s2ft_checkpoint(base, S2ft(up=[[3], []], down=[[9, 1], [22]]))[0])
    for kind in ("pickled", "plain"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(weights, tmp_path / "plain" / "model.safetensors")
    names = sorted(weights)
    if is_sharded:
        for number, part in ((1, names[:9]), (2, names[9:])):
            shard = {name: weights[name] for name in part}
            torch.save(shard, tmp_path / "pickled" / f"pytorch_model-0000{number}-of-00002.bin")
        (tmp_path / "pickled" / "pytorch_model.bin.index.json").write_text("{}")
    else:
        torch.save({**weights, "step": 7}, tmp_path / "pickled" / "pytorch_model.bin")
    store = open_store(tmp_path / "store", base.dims, base_dir=base.folder, convert=convert_here)
    versions = [store.put_dir(kind, tmp_path / kind) for kind in ("pickled", "plain")]
    images = [store.open_image(version.digest).data for version in versions]
    assert images[0] == images[1]
    assert [version.report.ignored for version in versions] == [() if is_sharded else ("step",), ()]


def test_a_pickled_peft_adapter_is_converted_by_processes_of_their_own_and_named_in_the_manifest(
    tmp_path: Path,
) -> None:
    folder = write_folder(tmp_path / "plain", lora_config(), lora_tensors())
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    beside = {"step": 7, "author": {"name": "x", "year": 2026}}
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save({**tensors, **beside}, tmp_path / "pickled" / "adapter_model.bin")
    digests = []
    for name, how in (("plain", convert), ("pickled", convert_in_child)):
        store = open_store(tmp_path / "store", convert=how)
        digests.append(store.put_dir(name, tmp_path / name).digest)
    assert store.open_image(digests[0]).data == store.open_image(digests[1]).data
    uploaded = (tmp_path / "pickled" / "adapter_model.bin").read_bytes()
    manifest = parse_manifest((tmp_path / "store" / "objects" / digests[1] / "adapter.json").read_bytes())
    assert manifest.source.files["adapter_model.bin"] == hashlib.sha256(uploaded).hexdigest()
    assert sorted(manifest.source.files) == ["adapter_config.json", "adapter_model.bin"]
    assert {"step", "author.*"} <= set(manifest.source.ignored)


def test_more_experts_than_a_converter_may_have_files_open(tmp_path: Path) -> None:
    for number in range(40):
        folder = tmp_path / "loras" / "experts" / f"task{number:02}"
        write_folder(folder, lora_config(r=2), lora_tensors(seed=number, rank=2))
    store = open_store(tmp_path / "store", convert=convert_in_child)
    declared = Declared("arrow", {"top_k": 2, "temperature": 1})
    version = store.put_dir("many", tmp_path / "loras", declared=declared)
    assert len(version.report.applied) == 7 * TINY.num_hidden_layers


def test_meteora_takes_its_numbers_and_names_from_the_loras_beside_it(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    weights = meteora_checkpoint(base, mixture(TINY, (2, 3)))
    store = open_store(tmp_path / "store", base.dims, base_dir=base.folder, convert=convert)
    by_hand: dict[str, Json] = {"top_k": 1, "rank": [2, 3], "alpha": [4, 9], "experts": ["law", "art"]}
    images = []
    for name, has_experts in (("alone", False), ("together", True)):
        (tmp_path / name).mkdir()
        save_file(as_torch(weights), tmp_path / name / "model.safetensors")
        if has_experts:
            for expert, rank, alpha in (("law", 2, 4), ("art", 3, 9)):
                folder = tmp_path / name / "experts" / expert
                write_folder(folder, lora_config(r=rank, lora_alpha=alpha), lora_tensors(rank=rank))
        named: dict[str, Json] = {"top_k": 1, "experts": ["law", "art"]}
        options = named if has_experts else by_hand
        version = store.put_dir(name, tmp_path / name, declared=Declared("meteora", options))
        images.append(store.open_image(version.digest).data)
    assert images[0] == images[1] and "experts/art/adapter_model.safetensors" in version.report.ignored
    wrong: list[tuple[dict[str, Json], str]] = [
        ({"top_k": 1}, "their order matters"),
        ({"top_k": 1, "experts": ["law"]}, "must name the 2 LoRAs"),
        ({"top_k": 1, "experts": ["law", "art"], "rank": 2}, "the LoRAs of the upload say"),
    ]
    for options, message in wrong:
        with pytest.raises(AdapterRefused, match=message) as refusal:
            store.put_dir("wrong", tmp_path / "together", declared=Declared("meteora", options))
        assert refusal.value.code == "invalid_option"


class Uploads:
    """Every maker's folder, once, over one base."""

    def __init__(self, root: Path) -> None:
        base = BY_NAME["llama3"].build()
        assert isinstance(base, LlamaForCausalLM)
        self.base, self.root, self.folder = base, root, save(base, root / "base")
        self.dims: BaseDims = read_base_dims(self.folder)
        self._made: dict[str, Declared] = {}
        self.num_spoiled = 0

    def copy(self, name: str) -> tuple[Path, Declared]:
        """Return a folder of its own to spoil."""
        if name not in self._made:
            with torch.no_grad():
                made = MAKERS[name](self.base, self.root / name)
            self._made[name] = Declared(made.format, made.options)
        self.num_spoiled += 1
        folder = self.root / f"{name}-{self.num_spoiled}"
        return shutil.copytree(self.root / name, folder), self._made[name]

    def store(self, **options: object) -> AdapterStore:
        self.num_spoiled += 1
        changed = {"base_dir": self.folder, "convert": convert_here, "max_rank": 8, **options}
        return open_store(self.root / f"store-{self.num_spoiled}", self.dims, **changed)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Uploads:
    return Uploads(tmp_path_factory.mktemp("foreign"))


@pytest.mark.parametrize(
    ("name", "spoil", "code", "message"), SPOILED, ids=[f"{s[0]}-{i}" for i, s in enumerate(SPOILED)]
)
def test_a_damaged_or_incomplete_upload_is_refused_by_name(
    name: str, spoil: Callable[[Path], object], code: str, message: str, uploads: Uploads
) -> None:
    folder, declared = uploads.copy(name)
    spoil(folder)
    with pytest.raises(AdapterRefused, match=message) as refusal:
        uploads.store().put_dir("a", folder, declared=declared)
    assert refusal.value.code in code.split("|") and len(refusal.value.message) < 500


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mixlora", {"top_k": 2}, "no option 'top_k'"),
        ("llava-mole", {"alpha": 5}, "routing is missing"),
        ("llava-mole", {"alpha": 5, "routing": "top2"}, "dense or top1"),
        ("llava-mole", {"routing": "top1"}, "alpha is missing"),
        ("arrow", {"top_k": 2}, "temperature is missing"),
        ("arrow", {"top_k": 2, "temperature": 0}, "above 0"),
        ("arrow", {"top_k": 2, "temperature": 1, "general": ["law"], "experts": ["law"]}, "once"),
        ("arrow", {"top_k": 2, "temperature": 1, "general": ["nobody"]}, "out of"),
        ("mttl-library", {}, "routing is missing"),
        ("mttl-library", {"routing": "phatgoose"}, "auxiliary data"),
        ("mttl-library", {"routing": "arrow", "temperature": 1, "top_k": 2}, "mix is missing"),
        ("spiel", {"x": 1}, "no option 'x'"),
        ("hf-model", {"lossy": 1}, "true or false"),
    ],
)
def test_an_option_that_is_missing_unknown_or_wrong_is_named(
    name: str, options: dict[str, Json], message: str, uploads: Uploads
) -> None:
    folder, declared = uploads.copy(name)
    with pytest.raises(AdapterRefused, match=message):
        uploads.store().put_dir("a", folder, declared=Declared(declared.format, options))


@pytest.mark.parametrize("name", ["hf-model", "lt-sft", "mixlora"])
def test_without_the_base_what_needs_it_is_refused_with_the_way_out(name: str, uploads: Uploads) -> None:
    folder, declared = uploads.copy(name)
    with pytest.raises(AdapterRefused, match="--base") as refusal:
        uploads.store(base_dir=None).put_dir("a", folder, declared=declared)
    assert refusal.value.code == "wrong_base"


def test_a_dense_change_comes_in_where_the_operator_has_room_for_it(uploads: Uploads) -> None:
    folder, declared = uploads.copy("hf-model")
    model(add_to("model.layers.0.mlp.gate_proj.weight"))(folder)
    store = uploads.store(dense_budget_bytes=88 * 64 * 4)
    image = store.open_image(store.put_dir("a", folder, declared=declared).digest)
    dense = [entry for entry in image.entries if entry.dense_offset is not None]
    assert [(entry.layer, entry.site) for entry in dense] == [(0, "gate_proj")]


def test_a_low_rank_merged_in_bfloat16_is_taken_only_as_lossy_and_its_error_recorded(
    tmp_path: Path,
) -> None:
    base = TinyBase.write(tmp_path / "base", GQA)
    random = np.random.default_rng(3)
    name, weights = "model.layers.1.mlp.up_proj.weight", dict(base.weights)
    weights[name] = weights[name] + (random.standard_normal((24, 2)) @ random.standard_normal((2, 16))).astype(
        np.float32
    )
    (tmp_path / "ft").mkdir()
    save_file(as_torch(weights), tmp_path / "ft" / "model.safetensors")
    store = open_store(tmp_path / "store", base.dims, base_dir=base.folder, convert=convert, max_rank=4)
    with pytest.raises(AdapterRefused, match="send the option lossy"):
        store.put_dir("a", tmp_path / "ft", declared=Declared("hf_model"))
    version = store.put_dir("a", tmp_path / "ft", declared=Declared("hf_model", {"lossy": True}))
    assert 2 <= version.rank <= 4
    manifest = (store._blobs.root / version.digest / "adapter.json").read_bytes()
    error = json.loads(manifest)["source"]["config"]["max_weight_error"]
    assert 0 < error < 2**-6 * np.abs(weights[name]).max() and b'"lossy":true' in manifest


def test_files_of_two_formats_or_of_none_are_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", convert=convert_here)
    config, tensors = b"{}", safetensors_bytes(lora_tensors())
    for names, declared, message in (
        (["a.ckpt", "a.safetensors"], "mttl", "files of tensors"),
        (["a.pt", "b.pt"], "llava_mole", "one file"),
        (["experts/a/adapter_config.json"], "arrow", "must hold"),
        (["experts/a/adapter_config.json", "adapter_config.json", "adapter_model.bin"], "peft", "does not belong"),
        (["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"], "peft", "send one of them"),
        (["pytorch_model.bin", "model.safetensors"], "hf_model", "more than once"),
        (["x.safetensors"], "auto", "say which with format"),
    ):
        with store.stage() as upload:
            for name in names:
                with upload.open_part(name) as part:
                    part.write(config if name.endswith(".json") else tensors)
            with pytest.raises(AdapterRefused, match=message):
                upload.commit("a", Declared(declared))


@pytest.mark.parametrize(
    "name",
    [
        "experts/../adapter_config.json",
        "experts/a/b/adapter_config.json",
        "experts/.a/x.bin",
        "experts//adapter_config.json",
        "experts/a/modeling.py",
        "..pt",
        "a/b.pt",
        "a:b.pt",
    ],
)
def test_a_name_that_would_leave_its_folder_is_never_created(name: str, tmp_path: Path) -> None:
    with open_store(tmp_path / "store").stage() as upload:
        with pytest.raises(AdapterRefused):
            upload.open_part(name)
        assert list(upload.source.iterdir()) == []
