"""Arrow (PEFT's `create_arrow_model`): a folder of LoRAs behind prototypes -> canonical mixture.

Owns the prototypes: per linear layer and LoRA the top right singular vector of B A, computed exactly; PEFT comes near
it in fifteen steps from a random start. The gate is |x prototype|, the best k, softmax / temperature. GenKnowSub, where
`general` names LoRAs, subtracts the means of their A and of their B from each task's first. Invariant: nothing that
shapes the result is assumed: what neither `arrow_config` nor the options say is asked for by name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters_store.convert.expert_loras import ExpertLora, expert_names, open_experts
from adapters_store.convert.foreign import Foreign, write_foreign
from adapters_store.convert.lora_mixtures import Lora, Loras, Rule, SiteLoras, sites_of
from adapters_store.convert.lora_source import LoraSource
from adapters_store.convert.moe_config import read_config_file
from adapters_store.convert.option_values import OptionValues
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.source_model import SourceModel
from adapters_store.errors import AdapterWithoutEffect, InvalidOption, NonFiniteValues, UnsupportedAdapter
from adapters_store.float_bits import Float32
from adapters_store.gates import GateOptions
from adapters_store.parts import CONFIG_PART, WEIGHTS_PART
from adapters_store.strict_json import Json

_KNOWN = ("top_k", "temperature", "experts", "general")
_ARROW_KEYS = frozenset(
    {"top_k", "router_temperature", "use_gks", "task_adapter_names", "gks_adapter_names", "rng_seed"}
)
_ABS = GateOptions(logit="abs")
# two singular values this near to each other leave the direction to rounding
_MIN_GAP = 1e-6


@dataclass(frozen=True, slots=True)
class _Arrow:
    rule: Rule
    experts: tuple[str, ...]
    general: tuple[str, ...]
    recorded: dict[str, Json]


def convert_arrow(source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert the folder of LoRAs `source`; raises AdapterRefused."""
    arrow = _read(source, options.declared.options)
    with open_arrow_loras(source, options) as loras:
        foreign = Foreign(
            family="mixture",
            source_format="peft/ARROW",
            sites=sites_of(loras, LoraSource(loras), options.base),
            experts=arrow.experts,
            recorded=arrow.recorded,
            # the router's own LoRA is a shell that carries the config
            ignored=(WEIGHTS_PART,) if (source / WEIGHTS_PART).exists() else (),
        )
        write_foreign(source, target, foreign, options)


@contextmanager
def open_arrow(source: Path, options: ConvertOptions) -> Iterator[SourceModel]:
    """Open a folder that was converted before as its own forward."""
    with open_arrow_loras(source, options) as loras:
        yield LoraSource(loras)


@contextmanager
def open_arrow_loras(source: Path, options: ConvertOptions) -> Iterator[Loras]:
    """Open the experts of every linear layer with their prototypes."""
    arrow = _read(source, options.declared.options)
    with open_experts(source, (*arrow.experts, *arrow.general), options.base) as found:
        tasks, general = found[: len(arrow.experts)], found[len(arrow.experts) :]
        _check_ranks(found)
        sites = []
        for layer, site in sorted(tasks[0].loras):
            own = tuple(_without(task.loras[layer, site], general, layer, site) for task in tasks)
            names = tuple(f"experts/{task.name} at layers.{layer} {site}" for task in tasks)
            sites.append(SiteLoras(layer, site, own, arrow.rule, Prototypes(own, names)))
        yield Loras(tuple(sites))


