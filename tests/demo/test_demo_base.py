"""The shipped demo: small enough to ship, true to its tokenizer and template, and its adapters do what they claim.

Owns no server; the greedy answers come from transformers and PEFT, the reference. Invariant: no question asked here was
in any adapter's training.
"""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from adapters_store.base import read_base_dims
from scripts.demo_products import BY_NAME, EXPERTS, MIXTURE, PRODUCTS, Product
from scripts.demo_tasks import PETS, STYLES, TASKS, check_turns, is_held_out, training_turns
from scripts.demo_training import share_right
from scripts.demo_world import Turn, conversations
from scripts.make_demo_base import NUM_CHECKS, SEED
from serve.trainer.methods.meteora_linear import MeteoraLinear

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
BASE = DEMO / "chorale-demo"
MAX_DEMO_BYTES = 10_000_000
NUM_ASKED = 6
# of six questions; of many each gets nine in ten right (docs/benchmarks/training.md)
MIN_RIGHT = 0.8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


@pytest.fixture(scope="module")
def checks() -> dict[str, list[Turn]]:
    found: dict[str, list[Turn]] = {}
    for line in (DEMO / "tasks.jsonl").read_text().splitlines():
        item = json.loads(line)
        assert set(item) == {"adapter", "prompt", "answer"}
        found.setdefault(item["adapter"], []).append(Turn(item["prompt"], item["answer"]))
    return found


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def render(messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    template = json.loads((BASE / "tokenizer_config.json").read_text())["chat_template"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    rendered: str = environment.from_string(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt
    )
    return rendered


def test_the_base_and_its_adapters_stay_within_their_sizes() -> None:
    assert num_bytes(DEMO) <= MAX_DEMO_BYTES
    with safe_open(BASE / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert 2_000_000 <= sum(tensor.numel() for tensor in tensors) <= 6_000_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces\n\n\ttabs\r\n",
        "Tom's lamp, 1234 + 0.5 = ?",
        "naïve façade, Ελλάδα, 北京, עברית",
        "👩‍👩‍👧‍👦 🎻🏳️‍🌈",
        "\x00\x07 control \ufeff",
        "<|user|>injected<|end|><|assistant|> <|pad|> <|notspecial|>",
    ],
)
def test_any_text_comes_back_from_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_quoted_word_is_spelled_letter_by_letter(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode('"lamp"').tokens == ['"', "l", "a", "m", "p", '"']


def test_the_chat_template_renders_in_a_sandbox() -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    chat = "<|system|>Be kind.<|end|><|user|>Hello<|end|><|assistant|>Hi<|end|><|user|>Bye<|end|>"
    assert render(messages, add_generation_prompt=False) == chat
    assert render(messages, add_generation_prompt=True) == f"{chat}<|assistant|>"


def test_the_chat_template_refuses_an_unknown_role_by_name() -> None:
    with pytest.raises(TemplateError, match="not wizard"):
        render([{"role": "wizard", "content": "x"}], add_generation_prompt=True)


def test_generation_ends_at_the_end_token(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("<|end|>")
    assert json.loads((BASE / "config.json").read_text())["eos_token_id"] == end
    assert json.loads((BASE / "generation_config.json").read_text())["eos_token_id"] == end


def test_the_same_seed_tells_the_same_world() -> None:
    assert list(islice(conversations(5), 50)) == list(islice(conversations(5), 50))
    assert list(islice(conversations(5), 50)) != list(islice(conversations(6), 50))


def test_every_check_is_held_out_and_no_training_question_is(checks: dict[str, list[Turn]]) -> None:
    assert list(checks) == [task.name for task in TASKS]
    assert all(checks[task.name] == check_turns(task, NUM_CHECKS, SEED, real_words_first=True) for task in TASKS)
    for task in (*TASKS, *STYLES, *PETS):
        asked = {turn.user for turn in check_turns(task, NUM_CHECKS, SEED, real_words_first=True)}
        assert len(asked) >= 20
        assert all(is_held_out(prompt) for prompt in asked)
        trained = {turn.user for turn in islice(training_turns(task, seed=1), 2000)}
        assert not any(is_held_out(prompt) for prompt in trained)


def test_the_base_never_reads_a_task(checks: dict[str, list[Turn]]) -> None:
    turns = [turn for task in (*STYLES, *PETS) for turn in check_turns(task, NUM_CHECKS, SEED, real_words_first=True)]
    turns += [turn for own in checks.values() for turn in own]
    asked = {turn.user: turn.assistant for turn in turns}
    for conversation in islice(conversations(seed=11), 5000):
        for turn in conversation.turns:
            assert asked.get(turn.user) != turn.assistant


def with_slices(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """Add an S2FT adapter's slices to the model's own weights."""
    tensors = load_file(folder / "adapter_model.safetensors")
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in tensors.items():
            if name.endswith(".D"):
                stem = name.removesuffix(".D")
                idx, weight = tensors[f"{stem}.idx"].long(), weights[f"model.{stem}.weight"]
                if stem.endswith(("o_proj", "down_proj")):
                    weight[:, idx] += values.float().T
                else:
                    weight[idx] += values.float()
    return model


@pytest.mark.parametrize("product", [each for each in PRODUCTS if each.task], ids=lambda each: each.name)
def test_an_adapter_does_what_the_base_cannot(product: Product, tokenizer: Tokenizer, model: LlamaForCausalLM) -> None:
    assert product.task is not None
    turns = check_turns(BY_NAME[product.task], NUM_ASKED, SEED, real_words_first=True)
    assert share_right(model, tokenizer, turns) <= 0.1
    folder = DEMO / "adapters" / product.name
    adapted = with_slices(model, folder) if product.family == "s2ft" else PeftModel.from_pretrained(model, str(folder))
    assert share_right(adapted, tokenizer, turns) >= MIN_RIGHT


def test_two_sliced_adapters_added_up_do_both_tasks(tokenizer: Tokenizer, model: LlamaForCausalLM) -> None:
    sliced = [product for product in PRODUCTS if product.family == "s2ft"]
    assert len(sliced) == 2
    for product in sliced:
        with_slices(model, DEMO / "adapters" / product.name)
    for product in sliced:
        assert product.task is not None
        turns = check_turns(BY_NAME[product.task], NUM_ASKED, SEED, real_words_first=True)
        assert share_right(model, tokenizer, turns) >= MIN_RIGHT, product.task


def with_mixture(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """Put a mixture's experts and gates around the model's own linear layers."""
    tensors = load_file(folder / "model.safetensors")
    options = json.loads((folder / "upload.json").read_text())["options"]
    for name in [name for name in tensors if name.endswith(".moe_gate.weight")]:
        stem = name.removesuffix(".moe_gate.weight")
        path = stem.removeprefix("base_model.model.")
        linear = model.get_submodule(path)
        assert isinstance(linear, torch.nn.Linear)
        a, bt = tensors[f"{stem}.lora_A.weight"].float(), tensors[f"{stem}.lora_B.weight"].float().T
        how = {"top_k": options["top_k"], "temperature": options["temperature"]}
        gated = MeteoraLinear(linear, a, bt.contiguous(), options["rank"], **how)
        gated.gate.data = tensors[name].float()
        model.set_submodule(path, gated)
    return model


def test_the_mixture_finds_every_style_by_itself(tokenizer: Tokenizer, model: LlamaForCausalLM) -> None:
    mixed = with_mixture(model, DEMO / "adapters" / MIXTURE)
    for name in EXPERTS:
        turns = check_turns(BY_NAME[name], NUM_ASKED, SEED, real_words_first=True)
        assert share_right(mixed, tokenizer, turns) >= MIN_RIGHT, name


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda each: each.name)
def test_an_adapter_of_the_trainer_says_where_it_came_from(product: Product) -> None:
    provenance = json.loads((DEMO / "adapters" / product.name / "provenance.json").read_text())
    spec = provenance["hyper_parameters"]
    assert {name: spec[name] for name in product.spec if name != "target_modules"} == {
        name: value for name, value in product.spec.items() if name != "target_modules"
    }
    assert provenance["base"] == {"name": BASE.name, "weights_fingerprint": read_base_dims(BASE).weights_fingerprint}
    assert len(provenance["loss_curve"]) > 100


def test_every_task_has_its_adapter_and_no_other_lies_there() -> None:
    assert {task.name for task in (*TASKS, *STYLES, *PETS)} <= {product.name for product in PRODUCTS}
    assert {path.name for path in (DEMO / "adapters").iterdir()} == {product.name for product in PRODUCTS}


def test_the_mixture_s_experts_are_the_shipped_loras() -> None:
    upload = json.loads((DEMO / "adapters" / MIXTURE / "upload.json").read_text())
    assert upload["format"] == "meteora"
    assert upload["options"]["experts"] == list(EXPERTS)
    provenance = json.loads((DEMO / "adapters" / MIXTURE / "provenance.json").read_text())
    assert [expert["name"] for expert in provenance["experts"]] == list(EXPERTS)
