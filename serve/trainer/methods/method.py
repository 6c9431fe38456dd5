"""What every method of training is to the loop: parameters on a frozen base, a forward pass, an export.

Owns the protocol and what methods share of the model. Invariant: attaching twice with the same base, spec, data and
seed gives bit-equal models, so a resumed run attaches again and then loads what was trained.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from adapters_store.base import SITE_PATHS, SITES
from adapters_store.jobs.spec import TrainSpec
from adapters_store.strict_json import Json
from serve.trainer.batching import Batch
from serve.trainer.progress import NamedAdapter, TrainingFailed

# layers of a decoder by the names that Hugging Face's models give them
_LAYERS = "model.layers"
# what a method may show besides the loss
SHOWN = ("gate_loss", "gate_accuracy")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a method may read when it attaches: the resolved spec, adapters of the registry, the first batches."""

    spec: TrainSpec
    experts: tuple[NamedAdapter, ...]
    disjoint_with: tuple[NamedAdapter, ...]
    # a few batches of the training data in a fixed order, for methods that look at activations or gradients first
    calibration: tuple[Batch, ...]


@dataclass(frozen=True, slots=True)
class Losses:
    """One forward pass: `logits` [B, T, V] in the model's dtype; `extra` is added to the mean loss of learnt tokens.

    `shown` are sums over tokens by names of `SHOWN`, `counted` how many tokens each is a sum of.
    """

    logits: Tensor
    extra: Tensor | None = None
    shown: Mapping[str, float] = field(default_factory=dict)
    counted: int = 0


@dataclass(frozen=True, slots=True)
class Upload:
    """How the exported files are declared at the store's door."""

    format: str
    options: dict[str, Json]


class Attached(Protocol):
    """A model with its trained parameters in place."""

    @property
    def model(self) -> nn.Module:
        """The module whose mode and checkpointing the loop sets."""
        ...

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by a name that is stable between processes."""
        ...

    def forward(self, batch: Batch, share: float) -> Losses:
        """Run one batch, which holds `share` of the learnt tokens of its step."""
        ...

    def frozen_choice(self) -> dict[str, Tensor]:
        """Return what attaching chose and training does not move, e.g. selected channels; compared on resuming."""
        ...

    def export(self, folder: Path) -> Upload:
        """Write the files of one upload into an empty folder."""
        ...


class Method(Protocol):
    """Puts a family's parameters into a loaded base."""

    def __call__(self, model: nn.Module, setting: Setting) -> Attached:
        """Freeze the base and attach; raises TrainingFailed."""
        ...


def linears(model: nn.Module, sites: tuple[str, ...]) -> Iterator[tuple[int, str, nn.Module, nn.Linear]]:
    """Yield (layer, site, parent module, linear layer) of the sites, layer by layer.

    Raises:
        TrainingFailed: this kind of model has no such layer, e.g. because it fuses several.
    """
    for layer, block in enumerate(model.get_submodule(_LAYERS).children()):
        for site in SITES:
            if site not in sites:
                continue
            outer, _, name = SITE_PATHS[site].rpartition(".")
            try:
                parent = block.get_submodule(outer)
                linear = parent.get_submodule(name)
            except AttributeError:
                raise TrainingFailed(
                    "bad_spec", f"this base has no separate {site} in layer {layer}: leave it out of target_modules"
                ) from None
            if not isinstance(linear, nn.Linear):
                raise TrainingFailed("bad_spec", f"{site} of layer {layer} is no plain linear layer")
            yield layer, site, parent, linear


def plain_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits [B, T, V] of a causal model."""
    inputs: dict[str, object] = {"input_ids": batch.token_ids, "use_cache": False}
    if batch.mask is not None:
        inputs |= {"attention_mask": batch.mask, "position_ids": batch.positions}
    logits: Tensor = model(**inputs).logits
    return logits
