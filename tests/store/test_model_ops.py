"""What an adapter does outside the linear layers, and gates of whole MLPs: their form, limits and values."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.base import SITES
from adapters_store.blobs import open_image
from adapters_store.canonical import layout
from adapters_store.entries import EmbedEntry, GateEntry, KvPrefixEntry, NormEntry, PromptEntry, TokenRowsEntry
from adapters_store.errors import AdapterRefused, CorruptUpload
from adapters_store.gates import Experts, GateOptions
from adapters_store.group_gates import GroupGate
from adapters_store.manifest import Manifest, parse_manifest
from adapters_store.model_ops import (
    NORMS,
    TARGETS,
    EmbedLowrank,
    KvPrefix,
    ModelOps,
    NormWeight,
    PromptEmbeds,
    TokenRows,
)
from adapters_store.ops import Module
from adapters_store.registry import NewVersion
from tests.store.canonical_files import check, floats, ints, manifest, write
from tests.store.folders import TINY

Q, UP, DOWN = (SITES.index(site) for site in ("q_proj", "up_proj", "down_proj"))
LORA = Module(0, Q, 2, has_bias=False)
FINAL = NormWeight(-1, "norm")
GATE = GroupGate(1, 3, 1, 2.0, GateOptions(has_bias=True, weight="one"), is_ffn_moe=True)
GROUPED = tuple(Module(1, site, 0, has_bias=False, experts=GATE.experts((2, 1, 1))) for site in (UP, DOWN))
EVERYTHING = ModelOps(
    norms=(FINAL, NormWeight(0, "input_layernorm"), NormWeight(1, "q_norm")),
    token_rows=(TokenRows("embed", 3), TokenRows("lm_head", 2)),
    embed_lowrank=EmbedLowrank(2),
    kv_prefix=KvPrefix(5),
    gates=(GATE,),
)
# in the order of the image
TENSORS = [
    ("L1.mlp.G", "BF16", (3, 16)),
    ("L1.mlp.Gb", "F32", (3,)),
    ("norm", "F32", (16,)),
    ("L0.input_layernorm", "F32", (16,)),
    ("L1.q_norm", "F32", (6,)),
    ("tokens.embed.idx", "I32", (3,)),
    ("tokens.embed.E", "BF16", (3, 16)),
    ("tokens.lm_head.idx", "I32", (2,)),
    ("tokens.lm_head.E", "BF16", (2, 16)),
    ("embed.AT", "BF16", (32, 2)),
    ("embed.BT", "BF16", (2, 16)),
    ("prefix.K", "BF16", (2, 5, 2, 6)),
    ("prefix.V", "BF16", (2, 5, 2, 6)),
]


def only(**ops: object) -> Manifest:
    """Return the manifest of an adapter of these model ops alone."""
    return manifest(model_ops=ModelOps(**ops))  # type: ignore[arg-type]


def test_the_tensors_lie_behind_all_modules_and_keep_their_types() -> None:
    slots = [slot for slot in layout(GROUPED, TINY, "bfloat16", EVERYTHING) if not slot.name.startswith("pad.")]
    # experts that follow a gate have none of their own
    assert [slot.name for slot in slots[:4]] == ["L1.up.A", "L1.up.BT", "L1.down.A", "L1.down.BT"]
    assert [(slot.name, slot.dtype, slot.shape) for slot in slots[4:]] == TENSORS
    (prompt,) = (slot for slot in layout((), TINY, "bfloat16", ModelOps(prompt_embeds=PromptEmbeds(7)))[:1])
    assert (prompt.name, prompt.dtype, prompt.shape) == ("prompt.E", "BF16", (7, 16))


def test_the_manifest_spells_each_op_in_full() -> None:
    tree = json.loads(manifest(*GROUPED, model_ops=EVERYTHING, activation=(5, 6)).to_bytes())
    shared = {"in_norm": "none", "logit": "linear", "temperature": 2.0, "select": {"topk": 1}, "weight": "one"}
    own = {"source": "self", "W": "L1.mlp.G", "bias": "L1.mlp.Gb", "mix": "output", "experts": 3, "ffn_moe": True}
    assert tree["gates"] == {"layers.1.mlp": {**shared, **own}}
    (op,) = tree["modules"]["layers.1.mlp.up_proj"]
    assert op["gate"] == {**shared, "source": "group:layers.1.mlp", "mix": "output"}
    assert tree["model_ops"] == [
        {"op": "norm_weight", "norm": "norm", "weight": "norm"},
        {"op": "norm_weight", "norm": "layers.0.input_layernorm", "weight": "L0.input_layernorm"},
        {"op": "norm_weight", "norm": "layers.1.q_norm", "weight": "L1.q_norm"},
        {"op": "token_rows", "target": "embed", "count": 3, "idx": "tokens.embed.idx", "E": "tokens.embed.E"},
        {"op": "token_rows", "target": "lm_head", "count": 2, "idx": "tokens.lm_head.idx", "E": "tokens.lm_head.E"},
        {"op": "embed_lowrank", "rank": 2, "AT": "embed.AT", "BT": "embed.BT"},
        {"op": "kv_prefix", "count": 5, "K": "prefix.K", "V": "prefix.V"},
    ]


def test_invocation_tokens_are_said_only_where_there_are_any() -> None:
    tree = json.loads(manifest(LORA, activation=(7, 0, 31)).to_bytes())
    assert tree["activation"] == {"mode": "from_last_match", "tokens": [7, 0, 31]}
    plain = json.loads(manifest(LORA).to_bytes())
    assert not plain.keys() & {"activation", "gates", "model_ops", "experts"}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_all_model_ops_read_back_from_their_manifest(data: st.DataObject) -> None:
    norms = data.draw(st.sets(st.builds(NormWeight, st.integers(0, 1), st.sampled_from(NORMS))))
    norms |= {FINAL} if data.draw(st.booleans()) else set()
    targets = data.draw(st.sampled_from([(), ("both",), *((target,) for target in TARGETS), ("embed", "lm_head")]))
    options = GateOptions(has_bias=data.draw(st.booleans()), select_all=data.draw(st.booleans()))
    gate = GroupGate(1, 3, 3 if options.select_all else 2, 1.0, options, is_ffn_moe=data.draw(st.booleans()))
    prompt = data.draw(st.sampled_from([{}, {"prompt_embeds": PromptEmbeds(3)}, {"kv_prefix": KvPrefix(4)}]))
    ops = ModelOps(
        norms=tuple(sorted(norms)),
        token_rows=tuple(TokenRows(target, data.draw(st.integers(1, 8))) for target in targets),
        embed_lowrank=EmbedLowrank(3) if data.draw(st.booleans()) else None,
        gates=(gate,),
        **prompt,  # type: ignore[arg-type]
    )
    made = manifest(Module(1, UP, 0, has_bias=False, experts=gate.experts((1, 2, 3))), model_ops=ops)
    assert parse_manifest(made.to_bytes()) == made
    assert made.num_virtual_tokens == (3 if ops.prompt_embeds else 4 if ops.kv_prefix else 0)


def test_entries_and_version_say_what_there_is(tmp_path: Path) -> None:
    made = write(tmp_path / "new", manifest(*GROUPED, model_ops=EVERYTHING))
    (tmp_path / "new").rename(tmp_path / made.digest())
    image = open_image(tmp_path, made.digest())
    at = {slot.name: slot.begin for slot in layout(GROUPED, TINY, "float32", EVERYTHING)}
    model = image.model
    assert model.norms == tuple(NormEntry(norm.layer, norm.norm, at[norm.tensor]) for norm in EVERYTHING.norms)
    assert model.token_rows == (
        TokenRowsEntry("embed", 3, at["tokens.embed.idx"], at["tokens.embed.E"]),
        TokenRowsEntry("lm_head", 2, at["tokens.lm_head.idx"], at["tokens.lm_head.E"]),
    )
    assert model.embed_lowrank == EmbedEntry(2, at["embed.AT"], at["embed.BT"])
    assert model.kv_prefix == KvPrefixEntry(5, at["prefix.K"], at["prefix.V"])
    assert model.gates == (
        GateEntry("layers.1.mlp", 1, 3, 1, 2.0, GATE.options, True, at["L1.mlp.G"], at["L1.mlp.Gb"]),
    )
    assert [entry.gate.group for entry in image.entries] == ["layers.1.mlp"] * 2
    assert [(entry.gate_offset, entry.a_offset) for entry in image.entries] == [(None, 0), (None, at["L1.down.A"])]
    assert (image.num_virtual_tokens, image.activation, model.head) == (5, (), None)
    version = NewVersion.of("a", replace(made, activation=(3,)), created=0)
    assert (version.num_virtual_tokens, version.invocation_tokens) == (5, (3,))
    norms = ("norm", "layers.0.input_layernorm", "layers.1.q_norm")
    assert version.report.applied[2:] == (*norms, "embed_tokens", "lm_head", "kv_prefix")


def test_a_prompt_alone_is_an_adapter(tmp_path: Path) -> None:
    made = write(tmp_path / "new", only(prompt_embeds=PromptEmbeds(7)))
    (tmp_path / "new").rename(tmp_path / made.digest())
    image = open_image(tmp_path, made.digest())
    assert (image.entries, image.rank, image.num_virtual_tokens) == ((), 0, 7)
    assert image.model.prompt_embeds == PromptEntry(7, 0)


@pytest.mark.parametrize(
    ("made", "code", "message"),
    [
        (only(norms=(NormWeight(2, "q_norm"),)), "corrupt_adapter", "layers.2.q_norm is no norm of a base of 2"),
        (only(norms=(NormWeight(0, "other_norm"),)), "corrupt_adapter", "layers.0.other_norm is no norm"),
        (only(norms=(NormWeight(-1, "q_norm"),)), "corrupt_adapter", "q_norm is no norm"),
        (only(norms=(NormWeight(0, "norm"),)), "corrupt_adapter", "layers.0.norm is no norm"),
        (only(norms=(FINAL, FINAL)), "corrupt_adapter", "norm is replaced twice"),
        (only(token_rows=(TokenRows("embed", 9),)), "limit_exceeded", "selects 9 of 32; the limit is 8"),
        (only(token_rows=(TokenRows("embed", 0),)), "corrupt_adapter", "replace 0 rows"),
        (only(token_rows=(TokenRows("head", 1),)), "corrupt_adapter", "'head'"),
        (only(token_rows=(TokenRows("embed", 1), TokenRows("embed", 2))), "corrupt_adapter", "embed is replaced twice"),
        (only(token_rows=(TokenRows("both", 1), TokenRows("embed", 2))), "corrupt_adapter", "exclude all others"),
        (only(embed_lowrank=EmbedLowrank(0)), "corrupt_adapter", "no rank"),
        (only(prompt_embeds=PromptEmbeds(4097)), "limit_exceeded", "4097 tokens; the limit is 4096"),
        (only(prompt_embeds=PromptEmbeds(0)), "corrupt_adapter", "no tokens"),
        (only(kv_prefix=KvPrefix(-1)), "corrupt_adapter", "no tokens"),
        (only(prompt_embeds=PromptEmbeds(1), kv_prefix=KvPrefix(1)), "corrupt_adapter", "not both"),
        (only(), "corrupt_adapter", "out of range"),
        (manifest(LORA, activation=(32,)), "corrupt_adapter", "vocabulary, 0 to 31"),
        (manifest(LORA, activation=(0, -1)), "corrupt_adapter", "vocabulary, 0 to 31"),
        (manifest(LORA, activation=(1,) * 257), "limit_exceeded", "257 tokens.*limit is 256"),
        (
            manifest(LORA, model_ops=ModelOps(prompt_embeds=PromptEmbeds(1)), activation=(1,)),
            "corrupt_adapter",
            "acts from the first position",
        ),
    ],
)
def test_each_limit_has_a_code_and_a_message(made: Manifest, code: str, message: str) -> None:
    with pytest.raises(AdapterRefused, match=message) as refusal:
        parse_manifest(made.to_bytes())
    assert refusal.value.code == code


@pytest.mark.parametrize(
    "made",
    [
        only(norms=(FINAL,)),
        only(token_rows=(TokenRows("both", 8),)),
        only(token_rows=(TokenRows("embed", 1), TokenRows("lm_head", 1))),
        only(prompt_embeds=PromptEmbeds(4096)),
        only(kv_prefix=KvPrefix(1)),
        manifest(LORA, activation=(31,) * 256),
    ],
)
def test_the_nearest_neighbour_within_each_limit_is_taken(made: Manifest) -> None:
    assert parse_manifest(made.to_bytes()) == made


def gated(gate: GroupGate = GATE, *modules: Module) -> Manifest:
    """Return an adapter of one MLP's gate and the modules that follow it."""
    return manifest(*(modules or GROUPED), model_ops=ModelOps(gates=(gate,)))


