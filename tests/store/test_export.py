"""Exports of canonical adapters: back again bit by bit, or refused with a way out."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters_store.base import SITES
from adapters_store.convert.dispatch import convert
from adapters_store.convert.options import ConvertOptions
from adapters_store.errors import AdapterCorrupt, CorruptUpload, StoreError, WrongBase
from adapters_store.export.canonical_reader import open_canonical
from adapters_store.export.tensor_writer import CannotExport
from adapters_store.export.to_hf_model import export_hf_model
from adapters_store.export.to_meteora import export_meteora
from adapters_store.export.to_peft import export_peft
from adapters_store.formats import Declared
from adapters_store.gates import Experts, GateOptions
from adapters_store.model_ops import KvPrefix, ModelOps, NormWeight, PromptEmbeds, TokenRows
from adapters_store.ops import Csr, Module
from adapters_store.strict_json import Json
from tests.store import canonical_files
from tests.store.folders import TINY, lora_config, lora_tensors, read_tensors, write_folder
from tests.store.tiny_checkpoints import MHA, S2ft, TinyBase, meteora_checkpoint, mixture, s2ft_checkpoint
from tests.store.tiny_checkpoints import write_checkpoint as write_model

GATED = Experts((2, 3), top_k=1, temperature=1.0)


def converted(source: Path, target: Path, options: ConvertOptions) -> Path:
    target.mkdir()
    convert(source, target, options)
    return target


def image(folder: Path) -> bytes:
    return (folder / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_lora_goes_to_peft_and_back_bit_by_bit(dtype: str, tmp_path: Path) -> None:
    tensors = lora_tensors(sites=("q_proj", "up_proj"), rank=2) | lora_tensors(sites=("down_proj",), rank=3, seed=5)
    config = lora_config(target_modules=["q_proj", "up_proj", "down_proj"], rank_pattern={"down_proj": 3})
    options = ConvertOptions(TINY, dtype, 16)
    first = converted(write_folder(tmp_path / "peft", config, tensors), tmp_path / "one", options)
    with open_canonical(first) as adapter:
        export_peft(adapter, tmp_path / "out")
    assert image(converted(tmp_path / "out", tmp_path / "two", options)) == image(first)


def test_a_lora_without_scaling_comes_back_as_it_was_sent(tmp_path: Path) -> None:
    tensors = lora_tensors(bias=True)
    sent = write_folder(tmp_path / "peft", lora_config(lora_alpha=2, lora_bias=True), tensors)
    with open_canonical(converted(sent, tmp_path / "one", ConvertOptions(TINY, "float32", 16))) as adapter:
        export_peft(adapter, tmp_path / "out")
    assert read_tensors(tmp_path / "out" / "adapter_model.safetensors") == tensors


def test_s2ft_becomes_a_lora_of_its_selection_with_the_same_delta(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", MHA)
    chosen = S2ft(v=[[2], []], o=[[1], [3]], up=[[5, 20], []], down=[[20, 3, 7], []])
    weights, trained = s2ft_checkpoint(base, chosen)
    options = ConvertOptions(base.dims, "float32", 16, base_dir=str(base.folder))
    folder = converted(write_model(tmp_path / "ft", weights), tmp_path / "one", options)
    with open_canonical(folder) as adapter:
        export_peft(adapter, tmp_path / "out")
    found = read_tensors(tmp_path / "out" / "adapter_model.safetensors")
    assert len(found) == 2 * len(trained)
    for (layer, site), delta in trained.items():
        factors = []
        for kind in ("A", "B"):
            part = "mlp" if site in ("up_proj", "down_proj") else "self_attn"
            _, shape, raw = found[f"base_model.model.model.layers.{layer}.{part}.{site}.lora_{kind}.weight"]
            factors.append(np.frombuffer(raw, "<f4").reshape(shape))
        a, b = factors
        assert (b @ a == delta).all() and a.shape[0] == b.shape[1] < min(delta.shape)


@pytest.mark.parametrize("with_base", [True, False])
def test_meteora_goes_to_its_official_layout_and_back_bit_by_bit(with_base: bool, tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    made = mixture(base.dims, (2, 3), ("q_proj", "down_proj"))
    checkpoint = meteora_checkpoint(base, made)
    sent: dict[str, Json] = {"top_k": 2, "temperature": 0.5, "rank": [2, 3], "alpha": [2, 3], "experts": ["a", "b"]}
    options = ConvertOptions(base.dims, "float32", 16, base_dir=str(base.folder), declared=Declared("meteora", sent))
    folder = converted(write_model(tmp_path / "ft", checkpoint, "F32"), tmp_path / "one", options)
    with open_canonical(folder) as adapter:
        export_meteora(adapter, tmp_path / "out", base_dir=base.folder if with_base else None)
    found = read_tensors(tmp_path / "out" / "model.safetensors")
    for name, (dtype, shape, raw) in found.items():
        values = np.frombuffer(raw, "<f4") if dtype == "F32" else np.frombuffer(raw, "<u2").astype("<u4") << 16
        assert (values.view("<f4").reshape(shape) == checkpoint[name]).all(), name
    assert len(found) == (len(checkpoint) if with_base else 3 * len(made.gates))
    told = json.loads((tmp_path / "out" / "options.json").read_text())
    assert told == sent
    (tmp_path / "out" / "options.json").unlink()
    again = replace(options, declared=Declared("meteora", told))
    assert image(converted(tmp_path / "out", tmp_path / "two", again)) == image(folder)


PLAIN = Module(0, 0, 2, has_bias=False)
NOT_A_LORA = {
    "out_scale": (replace(PLAIN, has_out_scale=True), "hf_model"),
    "in_scale": (replace(PLAIN, has_in_scale=True), "hf_model"),
    "a sparse delta": (replace(PLAIN, csr=Csr(4, is_ternary=False)), "hf_model"),
    "in_blockdiag": (replace(PLAIN, blockdiag=4), "hf_model"),
    "out_rot2": (replace(PLAIN, rot2_group=4), "hf_model"),
    "a bias and no low rank": (Module(0, 0, 0, has_bias=True), "hf_model"),
    "a gated mixture": (Module(0, 0, 0, has_bias=False, experts=GATED), "meteora"),
}


@pytest.mark.parametrize("what", NOT_A_LORA)
def test_what_no_lora_equals_is_refused_with_the_way_out(what: str, tmp_path: Path) -> None:
    module, way_out = NOT_A_LORA[what]
    canonical_files.write(tmp_path / "one", canonical_files.manifest(module))
    with open_canonical(tmp_path / "one") as adapter, pytest.raises(CannotExport) as refusal:
        export_peft(adapter, tmp_path / "out")
    assert what in refusal.value.message and way_out in refusal.value.message
    assert not (tmp_path / "out").exists()


MODEL_OPS = {
    "norm": ModelOps(norms=(NormWeight(-1, "norm"),)),
    "embed_tokens": ModelOps(token_rows=(TokenRows("embed", 2),)),
    "prompt_embeds": ModelOps(prompt_embeds=PromptEmbeds(2)),
    "kv_prefix": ModelOps(kv_prefix=KvPrefix(2)),
}


@pytest.mark.parametrize("what", MODEL_OPS)
def test_what_acts_outside_linear_layers_is_no_lora(what: str, tmp_path: Path) -> None:
    canonical_files.write(tmp_path / "one", canonical_files.manifest(PLAIN, model_ops=MODEL_OPS[what]))
    with open_canonical(tmp_path / "one") as adapter, pytest.raises(CannotExport, match=what):
        export_peft(adapter, tmp_path / "out")


def layers(**options: object) -> tuple[Module, ...]:
    return tuple(Module(layer, 0, 0, has_bias=False, experts=replace(GATED, **options)) for layer in (0, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ((PLAIN,), "same gated experts"),
        (layers(gate=GateOptions(weight="sigmoid")), "do not weigh"),
        (tuple(replace(module, has_bias=True) for module in layers()), "more than a gated mixture"),
        (layers()[:1], "in every layer"),
    ],
)
def test_what_is_no_meteora_bundle_is_refused(modules: tuple[Module, ...], reason: str, tmp_path: Path) -> None:
    canonical_files.write(tmp_path / "one", canonical_files.manifest(*modules))
    with open_canonical(tmp_path / "one") as adapter, pytest.raises(CannotExport, match=reason):
        export_meteora(adapter, tmp_path / "out", base_dir=None)


@pytest.mark.parametrize(
    ("module", "model_ops", "activation", "reason"),
    [
        (PLAIN, ModelOps(), (3,), "invocation tokens"),
        (PLAIN, ModelOps(prompt_embeds=PromptEmbeds(2)), (), "2 positions"),
        (Module(0, 0, 0, has_bias=False, experts=GATED), ModelOps(), (), "per token"),
        (replace(PLAIN, has_bias=True), ModelOps(), (), "q_proj.bias"),
        (PLAIN, ModelOps(norms=(NormWeight(0, "q_norm"),)), (), "q_norm"),
    ],
)
def test_what_no_fixed_weight_says_is_refused(
    module: Module, model_ops: ModelOps, activation: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    base = TinyBase.write(tmp_path / "base", replace(TINY, tie_word_embeddings=False))
    write_dims(base)
    made = canonical_files.manifest(module, model_ops=model_ops, activation=activation, base=base.dims)
    canonical_files.write(tmp_path / "one", made)
    with open_canonical(tmp_path / "one") as adapter, pytest.raises(CannotExport, match=reason) as refusal:
        export_hf_model(adapter, tmp_path / "out", base_dir=base.folder)
    assert "canonical" in refusal.value.message and not (tmp_path / "out").exists()


def write_dims(base: TinyBase) -> None:
    config = json.loads((base.folder / "config.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    (base.folder / "config.json").write_text(
        json.dumps(config | {name: getattr(base.dims, name) for name in (*names, "head_dim")})
    )


def test_a_merged_model_needs_the_base_of_the_adapter(tmp_path: Path) -> None:
    base = TinyBase.write(tmp_path / "base", TINY)
    write_dims(base)
    other = canonical_files.manifest(PLAIN, base=replace(base.dims, weights_fingerprint="sha256:" + "1" * 64))
    canonical_files.write(tmp_path / "one", replace(other, base_dependent=True))
    with open_canonical(tmp_path / "one") as adapter:
        with pytest.raises(WrongBase, match="dimensions or weights"):
            export_hf_model(adapter, tmp_path / "out", base_dir=base.folder)
        with pytest.raises(WrongBase, match="no model"):
            export_hf_model(adapter, tmp_path / "out", base_dir=tmp_path)


def test_damaged_files_and_full_folders_are_refused(good_folder: Path, tmp_path: Path) -> None:
    folder = converted(good_folder, tmp_path / "one", ConvertOptions(TINY, "float32", 16))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with open_canonical(folder) as adapter, pytest.raises(CannotExport, match="not an empty folder"):
        export_peft(adapter, tmp_path / "full")
    raw = bytearray(image(folder))
    raw[-200] ^= 1
    (folder / "adapter.safetensors").write_bytes(raw)
    for path, kind in ((folder, AdapterCorrupt), (good_folder, CorruptUpload)):
        error: type[StoreError] = kind
        with pytest.raises(error), open_canonical(path):
            pass


def test_every_site_name_of_an_export_is_pefts(tmp_path: Path) -> None:
    canonical_files.write(
        tmp_path / "one", canonical_files.manifest(*(Module(0, index, 1, has_bias=False) for index in range(7)))
    )
    with open_canonical(tmp_path / "one") as adapter:
        export_peft(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(name.rpartition(".")[2] for name in config["target_modules"]) == sorted(SITES)
