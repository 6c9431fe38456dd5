"""Every option of a gate on the CPU path against the definition, and the definition against plain loops."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from adapter_kernels.gate_options import IN_NORMS, LOGITS, WEIGHTS, GateOptions
from adapter_kernels.image import AdapterImage, Gate, ImageError
from adapter_kernels.reference import gate_weights, mixture
from tests.kernels.cpu_steps import check_step
from tests.kernels.random_adapters import Ops, Place, random_adapter
from tests.kernels.test_cpu_families import CHOSEN, STEPS


def everywhere(ops: dict[str, Ops], seed: int, dtype: torch.dtype) -> AdapterImage:
    places: dict[Place, Ops] = {(layer, site): own for layer in range(2) for site, own in ops.items()}
    return random_adapter(places, torch.Generator().manual_seed(seed), dtype)


# few rows fetch their experts, many weigh all of them
@pytest.mark.parametrize("step", ["decodes", "chunks"])
@pytest.mark.parametrize("mix", ["output", "rank"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights_and_mixes_match_the_reference(weight: str, mix: str, step: str) -> None:
    own = Ops((3,) * 12, top_k=2, temperature=0.7, gate=GateOptions("none", "linear", weight, mix), gate_bias=True)
    every = replace(own, top_k=12)
    for ops in (own, every):
        images = [everywhere({"q_proj": ops, "down_proj": ops}, seed, torch.float32) for seed in range(3)]
        check_step(images, CHOSEN, STEPS[step], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_one_product_may_see_it_through_different_norms(dtype: torch.dtype) -> None:
    members = dict(zip(("q_proj", "k_proj", "v_proj"), IN_NORMS, strict=True))
    ops = {
        site: Ops((2, 1, 3), top_k=2, gate=GateOptions(norm, "abs"), gate_bias=norm == "unit", temperature=4.0)
        for site, norm in members.items()
    }
    # in 16 bits the norms' rounding must not decide between experts
    check_step([everywhere(ops, seed, dtype) for seed in range(3)], CHOSEN, STEPS["padded"], dtype)


@pytest.mark.parametrize(("in_norm", "logit", "weight"), [*product(IN_NORMS, LOGITS, WEIGHTS)])
def test_the_definition_equals_loops_over_single_numbers(in_norm: str, logit: str, weight: str) -> None:
    generator = torch.Generator().manual_seed(1)
    gate_weight, bias = torch.randn(5, 8, generator=generator), torch.randn(5, generator=generator)
    x = torch.randn(8, generator=generator).tolist()
    mean = math.fsum(x) / 8
    if in_norm == "layernorm_noaffine":
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in x) / 8 + 1e-5)
        seen = [(value - mean) / spread for value in x]
    else:
        length = math.sqrt(math.fsum(value * value for value in x)) if in_norm == "unit" else 1.0
        seen = [value / length for value in x]
    logits = [
        math.fsum(w * value for w, value in zip(row, seen, strict=True)) + own
        for row, own in zip(gate_weight.tolist(), bias.tolist(), strict=True)
    ]
    logits = [abs(value) for value in logits] if logit == "abs" else logits
    chosen = sorted(range(5), key=lambda expert: -logits[expert])[:3]
    powers = [math.exp(value / 0.6) for value in logits]
    best = math.fsum(powers[expert] for expert in chosen)
    shares = {
        "softmax_selected": [powers[expert] / best for expert in chosen],
        "softmax_all_renorm": [powers[expert] / best for expert in chosen],
        "softmax_all": [powers[expert] / math.fsum(powers) for expert in chosen],
        "one": [1.0] * 3,
        "sigmoid": [powers[expert] / (1 + powers[expert]) for expert in chosen],
    }[weight]
    options = GateOptions(in_norm, logit, weight)
    found = gate_weights(torch.tensor(x), Gate(gate_weight, (1,) * 5, 3, 0.6, bias, options))
    assert [expert for expert, _ in found] == chosen
    assert [share for _, share in found] == pytest.approx(shares, rel=1e-4)


def test_mixing_ranks_mixes_the_factors_and_not_their_products() -> None:
    gate = GateOptions(weight="sigmoid", mix="rank")
    image = random_adapter({(0, "o_proj"): Ops((2, 2, 2), top_k=2, gate=gate)}, torch.Generator().manual_seed(3))
    site = image.site(image.rows[0])
    assert site.gate is not None
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(4))
    for token, mixed in enumerate(mixture(x, site, site.gate)):
        chosen = gate_weights(x[token], site.gate)
        a = sum(weight * site.a[2 * expert : 2 * expert + 2] for expert, weight in chosen)
        bt = sum(weight * site.bt[2 * expert : 2 * expert + 2] for expert, weight in chosen)
        assert isinstance(a, torch.Tensor) and isinstance(bt, torch.Tensor)
        assert torch.allclose(mixed, x[token] @ a.T @ bt, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [GateOptions(in_norm="rms"), GateOptions(logit="cosine"), GateOptions(weight="softmax"), GateOptions(mix="")],
)
def test_an_option_that_no_gate_has_is_refused_at_load(options: GateOptions) -> None:
    image = random_adapter({(0, "q_proj"): Ops((2, 2), top_k=1)}, torch.Generator().manual_seed(1))
    with pytest.raises(ImageError, match="no gate is like"):
        image.site(replace(image.rows[0], gate_options=options))


def test_unequal_ranks_are_not_mixed_in_rank_space() -> None:
    ops = Ops((2, 3), top_k=1, gate=GateOptions(mix="rank"))
    image = random_adapter({(0, "q_proj"): ops}, torch.Generator().manual_seed(1))
    with pytest.raises(ImageError, match="no gate is like"):
        image.site(image.rows[0])