@pytest.mark.parametrize(
    ("made", "code", "message"),
    [
        (gated(GATE, LORA), "corrupt_adapter", "layers.1.mlp weighs nothing"),
        (manifest(*GROUPED), "corrupt_adapter", "up_proj follows a gate that is not its MLP's"),
        (gated(GATE, replace(GROUPED[0], layer=0)), "corrupt_adapter", "layers.0.mlp.up_proj follows a gate"),
        (gated(GATE, replace(GROUPED[0], site_index=Q)), "corrupt_adapter", "q_proj follows a gate"),
        (gated(replace(GATE, temperature=1.0)), "corrupt_adapter", "up_proj follows a gate"),
        (gated(replace(GATE, options=GateOptions())), "corrupt_adapter", "up_proj follows a gate"),
        (
            gated(GATE, replace(GROUPED[0], experts=GATE.experts((1, 1)))),
            "corrupt_adapter",
            "has 2 experts; the gate of its MLP weighs 3",
        ),
        (gated(replace(GATE, layer=0)), "corrupt_adapter", "layers.1.mlp.up_proj follows a gate"),
    ],
)
def test_a_gate_and_its_followers_must_agree(made: Manifest, code: str, message: str) -> None:
    with pytest.raises(AdapterRefused, match=message) as refusal:
        parse_manifest(made.to_bytes())
    assert refusal.value.code == code
    parse_manifest(gated().to_bytes())


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"options": GateOptions(mix="rank")}, "corrupt_adapter", "mixes ranks of MLPs"),
        ({"options": GateOptions(in_norm="rms")}, "invalid_gate", "in_norm 'rms'"),
        ({"temperature": 0.0}, "invalid_gate", "temperature 0"),
        ({"top_k": 4}, "invalid_gate", "allows 1 to 3"),
        ({"num_experts": 129}, "limit_exceeded", "129 experts; the limit is 128"),
    ],
)
def test_the_gate_of_an_mlp_has_the_limits_of_every_gate(changes: dict[str, object], code: str, message: str) -> None:
    gate = replace(GATE, **changes)  # type: ignore[arg-type]
    with pytest.raises(AdapterRefused, match=message) as refusal:
        parse_manifest(gated(gate, Module(1, UP, 0, False, gate.experts((1,) * gate.num_experts))).to_bytes())
    assert refusal.value.code == code


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model_ops", 0, "weight"), "L0.input_layernorm"),
        (("model_ops", 1, "norm"), "layers.00.input_layernorm"),
        (("model_ops", 3, "count"), 3.0),
        (("model_ops", 3, "E"), "tokens.lm_head.E"),
        (("model_ops", 5, "rank"), True),
        (("model_ops", 5, "op"), "pos_embeds"),
        (("model_ops", 6, "V"), "prefix.K"),
        (("model_ops",), {}),
        (("gates", "layers.1.mlp", "experts"), "3"),
        (("gates", "layers.1.mlp", "experts"), 1 << 40),
        (("gates", "layers.1.mlp", "ffn_moe"), 1),
        (("gates", "layers.1.mlp", "W"), "L0.mlp.G"),
        (("gates", "layers.1.mlp", "source"), "group:layers.0.mlp"),
        (("activation", "mode"), "always"),
        (("activation", "tokens"), [5, True]),
        (("activation", "tokens"), []),
    ],
)
def test_a_manifest_with_one_wrong_value_is_refused(path: tuple[str | int, ...], value: object) -> None:
    made = manifest(*GROUPED, model_ops=EVERYTHING)
    tree = json.loads(made.to_bytes())
    tree["activation"] = {"mode": "from_last_match", "tokens": [5]}
    node = tree
    for key in path[:-1]:
        node = node[key]
    assert path[-1] in node or isinstance(path[-1], int)
    node[path[-1]] = value
    with pytest.raises(CorruptUpload):
        parse_manifest(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())


