"""Exported adapters, read by PEFT and by transformers, answer as the server does."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import peft
import pytest
from torch import nn

from adapters_store.base import SITES
from adapters_store.export.canonical_reader import open_canonical
from adapters_store.export.to_hf_model import export_hf_model
from adapters_store.export.to_peft import export_peft
from adapters_store.model_ops import EmbedLowrank, ModelOps, NormWeight, TokenRows
from adapters_store.ops import Csr, Module, head_module
from tests.engine.test_imported_checkpoints import TOLERANCE, Served, expected_logprobs, read_model
from tests.store import canonical_files
from tests.store.folders import lora_config, lora_tensors, write_folder
from tests.store.tiny_checkpoints import GQA, MHA, S2ft, s2ft_checkpoint, write_checkpoint


def read_peft(served: Served, folder: Path) -> nn.Module:
    model: nn.Module = peft.PeftModel.from_pretrained(read_model(served.base.folder), folder)
    return model.eval()


def object_of(served: Served, digest: str) -> Path:
    return served.root / "store" / "objects" / digest


@pytest.mark.parametrize("kind", ["lora", "s2ft"])
def test_peft_answers_with_an_exported_adapter_as_the_server_does(kind: str, tmp_path: Path) -> None:
    with closing(Served(tmp_path, GQA if kind == "lora" else MHA)) as served:
        if kind == "lora":
            config = lora_config(rank_pattern={"o_proj": 3}, target_modules=["q_proj", "o_proj", "up_proj"])
            tensors = lora_tensors(sites=("q_proj", "up_proj")) | lora_tensors(sites=("o_proj",), rank=3, seed=3)
            source = write_folder(tmp_path / "source", config, tensors)
        else:
            chosen = S2ft(v=[[2], []], o=[[1], [3]], up=[[5, 20], []], down=[[20, 3, 7], []])
            source = served.write(tmp_path / "source", s2ft_checkpoint(served.base, chosen)[0])
        digest = served.store.put_dir("a", source).digest
        base, adapted = served.logprobs(digest)
        with open_canonical(object_of(served, digest)) as adapter:
            export_peft(adapter, tmp_path / "out")
        expected = expected_logprobs(read_peft(served, tmp_path / "out"))
    assert adapted == pytest.approx(expected, abs=TOLERANCE)
    assert max(abs(a - b) for a, b in zip(base, expected, strict=True)) > 0.01


def every_static_op() -> tuple[tuple[Module, ...], ModelOps]:
    """One adapter with everything that a fixed weight can say."""
    index = {site: SITES.index(site) for site in SITES}
    modules = (
        Module(0, index["q_proj"], 2, has_bias=False, has_out_scale=True, has_in_scale=True, blockdiag=4),
        Module(0, index["k_proj"], 0, has_bias=False, rot2_group=4),
        Module(0, index["v_proj"], 0, has_bias=False, rows=3),
        Module(0, index["down_proj"], 1, has_bias=False, cols=5, has_out_scale=True),
        Module(1, index["o_proj"], 0, has_bias=False, csr=Csr(24, is_ternary=True)),
        Module(1, index["gate_proj"], 0, has_bias=False, csr=Csr(32, is_ternary=False)),
        Module(1, index["up_proj"], 0, has_bias=False, has_dense=True),
        head_module(2),
    )
    ops = ModelOps(
        norms=(NormWeight(-1, "norm"), NormWeight(0, "input_layernorm")),
        token_rows=(TokenRows("embed", 3),),
        embed_lowrank=EmbedLowrank(2),
    )
    return modules, ops


def in_float32(served: Served, folder: Path) -> Path:
    """Write the base once more: merged weights are rounded to the base's dtype, which bfloat16 would show."""
    config = json.loads((served.base.folder / "config.json").read_text())
    return write_checkpoint(folder, served.base.weights, "F32", **config | {"torch_dtype": "float32"})


def test_transformers_answers_with_a_merged_model_as_the_server_does(tmp_path: Path) -> None:
    modules, ops = every_static_op()
    random = np.random.default_rng(0)
    with closing(Served(tmp_path, GQA)) as served:
        dims = served.base.dims
        specs = [spec for module in modules for spec in module.tensors(dims)] + ops.tensors(dims)
        changes = {
            spec.name: (random.standard_normal(spec.shape) / 4).astype("<f4").tobytes()
            for spec in specs
            if spec.index_limit is None and not spec.is_bits and not spec.name.endswith("in_blockdiag")
        }
        changes["L1.o.csr.sign"] = b"\x5a\x0f\x31"
        made = canonical_files.manifest(*modules, model_ops=ops, base=dims)
        digest = canonical_files.write(tmp_path / "one", made, changes).digest()
        (tmp_path / "one").rename(object_of(served, digest))
        base, adapted = served.logprobs(digest)
        with open_canonical(object_of(served, digest)) as adapter:
            export_hf_model(adapter, tmp_path / "out", base_dir=in_float32(served, tmp_path / "base32"))
        expected = expected_logprobs(read_model(tmp_path / "out"))
    assert adapted == pytest.approx(expected, abs=TOLERANCE)
    assert max(abs(a - b) for a, b in zip(base, expected, strict=True)) > 0.01
