"""MeteoRA's routing, output, gate loss and gradients against an implementation of its own, a token at a time.

Owns the reference: plain Python over rows and experts, in float64. Invariant: both agree within 1e-5.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from serve.trainer.batching import IGNORED
from serve.trainer.methods.meteora_linear import MeteoraLinear, expert_weights, gate_loss

RANKS, IN, OUT = (2, 3, 1, 2), 12, 9


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(top_k: int, temperature: float) -> MeteoraLinear:
    linear = nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight.copy_(random_tensor(OUT, IN, seed=1))
        linear.bias.copy_(random_tensor(OUT, seed=2))
        a, bt = random_tensor(sum(RANKS), IN, seed=3), random_tensor(sum(RANKS), OUT, seed=4)
        layer = MeteoraLinear(linear, a, bt, RANKS, top_k=top_k, temperature=temperature)
        layer.gate.copy_(random_tensor(len(RANKS), IN, seed=5))
    return layer


def routed(logits: list[float], top_k: int, temperature: float) -> dict[int, float]:
    """Return the weights of the chosen experts; of equal logits the lower number goes first."""
    chosen = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:top_k]
    shares = [math.exp(logits[e] / temperature) for e in chosen]
    return {e: share / sum(shares) for e, share in zip(chosen, shares, strict=True)}


def reference(layer: MeteoraLinear, x: Tensor, top_k: int, temperature: float) -> list[list[float]]:
    weight, bias = layer.linear.weight.double(), layer.linear.bias.double()
    a, bt, gate = layer.a.double(), layer.bt.double(), layer.gate.double()
    begins = [sum(RANKS[:e]) for e in range(len(RANKS))]
    rows = []
    for token in x.double().reshape(-1, IN):
        logits = [float(sum(gate[e, j] * token[j] for j in range(IN))) for e in range(len(RANKS))]
        y = [float(bias[o] + sum(weight[o, j] * token[j] for j in range(IN))) for o in range(OUT)]
        for e, share in routed(logits, top_k, temperature).items():
            for r in range(begins[e], begins[e] + RANKS[e]):
                inner = float(sum(a[r, j] * token[j] for j in range(IN)))
                y = [y[o] + share * inner * float(bt[r, o]) for o in range(OUT)]
        rows.append(y)
    return rows


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 1.0), (2, 0.3), (3, 20.0), (4, 1.0)])
def test_the_mixture_equals_the_reference_token_by_token(top_k: int, temperature: float) -> None:
    layer, x = layer_of(top_k, temperature), random_tensor(2, 3, IN, seed=6)
    with torch.no_grad():
        y = layer(x).reshape(-1, OUT)
        wanted = torch.tensor(reference(layer, x, top_k, temperature), dtype=torch.float32)
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)


def test_ties_go_to_the_lower_number() -> None:
    weights = expert_weights(torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), 2, 1.0)
    assert weights.tolist() == [[0.0, 0.5, 0.5, 0.0], [0.5, 0.5, 0.0, 0.0]]


def test_the_gate_s_loss_equals_the_reference_and_leaves_unlabelled_tokens_out() -> None:
    logits = [random_tensor(2, 3, 4, seed=seed) for seed in (7, 8)]
    tasks = torch.tensor([[0, IGNORED, 3], [1, 1, IGNORED]])
    total, num_right, count = gate_loss(logits, tasks)
    wanted, right = 0.0, 0
    for gate in logits:
        for b in range(2):
            for t in range(3):
                label, row = int(tasks[b, t]), [float(value) for value in gate[b, t]]
                if label != IGNORED:
                    wanted += math.log(sum(math.exp(value) for value in row)) - row[label]
                    right += max(range(4), key=lambda e, row=row: row[e]) == label  # type: ignore[misc]
    assert float(total) == pytest.approx(wanted, abs=1e-5)
    assert (num_right, count) == (right, 8)


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_equal_those_of_a_dense_formula(top_k: int) -> None:
    layer, x = layer_of(top_k, 0.7), random_tensor(5, IN, seed=6)
    tasks = torch.tensor([0, 1, 2, 3, 1])
    torch.autograd.backward(layer(x).square().sum() + 3.0 * gate_loss([_logits(layer)], tasks)[0])
    ours = {name: parameter.grad for name, parameter in layer.named_parameters()}
    gate, a, bt = (parameter.detach().double().requires_grad_(True) for parameter in (layer.gate, layer.a, layer.bt))
    wanted = _dense_loss(layer, x.double(), tasks, (gate, a, bt), top_k)
    torch.autograd.backward(wanted)
    for name, parameter in (("gate", gate), ("a", a), ("bt", bt)):
        found = ours[name]
        assert found is not None and parameter.grad is not None
        torch.testing.assert_close(found.double(), parameter.grad, atol=1e-4, rtol=1e-5)
        assert float(found.abs().sum()) > 0


def _logits(layer: MeteoraLinear) -> Tensor:
    assert layer.logits is not None
    return layer.logits


def _dense_loss(
    layer: MeteoraLinear, x: Tensor, tasks: Tensor, trained: tuple[Tensor, Tensor, Tensor], top_k: int
) -> Tensor:
    """Return the same loss from one-hot masks and whole matrices."""
    gate, a, bt = trained
    logits = x @ gate.T
    mask = torch.tensor([[e in routed(row, top_k, 0.7) for e in range(len(RANKS))] for row in logits.tolist()])
    shares = (logits / 0.7).exp() * mask
    shares = shares / shares.sum(-1, keepdim=True)
    y = x @ layer.linear.weight.double().T + layer.linear.bias.double()
    begin = 0
    for e, rank in enumerate(RANKS):
        part = slice(begin, begin + rank)
        y = y + shares[:, e, None] * (x @ a[part].T @ bt[part])
        begin += rank
    picked = logits.gather(-1, tasks[:, None])[:, 0]
    return y.square().sum() + 3.0 * (logits.exp().sum(-1).log() - picked).sum()
