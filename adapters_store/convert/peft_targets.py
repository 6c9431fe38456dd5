"""Which modules PEFT puts an adapter on: target, exclude and layer keys, which all of its tuners share.

Owns the matching of module paths and the refusal of targets that are not served. Invariant: `is_target` agrees with
PEFT for every path of a decoder layer, and no text from the config is run as a regular expression.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from adapters_store.convert.config_values import Config
from adapters_store.convert.peft_patterns import names_module, read_names
from adapters_store.errors import NoTarget, UnsupportedAdapter


@dataclass(frozen=True, slots=True)
class DefaultTargets:
    """PEFT's own choice for a tuner when `target_modules` is null, and the served architectures that it lists."""

    names: tuple[str, ...]
    model_types: frozenset[str]


MOST_TARGETS = DefaultTargets(
    ("q_proj", "v_proj"), frozenset({"llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"})
)


@dataclass(frozen=True, slots=True)
class Targets:
    """`names` is None for all linear layers but the head; `layers` is None for all decoder layers.

    `is_whole`: a name means the module of that path, and none whose path ends like it.
    """

    names: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: frozenset[int] | None
    is_whole: bool = False

    def is_target(self, path: str, layer: int | None) -> bool:
        """Return whether PEFT adapts the module at `path`; `layer` is None for what lies outside all layers."""
        if any(names_module(name, path) for name in self.excluded):
            return False
        if self.names is None:
            return layer is not None
        if path in self.names:
            # PEFT filters by layer only where a target matched as a suffix
            return True
        found = not self.is_whole and any(names_module(name, path) for name in self.names)
        return found and (self.layers is None or layer in self.layers)

    def unused(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Return the targets that name none of these modules, as `target_modules[name]`."""
        paths = list(paths)
        names = self.names or ()
        used = {
            name for name in names for path in paths if path == name or (not self.is_whole and names_module(name, path))
        }
        return tuple(f"target_modules[{name}]" for name in names if name not in used)


NO_TARGETS = Targets(names=(), excluded=(), layers=None)


def read_targets(config: Config, model_type: str, default: DefaultTargets) -> Targets:
    """Read the keys that choose modules.

    Raises:
        UnsupportedAdapter: a value that is wrong, needs a regex engine or is not served; `param` is its key.
    """
    return Targets(
        names=_names(config, model_type, default),
        excluded=read_names(config.get("exclude_modules"), "exclude_modules"),
        layers=_layers(config),
    )


def _names(config: Config, model_type: str, default: DefaultTargets) -> tuple[str, ...] | None:
    value = config.get("target_modules")
    if isinstance(value, str) and value.lower() == "all-linear":
        return None
    if value is None and model_type in default.model_types:
        return default.names
    names = read_names(value, "target_modules")
    if not names:
        raise NoTarget("target_modules is empty; list the modules that the adapter acts on", param="target_modules")
    return names


def _layers(config: Config) -> frozenset[int] | None:
    value = config.get("layers_to_transform")
    pattern = config.get("layers_pattern")
    names = [pattern] if isinstance(pattern, str) and pattern else pattern or ["layers"]
    if not isinstance(names, list) or not any(name in ("layers", "model.layers") for name in names):
        raise UnsupportedAdapter(
            f"layers_pattern is {ascii(pattern)[:80]}; layers are called 'layers' in every base here",
            param="layers_pattern",
        )
    if value is None or value == []:
        return None
    if isinstance(config.get("target_modules"), str):
        raise UnsupportedAdapter(
            "layers_to_transform needs target_modules to be a list of module names", param="layers_to_transform"
        )
    numbers = value if isinstance(value, list) else [value]
    layers = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 16]
    if len(layers) != len(numbers):
        raise UnsupportedAdapter("layers_to_transform must hold layer numbers from 0", param="layers_to_transform")
    return frozenset(layers)