def top_direction(lora: Lora, what: str) -> Float32:
    """Return the top right singular vector of B A [in], of length one; its sign means nothing.

    Raises:
        AdapterWithoutEffect: the product is zero. UnsupportedAdapter: its direction is not defined.
        NonFiniteValues: NaN or infinity in a factor.
    """
    a, b = lora.a().astype(np.float64), lora.b().astype(np.float64)
    if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        raise NonFiniteValues(f"{what} holds NaN or infinity", param="experts")
    # of the orthogonal factors of A^T and B the small middle keeps all singular values
    q, r = np.linalg.qr(a.T)
    _, values, vh = np.linalg.svd(np.linalg.qr(b, mode="r") @ r.T)
    if values[0] == 0:
        raise AdapterWithoutEffect(f"{what} is zero, so Arrow has no direction for it", param="experts")
    if len(values) > 1 and values[1] > values[0] * (1 - _MIN_GAP):
        raise UnsupportedAdapter(
            f"the two largest singular values of {what} are equal ({values[0]:g}), so Arrow's direction is not defined",
            param="experts",
        )
    direction: Float32 = (q @ vh[0]).astype(np.float32)
    return direction


class Prototypes:
    """The gate of one linear layer [experts, in], computed when it is asked for."""

    def __init__(self, loras: tuple[Lora, ...], names: tuple[str, ...]) -> None:
        self._loras = loras
        self._names = names
        self._values: Float32 | None = None

    def __call__(self) -> Float32:
        if self._values is None:
            self._values = np.stack([top_direction(*each) for each in zip(self._loras, self._names, strict=True)])
        return self._values


def _without(task: Lora, general: tuple[ExpertLora, ...], layer: int, site: str) -> Lora:
    """Return a task's LoRA without the mean of the general ones, A and B each by itself, as GenKnowSub does."""
    if not general:
        return task
    own = [each.loras[layer, site] for each in general]

    def less(values: Float32, others: list[Float32]) -> Float32:
        return values - np.mean(np.stack(others), axis=0, dtype=np.float32)

    return Lora(
        task.rank,
        task.scaling,
        lambda: less(task.a(), [each.a() for each in own]),
        lambda: less(task.b(), [each.b() for each in own]),
    )


def _check_ranks(experts: tuple[ExpertLora, ...]) -> None:
    ranks = {lora.rank for expert in experts for lora in expert.loras.values()}
    if len(ranks) > 1:
        raise UnsupportedAdapter(
            f"the LoRAs have ranks {sorted(ranks)}; Arrow stacks them, so they must have the same", param="experts"
        )


def _read(source: Path, options: dict[str, Json]) -> _Arrow:
    """Read the options, and `arrow_config` for what they leave open; raises InvalidOption, UnsupportedAdapter."""
    config = _arrow_config(source)
    values = OptionValues("an Arrow mixture", options, _KNOWN)
    found = expert_names(source)
    general = values.names("general", found) or ()
    if (config.get("use_gks") is True) != bool(general) and config:
        raise InvalidOption(
            "arrow_config and the option general disagree: with use_gks true name the general LoRAs, else none",
            param="options.general",
        )
    experts = values.names("experts", found) or tuple(name for name in found if name not in general)
    if set(experts) & set(general) or {*experts, *general} != set(found):
        raise InvalidOption(
            f"experts and general must name each of the {len(found)} LoRAs of the upload once", param="options.experts"
        )
    return _Arrow(
        rule=Rule(
            values.whole(
                "top_k", "how many LoRAs act on a token: 3 in PEFT unless arrow_config says", config.get("top_k")
            ),
            values.number(
                "temperature",
                "what the chosen similarities are divided by: 1.0 is PEFT's default",
                config.get("router_temperature"),
            ),
            _ABS,
        ),
        experts=experts,
        general=general,
        recorded={**values.recorded, **({"arrow_config": {**config}} if config else {})},
    )


def _arrow_config(source: Path) -> dict[str, Json]:
    """Return the router's `arrow_config`; nothing where the upload has none."""
    if not (source / CONFIG_PART).exists():
        return {}
    config = read_config_file(source).get("arrow_config")
    if not isinstance(config, dict):
        raise UnsupportedAdapter(f"{CONFIG_PART} beside the experts has no arrow_config", param="arrow_config")
    unknown = sorted(config.keys() - _ARROW_KEYS)
    if unknown:
        raise UnsupportedAdapter(
            f"arrow_config holds {unknown[0][:80]!a}, which this server does not know", param="arrow_config"
        )
    return config
