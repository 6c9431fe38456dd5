"""Entries of model ops on their way into the kernels: every field arrives, and what cannot be served is refused."""

from dataclasses import asdict, fields, replace

import pytest
import torch
from torch import Tensor

from adapter_kernels.gate_options import GateOptions as KernelGate
from adapter_kernels.image import AdapterImage, ImageError
from adapter_kernels.model_image import ModelImage
from adapter_kernels.model_rows import (
    EmbedRow,
    GateRow,
    HeadRow,
    ModelRows,
    NormRow,
    PrefixRow,
    PromptRow,
    TokenRow,
)
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
from adapters_store.store import OpenAdapter
from serve.engine.model_rows import model_rows, refuse_model_ops
from tests.engine.arena_adapters import BASE
from tests.kernels.model_adapters import HEAD_DIM, HIDDEN, KV_HEADS, LAYERS, SHAPES, VOCAB

FULL = ModelEntries(
    head=SiteEntry(-1, "lm_head", (2,), 128, 256, 384),
    norms=(NormEntry(1, "q_norm", 512),),
    token_rows=(TokenRowsEntry("both", 3, 640, 768),),
    embed_lowrank=EmbedEntry(2, 896, 1024),
    prompt_embeds=PromptEntry(4, 1152),
    kv_prefix=KvPrefixEntry(5, 1280, 1408),
    gates=(GateEntry("layers.1.mlp", 1, 3, 2, 0.5, GateOptions("unit", "abs", weight="one"), True, 1536, 1664),),
)
ROWS = ModelRows(
    norms=(NormRow(1, "q_norm", 512),),
    token_rows=(TokenRow("both", 3, 640, 768),),
    embed_lowrank=EmbedRow(2, 896, 1024),
    prompt_embeds=PromptRow(4, 1152),
    kv_prefix=PrefixRow(5, 1280, 1408),
    gates=(GateRow(1, 3, 2, 0.5, 1536, 1664, KernelGate("unit", "abs", "one"), True),),
    head=HeadRow(2, 128, 256, 384),
)
# one piece of memory for every tensor of these tests, all ones: no offset within it is unaligned
NUM_BYTES = 4 * VOCAB * HIDDEN


def adapter(model: ModelEntries) -> OpenAdapter:
    return OpenAdapter("0" * 64, "float32", 4, 1024, BASE, memoryview(bytes(1024)), (), model=model)


