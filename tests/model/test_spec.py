"""What a config says and what is refused: both spellings of rope and dtype, end tokens, unsupported math by name."""

import json
from pathlib import Path

import pytest
import torch

from serve.errors import StartError
from serve.model.families import FAMILIES
from serve.model.spec import ModelSpec, read_spec
from tests.model.paged_run import PagedRun, load
from tests.model.tiny_models import BY_NAME, TINY_MODELS, TinyModel, reference_logits, save

SMALL: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def spec_of(folder: Path, **changes: object) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps({**SMALL, **changes}))
    return read_spec(folder)


def refusal(folder: Path, **changes: object) -> str:
    with pytest.raises(StartError) as caught:
        spec_of(folder, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unsupported_architecture_is_refused_with_the_list(tmp_path: Path) -> None:
    message = refusal(tmp_path, architectures=["MambaForCausalLM"])
    assert "'MambaForCausalLM' is not supported" in message
    assert all(name in message for name in FAMILIES)


def test_a_config_without_architecture_is_refused(tmp_path: Path) -> None:
    assert "'unnamed' is not supported" in refusal(tmp_path, architectures=None)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantised_checkpoint_is_refused(tmp_path: Path, key: str) -> None:
    message = refusal(tmp_path, **{key: {"quant_method": "gptq", "bits": 4}})
    assert key in message and "quantised checkpoints are not supported" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "relu2"}, "'relu2'"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.1}}, "mscale"),
        ({"rope_scaling": {"type": "linear"}}, "lacks its factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"torch_dtype": "float8_e4m3fn"}, "'float8_e4m3fn'"),
        ({"num_attention_heads": 5, "head_dim": 16}, "5 query heads"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"head_dim": 15}, "even number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 0}, "cannot be read"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    assert named in refusal(tmp_path, **changes)


def test_layer_types_must_be_known_and_one_per_layer(tmp_path: Path) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
    assert "3 entries for 4 layers" in refusal(tmp_path, **qwen, layer_types=["full_attention"] * 3)
    assert "'chunked_attention'" in refusal(tmp_path, **qwen, layer_types=["chunked_attention"] * 4)


def test_longrope_factors_must_match_the_rotary_dims(tmp_path: Path) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 8}
    assert "short_factor has 3 entries; longrope needs 8" in refusal(tmp_path, rope_scaling=scaling)


def test_a_folder_without_config_or_with_a_broken_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"no config\.json"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StartError, match="cannot be read"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(StartError, match="not a JSON object"):
        read_spec(tmp_path)


def test_a_missing_dimension_is_named(tmp_path: Path) -> None:
    config = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartError, match="lacks intermediate_size"):
        read_spec(tmp_path)


def test_end_tokens_of_the_generation_config_win(tmp_path: Path) -> None:
    assert spec_of(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert spec_of(tmp_path).eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert spec_of(tmp_path, eos_token_id=[4, 5]).eos_token_ids == (4, 5)
    assert spec_of(tmp_path, eos_token_id=None).eos_token_ids == ()


def test_both_spellings_of_dtype_are_read(tmp_path: Path) -> None:
    assert spec_of(tmp_path).dtype == "bfloat16"
    assert spec_of(tmp_path, torch_dtype=None, dtype="float16").dtype == "float16"
    assert spec_of(tmp_path, torch_dtype=None).dtype == "float32"


LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_SCALING}},
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        ),
    ],
    ids=["default", "llama3", "linear"],
)
def test_both_spellings_of_rope_give_one_spec(tmp_path: Path, old: dict[str, object], new: dict[str, object]) -> None:
    assert spec_of(tmp_path, **old) == spec_of(tmp_path, **new)
    assert spec_of(tmp_path, **old) != spec_of(tmp_path, rope_theta=3.0)


def test_both_spellings_of_gemma3s_two_ropes_give_one_spec(tmp_path: Path) -> None:
    gemma = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 16}
    old = {"rope_theta": 9e5, "rope_local_base_freq": 8e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 9e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 8e3},
    }
    spec = spec_of(tmp_path, **gemma, **old, sliding_window_pattern=2)
    assert spec == spec_of(tmp_path, **gemma, rope_parameters=new, sliding_window_pattern=2)
    assert [layer.rope_index for layer in spec.layers] == [1, 0, 1, 0]
    assert (spec.ropes[0].kind, spec.ropes[1].kind) == ("linear", "default")


def test_the_published_gemma3_config_of_four_keys_is_read(tmp_path: Path) -> None:
    # as google/gemma-3-4b-it has it: all other keys are the family's defaults
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    text["sliding_window"] = 1024
    outer: dict[str, object] = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "torch_dtype": "bfloat16",
    }
    outer |= {"eos_token_id": [1, 106], "text_config": text, "vision_config": {"hidden_size": 1152}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    spec = read_spec(tmp_path)
    dims = spec.dims
    assert (dims.num_attention_heads, dims.num_key_value_heads, dims.head_dim, dims.vocab_size) == (8, 4, 256, 262_208)
    assert dims.tie_word_embeddings and spec.eos_token_ids == (1, 106) and spec.dtype == "bfloat16"
    assert spec.max_position_embeddings == 131_072
    assert [layer.window for layer in spec.layers[:7]] == [1024] * 5 + [None, 1024]
    assert (spec.ropes[0].theta, spec.ropes[0].factor, spec.ropes[1].theta) == (1e6, 8.0, 1e4)


def test_early_phi3_names_of_longrope_are_read(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    phi = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "original_max_position_embeddings": 64}
    spec = spec_of(tmp_path, **phi, rope_scaling={"type": "su", **factors})
    assert spec.ropes[0].kind == "longrope"
    assert spec.ropes[0].original_max_position_embeddings == 64


@pytest.mark.parametrize("tiny", TINY_MODELS, ids=lambda tiny: tiny.name)
def test_dims_match_what_transformers_built(tiny: TinyModel, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = tiny.build()
    dims = read_spec(save(model, tmp_path)).dims
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert dims.site_shape("down_proj") == shapes["model.layers.0.mlp.down_proj.weight"]
    assert dims.site_shape("o_proj") == shapes["model.layers.0.self_attn.o_proj.weight"]
    assert (dims.vocab_size, dims.hidden_size) == shapes["model.embed_tokens.weight"]


def test_an_old_spelling_checkpoint_computes_the_same(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = BY_NAME["llama3"].build()
    path = save(model, tmp_path) / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    decoder = load(tmp_path)
    assert decoder.spec.ropes[0].kind == "llama3"
    ids = list(range(5, 45))
    assert (PagedRun(decoder).step({0: ids})[0] - reference_logits(model, ids)).abs().max() <= 1e-4
