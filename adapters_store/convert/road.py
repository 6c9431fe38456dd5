"""PEFT's RoAd: outputs rotate in pairs, `y' = c0 * y + c1 * (-y2, y1)` within every group, the base's bias included.

Owns RoAd's keys and formula. Invariant: `out_rot2` rotates the base's product only, so what the rotation does to the
base's bias is stored as a bias of its own.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import BaseDims
from adapters_store.convert.config_values import Config, read_whole
from adapters_store.convert.peft_keys import common_rules, used
from adapters_store.convert.peft_tensors import PeftModule, PeftTensors, TensorFile
from adapters_store.convert.tuner import Factors, Float64, PlannedModule, Rotation, Served
from adapters_store.errors import UnsupportedAdapter
from adapters_store.float_bits import Float32

_NAMES = ("road_theta", "road_alpha")
# angles per output
_ANGLES = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}


@dataclass(frozen=True, slots=True)
class _Delta:
    """theta and alpha [angles]; bias [out] is the base's."""

    theta: Float32
    alpha: Float32
    variant: str
    group: int
    bias: Float32 | None
    dims: tuple[int, int]

    def factors(self) -> Factors:
        num_out, num_in = self.dims
        theta, alpha = self.theta.astype(np.float64), self.alpha.astype(np.float64)
        first, second = alpha * np.cos(theta), alpha * np.sin(theta)
        if self.variant == "road_1":
            first, second = (_twice(values, self.group // 2) for values in (first, second))
        elif self.variant == "road_4":
            first, second = first.reshape(-1, 2, self.group)[:, 0], second.reshape(-1, 2, self.group)[:, 1]
        rotation = Rotation(first.reshape(-1), second.reshape(-1), self.group)
        moved = None
        if self.bias is not None:
            bias = self.bias.astype(np.float64)
            halves = bias.reshape(-1, 2, self.group // 2)
            partner = np.stack([-halves[:, 1], halves[:, 0]], axis=1).reshape(-1)
            moved = rotation.c0 * bias + rotation.c1 * partner - bias
        return Factors(np.zeros((0, num_in)), np.zeros((num_out, 0)), moved, rotation=rotation)

    def apply(self, x: Float64) -> Float64:
        added = np.zeros((len(x), self.dims[0]))
        if self.bias is None:
            return added
        bias = self.bias.astype(np.float64)[None]
        return added + (self.turned_outputs(bias) - bias)

    def turned_inputs(self, x: Float64) -> Float64:
        """Return x: RoAd leaves it alone."""
        return x

    def turned_outputs(self, u: Float64) -> Float64:
        """Return the rotated outputs, output by output."""
        turned, half = np.empty_like(u), self.group // 2
        for at in range(u.shape[1]):
            begin, place = at - at % self.group, at % self.group
            partner = -u[:, at + half] if place < half else u[:, at - half]
            cosine, sine = self._angles(begin // self.group, place)
            turned[:, at] = cosine * u[:, at] + sine * partner
        return turned

    def _angles(self, group: int, place: int) -> tuple[float, float]:
        """Return alpha cos(theta) and alpha sin(theta) of one output."""
        half = self.group // 2
        if self.variant == "road_1":
            cosine = sine = group * half + place % half
        elif self.variant == "road_2":
            cosine = sine = group * self.group + place
        else:
            cosine = group * 2 * self.group + place
            sine = cosine + self.group
        theta, alpha = self.theta.astype(np.float64), self.alpha.astype(np.float64)
        return float(alpha[cosine] * np.cos(theta[cosine])), float(alpha[sine] * np.sin(theta[sine]))


def _twice(values: Float64, half: int) -> Float64:
    """Return each half group's values for the first half of the group and again for the second."""
    repeated: Float64 = np.repeat(values.reshape(-1, 1, half), 2, axis=1).reshape(-1)
    return repeated


@dataclass(frozen=True, slots=True)
class _Tuner:
    variant: str
    group: int

    def plan(self, tensors: PeftTensors, base: BaseDims) -> dict[str, PlannedModule]:
        """Return angles and lengths of every module."""
        tensors.take_shared()
        return {path: self._plan_module(module, tensors, base) for path, module in tensors.modules.items()}

    def unused(self, paths: list[str]) -> tuple[str, ...]:
        """Return nothing: there are no patterns."""
        return ()

    def _plan_module(self, module: PeftModule, tensors: PeftTensors, base: BaseDims) -> PlannedModule:
        slots = module.take(*_NAMES)
        num_out, num_in = module.dims(base)
        for site in module.sites:
            if base.site_shape(site)[0] % self.group:
                raise UnsupportedAdapter(
                    f"group_size {self.group} does not divide the {base.site_shape(site)[0]} outputs of {site}",
                    param="group_size",
                )
        bias = tensors.weights.bias(module.layer, module.sites)

        def load(file: TensorFile) -> _Delta:
            theta, alpha = (file.floats(slot) for slot in slots)
            return _Delta(theta, alpha, self.variant, self.group, bias, (num_out, num_in))

        shape = (int(num_out * _ANGLES[self.variant]),)
        return PlannedModule(
            module, 0, bias is not None, tuple((slot, shape) for slot in slots), load, rotation_group=self.group
        )


def _read(config: Config) -> _Tuner:
    variant = config.get("variant", "road_1")
    if not isinstance(variant, str) or variant not in _ANGLES:
        raise UnsupportedAdapter(f"variant is {ascii(variant)[:40]}; read here: {', '.join(_ANGLES)}", param="variant")
    group = read_whole(config, "group_size", 64, least=2)
    if group % 2:
        raise UnsupportedAdapter(f"group_size is {group}; outputs rotate in pairs: it must be even", param="group_size")
    return _Tuner(variant, group)


ROAD = Served(
    title="RoAd",
    served_as="rotation of outputs, kept in fp32; a bias where the base has one that is rotated too",
    limits="needs the base's weights at hand",
    rules=(
        *common_rules("init_weights"),
        used("variant", "road_1, road_2 or road_4: how many angles there are"),
        used("group_size", "outputs that rotate among each other"),
    ),
    parts=frozenset(_NAMES),
    read=_read,
    recorded=("variant", "group_size"),
)
