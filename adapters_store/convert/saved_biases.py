"""PEFT's `bias: all` and `bias: <kind>_only`: the base's own biases, trained and saved as they are.

Owns their tensors and what becomes of them: `bias = saved - base`, added to what the kind itself does. Invariant: a
layer whose base has no bias gets none.
"""

from dataclasses import dataclass, replace

import numpy as np

from adapters_store.base import SITE_PATHS, BaseDims
from adapters_store.convert.peft_tensors import SITES_OF, PeftModule, PeftTensors, TensorFile, check_shape
from adapters_store.convert.tuner import Array, Delta, Factors, Float64, PlannedModule, ScaledDelta, TurningDelta
from adapters_store.errors import CorruptUpload, UnsupportedAdapter
from adapters_store.float_bits import Float32
from adapters_store.safetensors_header import TensorSlot

_WRAPPED, _PLAIN = "base_layer.bias", "bias"


@dataclass(frozen=True, slots=True)
class BiasedDelta:
    """What the kind does, None for a layer where it does nothing, and the layer's bias: saved and the base's [out]."""

    inner: Delta | None
    saved: Float32
    base: Float32
    num_in: int

    def factors(self) -> Factors:
        """Return what is served."""
        moved: Array = self.saved.astype(np.float64) - self.base
        if self.inner is None:
            return Factors(np.zeros((0, self.num_in)), np.zeros((len(moved), 0)), moved)
        factors = self.inner.factors()
        return replace(factors, bias=moved if factors.bias is None else factors.bias + moved)

    def apply(self, x: Float64) -> Float64:
        """Return what PEFT adds."""
        y = np.zeros((len(x), len(self.saved))) if self.inner is None else self.inner.apply(x)
        added: Float64 = y + self.saved.astype(np.float64) - self.base.astype(np.float64)
        return added

    def scales(self) -> tuple[Float64 | None, Float64 | None]:
        """Return the kind's own scales."""
        return self.inner.scales() if isinstance(self.inner, ScaledDelta) else (None, None)

    def turned_inputs(self, x: Float64) -> Float64:
        """Return the kind's own rotation of inputs."""
        return self.inner.turned_inputs(x) if isinstance(self.inner, TurningDelta) else x

    def turned_outputs(self, u: Float64) -> Float64:
        """Return the kind's own rotation of outputs."""
        return self.inner.turned_outputs(u) if isinstance(self.inner, TurningDelta) else u


def with_biases(
    planned: dict[str, PlannedModule], tensors: PeftTensors, base: BaseDims, bias: str
) -> dict[str, PlannedModule]:
    """Return the modules with the biases that the file holds.

    Args:
        bias: the config's key: "none", "all", or a kind's name with "_only".
    Raises:
        CorruptUpload: a bias lacks that the config trains. UnsupportedAdapter: one that it does not train.
    """
    if bias == "none":
        return planned
    made = dict(planned)
    for place, part in tensors.outer.names(_WRAPPED, _PLAIN):
        path = f"{tensors.prefix}{place}"
        slot = tensors.outer.take((place, part))
        assert slot is not None, "it was just listed"
        if (part == _WRAPPED) != (path in planned) or (bias != "all" and part == _PLAIN):
            raise UnsupportedAdapter(f"the file holds {slot.name}, which bias '{bias}' does not train", param=slot.name)
        _, number, module = place.split(".", 2)
        source = planned[path].source if path in planned else PeftModule(path, int(number), module, {})
        made[path] = _with_bias(planned.get(path), source, slot, tensors, base)
    trained = {
        (plan.source.layer, site)
        for plan in made.values()
        if plan is not planned.get(plan.source.path)
        for site in plan.source.sites
    }
    sources = [plan.source for plan in planned.values()]
    wanted = {(source.layer, site): source.path for source in sources for site in source.sites}
    if bias == "all":
        wanted |= {
            (layer, site): f"{tensors.prefix}layers.{layer}.{path}"
            for layer in range(base.num_hidden_layers)
            for site, path in SITE_PATHS.items()
        }
    for (layer, site), path in wanted.items():
        if (layer, site) not in trained and tensors.weights.bias(layer, (site,)) is not None:
            raise CorruptUpload(f"bias is '{bias}', but the file has no bias of {path}", param=path)
    return made


def _with_bias(
    plan: PlannedModule | None, source: PeftModule, slot: TensorSlot, tensors: PeftTensors, base: BaseDims
) -> PlannedModule:
    own = tensors.weights.bias(source.layer, source.sites) if source.module in SITES_OF else None
    if own is None:
        raise UnsupportedAdapter(f"{slot.name} is the bias of a layer that has none in this base", param=slot.name)
    num_out, num_in = source.dims(base)
    check_shape(slot, (num_out,))

    def load(file: TensorFile) -> BiasedDelta:
        return BiasedDelta(None if plan is None else plan.load(file), file.floats(slot), own, num_in)

    if plan is None:
        return PlannedModule(source, 0, True, ((slot, (num_out,)),), load)
    return replace(plan, has_bias=True, shapes=(*plan.shapes, (slot, (num_out,))), load=load)