def test_two_ops_of_one_kind_are_refused() -> None:
    tree = json.loads(only(prompt_embeds=PromptEmbeds(2)).to_bytes())
    tree["model_ops"].append({"op": "prompt_embeds", "count": 2, "E": "prompt.E"})
    with pytest.raises(CorruptUpload):
        parse_manifest(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize("token_ids", [(0, 32, 33), (-1, 0, 1), (0, 2, 1), (4, 4, 5)])
def test_token_ids_out_of_order_or_vocabulary_are_refused(token_ids: tuple[int, ...], tmp_path: Path) -> None:
    made = only(token_rows=(TokenRows("both", 3),))
    check(tmp_path / "good", made, {"tokens.both.idx": ints(0, 5, 31)})
    with pytest.raises(AdapterRefused, match=r"tokens\.both\.idx") as refusal:
        check(tmp_path / "bad", made, {"tokens.both.idx": ints(*token_ids)})
    assert refusal.value.code == "invalid_index"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_of_every_op_must_be_finite(value: float, tmp_path: Path) -> None:
    made = manifest(*GROUPED, model_ops=EVERYTHING)
    whole = [spec for spec in EVERYTHING.tensors(TINY) if spec.index_limit is None]
    for number, spec in enumerate(whole):
        raw = floats(*[0.5] * (int(np.prod(spec.shape)) - 1), value)
        with pytest.raises(AdapterRefused, match=spec.name) as refusal:
            check(tmp_path / str(number), made, {spec.name: raw})
        assert refusal.value.code == "non_finite"


def test_what_certainly_does_nothing_is_refused(tmp_path: Path) -> None:
    embed = only(embed_lowrank=EmbedLowrank(1))
    check(tmp_path / "acts", embed)
    for number, tensor in enumerate(("AT", "BT")):
        raw = floats(*[0.0] * (32 if tensor == "AT" else 16))
        with pytest.raises(AdapterRefused) as refusal:
            check(tmp_path / str(number), embed, {f"embed.{tensor}": raw})
        assert refusal.value.code == "adapter_no_effect"
    # a prompt takes attention whatever it holds, and only the base knows whether a norm is its own
    check(tmp_path / "prompt", only(prompt_embeds=PromptEmbeds(1)), {"prompt.E": floats(*[0.0] * 16)})
    check(tmp_path / "norm", only(norms=(FINAL,)), {"norm": floats(*[1.0] * 16)})


def test_the_rank_limit_holds_for_the_embedding(tmp_path: Path) -> None:
    check(tmp_path / "fits", only(embed_lowrank=EmbedLowrank(16)))
    with pytest.raises(AdapterRefused, match="rank 17"):
        check(tmp_path / "beyond", only(embed_lowrank=EmbedLowrank(17)))


def test_mixtures_may_have_fewer_experts_in_some_layers() -> None:
    layers = [Module(layer, Q, 0, False, Experts((1,) * width, 1, 1.0)) for layer, width in enumerate((2, 4))]
    made = manifest(*layers)
    assert parse_manifest(made.to_bytes()) == made
    with pytest.raises(CorruptUpload, match=r"names 2 experts but its gates have \[2, 4\]"):
        parse_manifest(replace(made, experts=("0", "1")).to_bytes())