def image(rows: ModelRows, data: Tensor | None = None, dtype: torch.dtype = torch.float32) -> ModelImage:
    stored = torch.ones(NUM_BYTES // 4).view(torch.uint8) if data is None else data
    return ModelImage(AdapterImage(stored, dtype, (), {}), rows, SHAPES)


def test_every_field_is_copied() -> None:
    assert all(value not in (None, ()) for value in asdict(FULL).values())
    assert {field.name for field in fields(ModelRows)} == {field.name for field in fields(ModelEntries)}
    assert model_rows(adapter(FULL)) == ROWS
    assert model_rows(adapter(ModelEntries())) is None


@pytest.mark.parametrize("name", [field.name for field in fields(ModelEntries)])
def test_a_device_refuses_each_op_by_name(name: str) -> None:
    refuse_model_ops(adapter(ModelEntries()))
    with pytest.raises(ImageError, match=r"the adapter changes .* serve it with --device cpu"):
        refuse_model_ops(adapter(replace(ModelEntries(), **{name: getattr(FULL, name)})))


REFUSED = {
    "a norm that the base lacks": (ModelRows(norms=(NormRow(0, "k_norm", 0),)), "replaces layers.0.k_norm; of this"),
    "a last norm in a layer": (ModelRows(norms=(NormRow(0, "norm", 0),)), "replaces layers.0.norm"),
    "a layer's norm at the end": (ModelRows(norms=(NormRow(-1, "q_norm", 0),)), "replaces q_norm"),
    "a norm behind the end": (ModelRows(norms=(NormRow(0, "q_norm", NUM_BYTES),)), "do not fit"),
    "rows behind the end": (ModelRows(prompt_embeds=PromptRow(VOCAB + 1, 0)), "do not fit"),
    "an unaligned prefix": (ModelRows(kv_prefix=PrefixRow(1, 2, 0)), "do not fit"),
    "a prompt and a prefix": (ModelRows(prompt_embeds=PromptRow(1, 0), kv_prefix=PrefixRow(1, 0, 0)), "both"),
    "an unknown target": (ModelRows(token_rows=(TokenRow("head", 1, 0, 0),)), "'head'"),
    "two targets too many": (
        ModelRows(token_rows=(TokenRow("both", 1, 0, 0), TokenRow("embed", 1, 0, 0))),
        r"\['both', 'embed'\]",
    ),
    "a token id too large": (ModelRows(token_rows=(TokenRow("embed", 1, 0, 0),)), f"increasing below {VOCAB}"),
    "more chosen than there are": (ModelRows(gates=(GateRow(0, 2, 3, 1.0, 0),)), "chooses 3 of 2"),
    "a gate of no temperature": (ModelRows(gates=(GateRow(0, 2, 1, 0.0, 0),)), "temperature 0.0"),
    "an unknown gate": (ModelRows(gates=(GateRow(0, 2, 1, 1.0, 0, options=KernelGate(weight="best")),)), "best"),
    "MLPs mixed by rank": (
        ModelRows(gates=(GateRow(0, 2, 1, 1.0, 0, options=KernelGate(mix="rank"), is_ffn_moe=True),)),
        "mix='rank'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_that_does_not_fit_is_refused(case: str) -> None:
    rows, message = REFUSED[case]
    with pytest.raises(ImageError, match=message):
        image(rows).read(torch.float32)


@pytest.mark.parametrize("ids", [[3, 3], [4, 2], [-1, 2], [0, VOCAB]])
def test_token_ids_must_increase_within_the_vocabulary(ids: list[int]) -> None:
    data = torch.zeros(NUM_BYTES, dtype=torch.uint8)
    data[:8] = torch.tensor(ids, dtype=torch.int32).view(torch.uint8)
    rows = ModelRows(token_rows=(TokenRow("lm_head", 2, 0, 128),))
    with pytest.raises(ImageError, match="increasing"):
        image(rows, data).read(torch.float32)
    data[:8] = torch.tensor([0, VOCAB - 1], dtype=torch.int32).view(torch.uint8)
    found = image(rows, data).read(torch.float32)
    assert found.head_rows is not None and found.head_rows.idx.tolist() == [0, VOCAB - 1] and found.embed_rows is None


def test_tensors_are_copies_of_the_right_shape_and_type() -> None:
    rows = ModelRows(
        norms=(NormRow(-1, "norm", 0), NormRow(1, "q_norm", 128)),
        embed_lowrank=EmbedRow(2, 0, 0),
        kv_prefix=PrefixRow(3, 0, 128),
        gates=(GateRow(1, 3, 2, 0.5, 128, 256),),
        head=HeadRow(2, 0, 128, 0),
    )
    data = torch.ones(NUM_BYTES // 2, dtype=torch.float16).view(torch.uint8)
    found = image(rows, data, torch.float16).read(torch.bfloat16)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.weights()}
    assert shapes["norm"] == ((HIDDEN,), torch.float32) and shapes["layers.1.q_norm"] == ((HEAD_DIM,), torch.float32)
    assert shapes["embed_tokens"] == ((2, HIDDEN), torch.bfloat16)
    assert shapes["the prefix"] == ((LAYERS, 3, KV_HEADS, HEAD_DIM), torch.bfloat16)
    assert shapes["layers.1.mlp"] == ((3,), torch.float32) and shapes["lm_head"] == ((VOCAB,), torch.bfloat16)
    assert found.num_virtual_tokens == 3 and found.num_bytes == sum(tensor.nbytes for _, tensor in found.weights())
    data.zero_()
    assert all(bool((tensor != 0).all()) for _, tensor in found.weights())
