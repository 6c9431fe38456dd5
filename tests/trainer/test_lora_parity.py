"""LoRA trained by our loop against a plain transformers + peft loop, step by step, in fp32.

Owns the reference: it renders the chats, masks the labels, pads and steps by itself and imports nothing of the trainer
but the order of the rows. Invariant: losses agree within 1e-4 over 50 steps, and so do the trained factors.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from adapters_store.strict_json import Json
from serve.trainer.batching import epoch_order
from serve.trainer.progress import StepDone
from tests.trainer.tiny_base import Place, finish

pytestmark = pytest.mark.filterwarnings("ignore")

NUM_STEPS, BATCH, RATE, SEED = 50, 4, 0.01, 5
PLAIN: dict[str, Json] = {}
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def encoded(tokenizer: Tokenizer, line: dict[str, Json]) -> tuple[list[int], list[int]]:
    messages = line["messages"]
    assert isinstance(messages, list)
    user, assistant = (message["content"] for message in messages if isinstance(message, dict))
    prompt = tokenizer.encode(f"<|user|>{user}<|end|><|assistant|>").ids
    answer = tokenizer.encode(f"{assistant}<|end|>").ids
    return prompt + answer, [-100] * len(prompt) + answer


def reference_losses(
    base: Path, lines: list[dict[str, Json]], *, use_dora: bool
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train with transformers' own loss on padded batches; return the losses and the factors."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    rows = [encoded(tokenizer, line) for line in lines]
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(SEED)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", use_dora=use_dora)
    model = get_peft_model(base_model, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, NUM_STEPS)
    per_epoch = math.ceil(len(rows) / BATCH)
    losses = []
    for step in range(NUM_STEPS):
        epoch, index = divmod(step, per_epoch)
        batch = [rows[i] for i in epoch_order(len(rows), SEED, epoch)[index * BATCH : (index + 1) * BATCH]]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in batch])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, get_peft_model_state_dict(model)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_every_step_equals_the_reference_loop(place: Place, use_dora: bool) -> None:
    wanted, factors = reference_losses(place.base, place.lines, use_dora=use_dora)
    spec: dict[str, Json] = {"rank": 4, "alpha": 8, "target_modules": [*TARGETS], "use_dora": use_dora}
    job = place.job("ours", max_steps=NUM_STEPS, n_epochs=50, **spec)
    finished, events = finish(job)
    losses = [event.train_loss for event in events if isinstance(event, StepDone)]
    assert len(losses) == NUM_STEPS
    assert losses == pytest.approx(wanted, abs=1e-4)
    # it learnt something, or equality would mean little
    assert losses[-1] < 0.7 * losses[0]
    exported = load_file(finished.adapter / "adapter_model.safetensors")
    assert exported.keys() == factors.keys()
    for name, values in factors.items():
        torch.testing.assert_close(exported[name], values, atol=2e-3, rtol=0)
    config = json.loads((finished.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 8, use_dora)


def test_accumulating_micro_batches_changes_nothing(place: Place) -> None:
    whole, cut = (
        finish(place.job(name, batch_size=size, gradient_accumulation=parts, max_steps=6, rank=4))[1]
        for name, size, parts in (("whole", 8, 1), ("cut", 2, 4))
    )
    losses = [[event.train_loss for event in events if isinstance(event, StepDone)] for events in (whole, cut)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_gradient_checkpointing_and_packing_change_nothing(place: Place) -> None:
    plain, *others = (
        finish(place.job(name, max_steps=6, rank=4, **more))[1]
        for name, more in (
            ("plain", PLAIN),
            ("checkpointed", {"gradient_checkpointing": True}),
            ("packed", {"packing": True}),
        )
    )
    wanted = [event.train_loss for event in plain if isinstance(event, StepDone)]
    for events in others:
        losses = [event.train_loss for event in events if isinstance(event, StepDone)]
        assert losses == pytest.approx(wanted, abs=1e-4)
