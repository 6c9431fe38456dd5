"""Ops outside the linear layers against their definitions, token by token; and what must not touch what."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adapter_kernels import reference_model
from adapter_kernels.extras import AdapterExtras
from adapter_kernels.gate_options import GateOptions
from adapter_kernels.model_delta import CpuModelDelta
from adapter_kernels.model_image import ModelTensors
from adapter_kernels.model_rows import GateRow
from adapter_kernels.route import Placement, build_route
from tests.kernels.model_adapters import HIDDEN, LAYERS, MLP_SHAPES, VOCAB, Maker, place

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
# sequences of one step: none, prompt, prefix, none, plain; the last two are neighbours of one adapter
COUNTS = [3, 5, 4, 2, 1, 3]
OWNERS: list[int | None] = [None, 0, 1, None, 2, 2]
ROWS = [owner for owner, count in zip(OWNERS, COUNTS, strict=True) for _ in range(count)]
TOKEN_IDS = torch.tensor([*(4, 9, 31), *(-2, -3, -4, 7, 7), *(-3, -4, 11, 40), *(1, 2), 30, *(8, 30, 2)])


@dataclass(frozen=True)
class Head:
    """A base head, and a base norm of eps 1e-5."""

    weight: Tensor
    bias: None = None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)

    def replaced(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), 1e-5)


def adapters(dtype: torch.dtype) -> list[ModelTensors]:
    return [
        Maker(1, dtype).everything(prompt=4),
        Maker(2, dtype).everything(prefix=3),
        Maker(3, dtype).everything(),
    ]


def delta_of(
    models: list[ModelTensors], owners: list[int | None], counts: list[int], token_ids: Tensor
) -> CpuModelDelta:
    places = [place(AdapterExtras({}, model), i) for i, model in enumerate(models)]
    route = build_route([None if i is None else places[i] for i in owners], counts)
    delta = CpuModelDelta.build(route, token_ids, torch.arange(len(token_ids)) + 5)
    assert delta is not None
    return delta


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert float((found.float() - expected).abs().max()) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tokens_are_embedded_by_each_rows_own_adapter(dtype: torch.dtype) -> None:
    models, table = adapters(dtype), Maker(9, dtype).normal(VOCAB, HIDDEN)
    delta = delta_of(models, OWNERS, COUNTS, TOKEN_IDS)
    x = delta.look_up(TOKEN_IDS, table.__getitem__) * 2.0
    delta.place_prompts(x, 3.0)
    for row, owner in enumerate(ROWS):
        token = int(TOKEN_IDS[row])
        if owner is None:
            assert torch.equal(x[row], table[token] * 2.0)
            continue
        expected = reference_model.embedding(token, table, models[owner], embedding_scale=2.0, prompt_scale=3.0)
        close(x[row], expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [None, [0, 4, 7, 11, 12, 13, 14, 17], [1, 14], [0]])
def test_logits_come_from_each_rows_own_head(dtype: torch.dtype, rows: list[int] | None) -> None:
    models, base = adapters(dtype), Head(Maker(9, dtype).normal(VOCAB, HIDDEN))
    hidden = Maker(8, dtype).normal(len(ROWS) if rows is None else len(rows), HIDDEN)
    logits = delta_of(models, OWNERS, COUNTS, TOKEN_IDS).head(hidden, rows, base)
    for place_index, row in enumerate(range(len(ROWS)) if rows is None else rows):
        owner = ROWS[row]
        if owner is None:
            assert torch.equal(logits[place_index], base(hidden)[place_index])
        else:
            close(logits[place_index], reference_model.logits(hidden[place_index], base.weight, models[owner]), dtype)


def test_norms_are_replaced_in_own_rows_of_own_layer() -> None:
    models, base = adapters(torch.float32), Head(torch.empty(0))
    delta, x = delta_of(models, OWNERS, COUNTS, TOKEN_IDS), Maker(7).normal(len(ROWS), HIDDEN)
    for layer, name, is_own in ((0, "input_layernorm", True), (1, "input_layernorm", False), (-1, "norm", True)):
        y = torch.full_like(x, 5.0)
        delta.norm(layer, name, x, y, base)
        for row, owner in enumerate(ROWS):
            if owner is None or not is_own:
                assert bool((y[row] == 5.0).all())
            else:
                close(y[row], reference_model.norm(x[row], models[owner].norms[layer, name], 1e-5), torch.float32)


def test_prefixes_land_in_the_slots_of_their_virtual_tokens_alone() -> None:
    models = adapters(torch.float32)
    delta, prefix = delta_of(models, OWNERS, COUNTS, TOKEN_IDS), models[1].kv_prefix
    assert prefix is not None
    for layer in range(LAYERS):
        k_cache, v_cache = torch.zeros(6, 4, 2, 4), torch.zeros(6, 4, 2, 4)
        delta.write_prefix(layer, k_cache, v_cache)
        for cache, own in ((k_cache, prefix.k), (v_cache, prefix.v)):
            expected = torch.zeros(24, 2, 4)
            # rows 8 and 9 are tokens 1 and 2 of the prefix, their slots 13 and 14
            expected[13], expected[14] = own[layer, 1], own[layer, 2]
            assert torch.equal(cache.view(24, 2, 4), expected)


GATES = {
    "llava-mole": (GateRow(0, 3, 1, 1.0, 0, options=GateOptions(weight="one")), (2, 2, 2), True),
    "mixlora": (
        GateRow(0, 4, 2, 1.0, 0, options=GateOptions(weight="softmax_all_renorm"), is_ffn_moe=True),
        (2, 2, 2, 2),
        False,
    ),
    "mixlora-unequal": (GateRow(0, 3, 2, 0.5, 0, is_ffn_moe=True), (1, 4, 2), True),
    "all": (GateRow(0, 3, 3, 2.0, 0, options=GateOptions("unit", weight="softmax_all")), (1, 2, 3), False),
    "abs": (GateRow(0, 4, 2, 1.0, 0, options=GateOptions("layernorm_noaffine", "abs")), (2, 2, 2, 2), False),
    "sigmoid": (GateRow(0, 3, 2, 1.5, 0, options=GateOptions(weight="sigmoid")), (2, 1, 2), True),
    "rank": (GateRow(0, 3, 2, 1.0, 0, options=GateOptions(mix="rank")), (2, 2, 2), False),
}


def mixtures(dtype: torch.dtype, sites: tuple[str, ...]) -> list[AdapterExtras]:
    return [
        Maker(i, dtype).mixture(row, ranks, sites, bias=bias) for i, (row, ranks, bias) in enumerate(GATES.values())
    ]


class Mlp:
    """A base MLP."""

    def __init__(self, dtype: torch.dtype) -> None:
        maker = Maker(77, dtype)
        self.weights = {site: maker.normal(*shape) / shape[1] ** 0.5 for site, shape in MLP_SHAPES.items()}
        self.calls = 0

    def gate_up(self, x: Tensor) -> Tensor:
        return torch.cat(
            [functional.linear(x, self.weights[site].to(x.dtype)) for site in ("gate_proj", "up_proj")], -1
        )

    def down(self, x: Tensor) -> Tensor:
        self.calls += 1
        return functional.linear(x, self.weights["down_proj"].to(x.dtype))

    def run(self, delta: CpuModelDelta, layer: int, x: Tensor) -> Tensor:
        y = delta.mlp(layer, x, self.gate_up(x), functional.silu, self.down)
        assert y is not None
        return y

    def alone(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(functional.silu(gate) * up)


def mixed_delta(found: list[AdapterExtras], owners: list[int | None], counts: list[int]) -> CpuModelDelta:
    places: list[Placement] = [place(extras, i) for i, extras in enumerate(found)]
    route = build_route([None if i is None else places[i] for i in owners], counts)
    delta = CpuModelDelta.build(route, torch.zeros(sum(counts), dtype=torch.int64), torch.arange(sum(counts)))
    assert delta is not None
    return delta


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sites", [tuple(MLP_SHAPES), ("up_proj",)], ids=["all", "up"])
def test_experts_behind_a_shared_gate_agree_with_loops(dtype: torch.dtype, sites: tuple[str, ...]) -> None:
    found, base = mixtures(dtype, sites), Mlp(dtype)
    owners: list[int | None] = [None, *range(len(found))]
    counts = [2, 3, 4, 2, 1, 5, 2, 3]
    delta, x = mixed_delta(found, owners, counts), Maker(6, dtype).normal(sum(counts), HIDDEN)
    rows = [owner for owner, count in zip(owners, counts, strict=True) for _ in range(count)]
    weights = {site: weight.float() for site, weight in base.weights.items()}
    for layer in range(LAYERS):
        y, plain = base.run(delta, layer, x), base.alone(x)
        base.calls = 0
        for row, owner in enumerate(rows):
            if owner is None:
                assert torch.equal(y[row], plain[row])
                continue
            model = found[owner].model
            assert model is not None
            experts = {s: e for (at, s), site in found[owner].sites.items() if at == layer and (e := site.experts)}
            expected = reference_model.mlp(x[row].float(), model.gates[layer], experts, weights, functional.silu)
            close(y[row], expected, dtype)


def test_the_base_down_product_runs_once_for_all() -> None:
    found, base = mixtures(torch.float32, tuple(MLP_SHAPES)), Mlp(torch.float32)
    base.run(mixed_delta(found, [0, 1, 2], [4, 4, 4]), 0, Maker(6).normal(12, HIDDEN))
    assert base.calls == 1


def test_a_layer_without_experts_is_left_to_the_base() -> None:
    found = mixtures(torch.float32, tuple(MLP_SHAPES))[0]
    assert found.model is not None
    only_first = replace(found, model=ModelTensors(gates={0: found.model.gates[0]}))
    delta, base, x = mixed_delta([only_first], [0], [3]), Mlp(torch.float32), Maker(6).normal(3, HIDDEN)
    assert delta.mlp(1, x, base.gate_up(x), functional.silu, base.down) is None


def test_a_step_without_such_adapters_has_no_model_delta() -> None:
    route = build_route([None, place(None, 0), place(AdapterExtras({}), 1)], [1, 2, 1])
    assert CpuModelDelta.build(route, torch.zeros(4, dtype=torch.int64), torch.arange(4)) is None


def poisoned(model: ModelTensors) -> ModelTensors:
    for _, tensor in model.weights():
        tensor.fill_(float("nan"))
    return model


def runs_of(delta: CpuModelDelta, token_ids: Tensor, base: Head) -> dict[str, Tensor]:
    x = delta.look_up(token_ids, base.weight.__getitem__)
    delta.place_prompts(x, 1.0)
    y, k_cache = x.clone(), torch.zeros(len(token_ids) + 5, 1, 2, 4)
    delta.norm(0, "input_layernorm", x, y, base)
    delta.write_prefix(0, k_cache, k_cache.clone())
    return {"x": x, "norm": y, "keys": k_cache[5:].flatten(1), "logits": delta.head(y, None, base)}


def test_a_broken_adapter_harms_its_own_rows_only() -> None:
    base = Head(Maker(9).normal(VOCAB, HIDDEN))
    whole = runs_of(delta_of(adapters(torch.float32), OWNERS, COUNTS, TOKEN_IDS), TOKEN_IDS, base)
    models = adapters(torch.float32)
    broken = [poisoned(models[0]), models[1], models[2]]
    got = runs_of(delta_of(broken, OWNERS, COUNTS, TOKEN_IDS), TOKEN_IDS, base)
    others = torch.tensor([owner != 0 for owner in ROWS])
    for name, rows in got.items():
        assert torch.equal(rows[others], whole[name][others]), name
    assert not bool(torch.isfinite(got["logits"][~others]).any())


def test_a_broken_mixture_harms_its_own_rows_only() -> None:
    base, x = Mlp(torch.float32), Maker(6).normal(9, HIDDEN)

    def run(found: list[AdapterExtras]) -> Tensor:
        return base.run(mixed_delta(found, [None, 0, 1, 2], [1, 3, 3, 2]), 0, x)

    whole, found = run(mixtures(torch.float32, tuple(MLP_SHAPES))), mixtures(torch.float32, tuple(MLP_SHAPES))
    for _, tensor in (found[1].model or ModelTensors()).weights():
        tensor.fill_(float("nan"))
    got = run(found)
    assert torch.equal(got[[0, 1, 2, 3, 7, 8]], whole[[0, 1, 2, 3, 7, 8]])


def test_each_adapter_alone_gives_the_bits_of_the_mixed_step() -> None:
    base, models = Head(Maker(9).normal(VOCAB, HIDDEN)), adapters(torch.float32)
    mixed = runs_of(delta_of(models, OWNERS, COUNTS, TOKEN_IDS), TOKEN_IDS, base)
    for owner in range(3):
        own = torch.tensor([i for i, other in enumerate(ROWS) if other == owner])
        alone = runs_of(delta_of(models, [owner], [len(own)], TOKEN_IDS[own]), TOKEN_IDS[own], base)
        for name in ("x", "norm", "keys"):
            assert torch.equal(alone[name], mixed[name][own]), name
        assert (alone["logits"] - mixed["logits"][own]).abs().max() <= 1e-5


def test_virtual_tokens_of_nobody_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="1 virtual tokens belong to no adapter"):
        delta_of(adapters(torch.float32), [2, 0], [1, 1], torch.tensor([-2, 4]))


def check_random_step(seed: int) -> None:
    """Random adapters, owners, counts and tokens: every row by its definition."""
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=random)

    kinds = draw(0, 3, 4).tolist()
    models = [
        Maker(seed + i).everything(prompt=3 if kind == 1 else 0, prefix=3 if kind == 2 else 0)
        for i, kind in enumerate(kinds)
    ]
    found = draw(-1, 4, int(draw(1, 9, 1))).sort().values.tolist()
    owners: list[int | None] = [None if owner < 0 else owner for owner in found]
    counts = draw(1, 24, len(owners)).tolist()
    rows = [owner for owner, count in zip(owners, counts, strict=True) for _ in range(count)]
    if all(owner is None for owner in rows):
        return
    token_ids = torch.tensor(
        [int(draw(-4 if owner is not None and kinds[owner] else 0, VOCAB, 1).clamp(max=VOCAB - 1)) for owner in rows]
    )
    token_ids[token_ids == -1] = 0
    table = Maker(seed + 9).normal(VOCAB, HIDDEN)
    delta = delta_of(models, owners, counts, token_ids)
    x = delta.look_up(token_ids, table.__getitem__)
    delta.place_prompts(x, 1.0)
    asked = draw(0, 2, len(rows)).nonzero()[:, 0].tolist()
    logits = delta.head(x[asked], asked, Head(table))
    for row, owner in enumerate(rows):
        model = ModelTensors() if owner is None else models[owner]
        wanted = reference_model.embedding(int(token_ids[row]), table, model, embedding_scale=1.0, prompt_scale=1.0)
        close(x[row], wanted, torch.float32)
        if row in asked:
            close(logits[asked.index(row)], reference_model.logits(x[row], table, model), torch.float32)


@pytest.mark.parametrize("seed", range(3))
def test_random_steps_agree_with_the_definitions(seed: int) -> None:
    check_random_step(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 120))
def test_many_random_steps_agree_with_the_definitions(seed: int) -> None:
    check_random_step(seed)
