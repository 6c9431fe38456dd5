"""Which channels S2FT trains: as many as the budget says, by chance or by a norm, none of another adapter's.

Owns the budget and the choice. Invariant: the choice is a function of base, data, spec and seed alone, strictly
increasing, and disjoint from every adapter named in `disjoint_with`.

Source: S2FT, arXiv 2412.06289, section 3.2 and appendix D.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adapters_store.jobs.base_fit import COLUMN_SITES, num_channels, s2ft_sites
from adapters_store.jobs.refusals import InvalidJob
from adapters_store.jobs.spec import TrainSpec
from adapters_store.jobs.spec_fields import S2FT_SITES
from serve.trainer.batching import IGNORED
from serve.trainer.methods.method import Setting, linears, plain_logits
from serve.trainer.progress import TrainingFailed

# what is selected: inputs (columns of the weight), or outputs (rows)
IS_COLUMNS: Mapping[str, bool] = {site: site in COLUMN_SITES for site in S2FT_SITES}
# (layer, site)
Place = tuple[int, str]


def select(model: nn.Module, setting: Setting, taken: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
    """Return the channels of every place that has a budget; raises TrainingFailed."""
    spec = setting.spec
    sites = s2ft_sites(spec)
    scores = _scores(model, setting, sites)
    generator = torch.Generator().manual_seed(spec.seed)
    num_layers = len({layer for layer, *_ in linears(model, sites)})
    if len(spec.channels) > 1 and len(spec.channels) != num_layers:
        raise TrainingFailed("bad_spec", f"channels has {len(spec.channels)} numbers; the base has {num_layers} layers")
    chosen: dict[Place, Tensor] = {}
    for layer, site, _, linear in linears(model, sites):
        width = linear.in_features if IS_COLUMNS[site] else linear.out_features
        count = _budget(spec, layer, width, linear)
        # drawn for every place, so that one place's budget does not move another's choice
        order = torch.randperm(width, generator=generator)
        if spec.selection != "random":
            order = _ordered(scores[layer, site], largest=not spec.selection.endswith("-small"))
        free = torch.ones(width, dtype=torch.bool)
        if (layer, site) in taken:
            free[taken[layer, site]] = False
        order = order[free[order]]
        if len(order) < count:
            raise TrainingFailed(
                "bad_spec",
                f"layer {layer} {site}: {count} channels are wanted and {len(order)} of {width} are free of the "
                "adapters in disjoint_with; lower channels or ratio",
            )
        if count:
            chosen[layer, site] = order[:count].sort().values
    if not chosen:
        raise TrainingFailed("bad_spec", "no layer has a budget of channels: nothing would be trained")
    return chosen


def _budget(spec: TrainSpec, layer: int, width: int, linear: nn.Linear) -> int:
    try:
        return num_channels(spec, layer, width, linear.out_features + linear.in_features - width)
    except InvalidJob as error:
        raise TrainingFailed("bad_spec", error.message) from error


def _ordered(scores: Tensor, *, largest: bool) -> Tensor:
    # stable: equal norms (dead channels) keep their order on every machine
    return torch.sort(scores, descending=largest, stable=True).indices


def _scores(model: nn.Module, setting: Setting, sites: tuple[str, ...]) -> dict[Place, Tensor]:
    kind = setting.spec.selection.partition("-")[0]
    if kind == "random":
        return {}
    if kind == "weight":
        return {
            (layer, site): linear.weight.detach().float().norm(dim=0 if IS_COLUMNS[site] else 1).cpu()
            for layer, site, _, linear in linears(model, sites)
        }
    return _activation_norms(model, setting, sites) if kind == "activation" else _gradient_norms(model, setting, sites)


@torch.no_grad()
def _activation_norms(model: nn.Module, setting: Setting, sites: tuple[str, ...]) -> dict[Place, Tensor]:
    """Return the norm over the calibration tokens of every channel's own activation."""
    sums: dict[Place, Tensor] = {}

    def add(place: Place, values: Tensor) -> None:
        sums[place] = (
            sums.get(place, torch.zeros(values.shape[-1])) + values.float().square().flatten(0, -2).sum(0).cpu()
        )

    with _hooked(model, sites, lambda place, x, y: add(place, x if IS_COLUMNS[place[1]] else y)):
        for batch in setting.calibration:
            plain_logits(model, batch)
    return {place: total.sqrt() for place, total in sums.items()}


def _gradient_norms(model: nn.Module, setting: Setting, sites: tuple[str, ...]) -> dict[Place, Tensor]:
    """Return the norm of the loss's gradient by every channel's slice of the weight, over the calibration tokens."""
    weights = {(layer, site): linear.weight for layer, site, _, linear in linears(model, sites)}
    for weight in weights.values():
        weight.requires_grad_(True)
    total = sum(batch.num_learnt for batch in setting.calibration)
    for batch in setting.calibration:
        logits = plain_logits(model, batch).float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        torch.autograd.backward(loss / total)
    norms: dict[Place, Tensor] = {}
    for place, weight in weights.items():
        assert weight.grad is not None, "every selected weight took part"
        norms[place] = weight.grad.float().norm(dim=0 if IS_COLUMNS[place[1]] else 1).cpu()
        weight.grad = None
        weight.requires_grad_(False)
    return norms


@contextmanager
def _hooked(model: nn.Module, sites: tuple[str, ...], seen: Callable[[Place, Tensor, Tensor], None]) -> Iterator[None]:
    def hook(place: Place) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: seen(place, inputs[0], output)

    handles = [linear.register_forward_hook(hook((layer, site))) for layer, site, _, linear in linears(model, sites)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
