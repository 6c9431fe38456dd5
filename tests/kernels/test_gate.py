"""The choice of experts: order, ties, temperature, and rows that are no numbers."""

import pytest
import torch

from adapter_kernels.gate import Choice, Mixture, add_chosen, choose, weigh

RANKS = (2, 1, 3)


def test_equal_logits_go_to_the_lower_expert() -> None:
    mixture = Mixture.build((1,) * 8, 3, 1.0, 0)
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0, 5.0, 1.0, 5.0, 0.0], [0.0] * 8])
    choice = choose(logits, mixture)
    assert choice.experts.tolist() == [[1, 2, 4], [0, 1, 2]]
    assert torch.allclose(choice.weights, torch.full((2, 3), 1 / 3))


def test_ties_keep_their_order_among_as_many_experts_as_there_may_be() -> None:
    mixture = Mixture.build((1,) * 128, 8, 1.0, 0)
    logits = (torch.arange(128) % 2).float().expand(9, 128)
    assert choose(logits, mixture).experts.tolist() == [list(range(1, 17, 2))] * 9


def test_one_expert_alone_weighs_exactly_one() -> None:
    logits = torch.tensor([[-700.0, -800.0, -900.0], [float("nan"), 1.0, 2.0]])
    choice = choose(logits, Mixture.build(RANKS, 1, 0.01, 0))
    assert choice.weights.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_weights_are_the_softmax_of_the_chosen_logits_over_the_temperature(temperature: float) -> None:
    choice = choose(torch.tensor([[0.5, 2.0, -1.0]]), Mixture.build(RANKS, 2, temperature, 0))
    assert choice.experts.tolist() == [[1, 0]]
    assert torch.allclose(choice.weights, torch.softmax(torch.tensor([[2.0, 0.5]]) / temperature, -1))


def test_what_was_not_chosen_is_selected_away_even_when_it_is_no_number() -> None:
    mixture = Mixture.build(RANKS, 1, 1.0, 0)
    bridge = torch.tensor([[float("nan"), float("inf"), 3.0, 4.0, 5.0, 6.0]])
    weighed = weigh(bridge, Choice(torch.tensor([[2]]), torch.ones(1, 1)), mixture)
    assert weighed.tolist() == [[0.0, 0.0, 0.0, 4.0, 5.0, 6.0]]


@pytest.mark.parametrize("ranks", [(2, 2, 2), RANKS, (4, 0, 1)], ids=["equal", "unequal", "an empty expert"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_fetching_the_chosen_experts_equals_weighing_all(ranks: tuple[int, ...], top_k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    mixture = Mixture.build(ranks, top_k, 0.7, 0)
    x = torch.randn(5, 8, generator=generator)
    a, bt = torch.randn(sum(ranks), 8, generator=generator), torch.randn(sum(ranks), 6, generator=generator)
    choice = choose(torch.randn(5, 3, generator=generator), mixture)
    expected = weigh(x @ a.T, choice, mixture) @ bt
    # the stacks of two more adapters around ours are poison
    around_a, around_bt = torch.full((7, 8), torch.nan), torch.full((7, 6), torch.nan)
    y = torch.zeros(5, 6)
    first = torch.full((5,), 7)
    stacks = torch.cat((around_a, a, around_a)), torch.cat((around_bt, bt, around_bt))
    add_chosen(x, *stacks, first, first, choice, mixture, y)
    assert torch.allclose(y, expected, atol=1e-5)
