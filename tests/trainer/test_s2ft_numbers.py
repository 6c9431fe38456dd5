"""S2FT's layer and its gradients against the dense layer, restricted to the selected slices.

Owns the dense reference. Invariants: output and gradients are those of a dense weight with D added, within 1e-5; and
what a forward of selected inputs keeps for its backward is `x[idx]`, never x.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from adapters_store.jobs.spec import TrainSpec
from serve.trainer.batching import IGNORED, make_batch
from serve.trainer.encoding import Row
from serve.trainer.loading import load_base
from serve.trainer.methods.method import Setting
from serve.trainer.methods.s2ft import attach_s2ft
from serve.trainer.methods.s2ft_linear import S2ftLinear
from serve.trainer.progress import TrainingFailed
from tests.trainer.tiny_base import VOCAB_SIZE

OUT, IN = 24, 40


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def changed_layer(*, is_columns: bool) -> tuple[nn.Linear, S2ftLinear, Tensor]:
    linear = nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight.copy_(random_tensor(OUT, IN, seed=1))
        linear.weight.requires_grad_(False)
        idx = torch.tensor([2, 3, 11, 23])
        layer = S2ftLinear(linear, idx, is_columns=is_columns)
        layer.delta.copy_(random_tensor(*layer.delta.shape, seed=2))
    return linear, layer, idx


@pytest.mark.parametrize("is_columns", [True, False], ids=["columns", "rows"])
def test_a_layer_equals_the_dense_one_with_its_slices_added(is_columns: bool) -> None:
    linear, layer, idx = changed_layer(is_columns=is_columns)
    weight = linear.weight.detach().clone()
    if is_columns:
        weight[:, idx] += layer.delta.detach().T
    else:
        weight[idx] += layer.delta.detach()
    weight.requires_grad_(True)
    x, dense_x = (random_tensor(3, 5, IN, seed=3).requires_grad_(True) for _ in range(2))
    bias = linear.bias.detach()
    y, dense_y = layer(x), nn.functional.linear(dense_x, weight, bias)
    torch.testing.assert_close(y, dense_y, atol=1e-5, rtol=1e-5)
    for output in (y, dense_y):
        torch.autograd.backward((output * random_tensor(3, 5, OUT, seed=4)).sum())
    assert layer.delta.grad is not None and weight.grad is not None and x.grad is not None
    restricted = weight.grad[:, idx].T if is_columns else weight.grad[idx]
    torch.testing.assert_close(layer.delta.grad, restricted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, dense_x.grad, atol=1e-5, rtol=1e-5)


def test_a_layer_of_selected_inputs_keeps_only_those_for_its_backward() -> None:
    _, layer, idx = changed_layer(is_columns=True)
    x = random_tensor(7, IN, seed=3).requires_grad_(True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    # of the tensors that hold tokens, one: x[idx]
    assert [list(tensor.shape) for tensor in kept if tensor.shape[:1] == (7,)] == [[7, len(idx)]]


@pytest.fixture
def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(9)
    ids = [torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (9, 14, 11)]
    return [Row(tuple(row), (True,) * len(row), (None,) * len(row)) for row in ids]


def spec_of(**more: object) -> TrainSpec:
    return TrainSpec.parse({"family": "s2ft", "target_modules": "all-linear", "seed": 4, **more}).resolved(8)  # type: ignore[dict-item]


def loss_of(model: nn.Module, rows: list[Row]) -> Tensor:
    batch = make_batch(rows, {}, pad_id=0)
    logits = model(input_ids=batch.token_ids).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)


def test_a_model_s_gradients_are_the_dense_ones_restricted(tiny_base: Path, rows: list[Row]) -> None:
    spec = spec_of(ratio=0.15)
    attached = attach_s2ft(load_base(tiny_base, spec, "cpu"), Setting(spec, (), (), ()))
    torch.autograd.backward(loss_of(attached.model, rows))
    dense = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    torch.autograd.backward(loss_of(dense, rows))
    weights = dict(dense.named_parameters())
    choice = attached.frozen_choice()
    assert len(choice) == 8
    for name, delta in attached.trained().items():
        stem = name.removesuffix(".D")
        gradient, idx = weights[f"model.{stem}.weight"].grad, choice[f"{stem}.idx"]
        assert gradient is not None and delta.grad is not None
        restricted = gradient[:, idx].T if stem.endswith(("o_proj", "down_proj")) else gradient[idx]
        torch.testing.assert_close(delta.grad, restricted, atol=1e-5, rtol=1e-5)
    assert all(p.grad is None for name, p in attached.model.named_parameters() if not name.endswith("delta"))


@pytest.mark.parametrize(
    "selection", ["random", "activation-small", "weight", "gradient", "activation-large", "gradient-small"]
)
def test_a_selection_is_repeatable_and_follows_its_norm(selection: str, tiny_base: Path, rows: list[Row]) -> None:
    spec = spec_of(selection=selection, channels=5)
    setting = Setting(spec, (), (), (make_batch(rows, {}, pad_id=0),))
    one, two = (attach_s2ft(load_base(tiny_base, spec, "cpu"), setting).frozen_choice() for _ in range(2))
    assert one.keys() == two.keys()
    for name, idx in one.items():
        assert torch.equal(idx, two[name])
        assert len(idx) == 5 and bool((idx.diff() > 0).all())
    norms = dict(reference_norms(selection.partition("-")[0], tiny_base, rows))
    for stem, norm in norms.items():
        rest = torch.ones(len(norm), dtype=torch.bool)
        rest[one[f"{stem}.idx"]] = False
        chosen, others = norm[~rest], norm[rest]
        if selection.endswith("-small"):
            assert float(chosen.max()) <= float(others.min())
        else:
            assert float(chosen.min()) >= float(others.max())


def reference_norms(kind: str, base: Path, rows: list[Row]) -> Iterator[tuple[str, Tensor]]:
    """Yield each down_proj's norms by its inputs, computed from whole tensors."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    seen: dict[int, Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        block.mlp.down_proj.register_forward_pre_hook(lambda _, inputs, layer=layer: seen.update({layer: inputs[0]}))
    torch.autograd.backward(loss_of(model, rows))
    for layer, block in enumerate(model.model.layers):
        weight = block.mlp.down_proj.weight
        if kind == "weight":
            yield f"layers.{layer}.mlp.down_proj", weight.detach().norm(dim=0)
        elif kind == "gradient":
            yield f"layers.{layer}.mlp.down_proj", weight.grad.norm(dim=0)
        elif kind == "activation":
            yield f"layers.{layer}.mlp.down_proj", seen[layer].detach().flatten(0, 1).norm(dim=0)


def test_budgets_per_layer_are_kept_and_wrong_ones_refused(tiny_base: Path) -> None:
    def attach(**more: object) -> dict[str, Tensor]:
        spec = TrainSpec.parse({"family": "s2ft", "target_modules": ["down_proj"], **more}).resolved(8)  # type: ignore[dict-item]
        return attach_s2ft(load_base(tiny_base, spec, "cpu"), Setting(spec, (), (), ())).frozen_choice()

    assert [len(idx) for idx in attach(channels=[0, 7]).values()] == [7]
    # a LoRA of rank 4 has 4 x (48 + 80) parameters there; 10 x 48 comes next to them from below
    assert [len(idx) for idx in attach(rank=4).values()] == [10, 10]
    with pytest.raises(TrainingFailed, match="3 numbers; the base has 2 layers"):
        attach(channels=[1, 2, 3])
    with pytest.raises(TrainingFailed, match="21 of 80 channels; the limit is 25%"):
        attach(channels=21)
    with pytest.raises(TrainingFailed, match="nothing would be trained"):
        attach(channels=0)
