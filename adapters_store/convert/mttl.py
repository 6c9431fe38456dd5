"""mttl's LoRAs (`.ckpt`): one alone, or a library of them behind Arrow's prototypes.

Owns its names, `MODULE.lora_a [in, r]` and `MODULE.lora_b [r, out]`, and what it says of alpha. In a library each file
is an expert; Arrow's prototypes are computed from the experts, and A and B are each mixed by themselves (`mix` rank,
mttl's default) or the outputs (`mix` output). PHATGOOSE's gates are not in these files, so it is refused. Invariant:
every tensor is read, and every expert acts on the same linear layers.

Source: microsoft/mttl (MIT), `models/modifiers/lora.py` and `containers/selectors`.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters_store.base import SITE_PATHS, BaseDims
from adapters_store.convert.arrow import Prototypes
from adapters_store.convert.foreign import Foreign, write_foreign
from adapters_store.convert.lora_mixtures import Lora, Loras, Rule, SiteLoras, sites_of
from adapters_store.convert.lora_source import LoraSource
from adapters_store.convert.option_values import OptionValues
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.source_model import SourceModel
from adapters_store.convert.tensor_files import TensorFiles, open_tensors, tensor_paths, values_by_file
from adapters_store.errors import CorruptUpload, InvalidOption, UnsupportedAdapter
from adapters_store.gates import GateOptions
from adapters_store.strict_json import Json

_PREFIXES = ("expert_weights.", "state_dict.")
_FACTOR = re.compile(
    r"(?:model\.)*layers\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<path>[a-z_]+\.[a-z_]+)\.lora_(?P<kind>[ab])\Z"
)
_KNOWN = ("alpha", "routing", "top_k", "temperature", "mix", "experts")
_ALPHA_KEYS = ("expert_info.expert_config.lora_alpha", "expert_config.lora_alpha", "lora_alpha")


@dataclass(frozen=True, slots=True)
class _Opened:
    loras: Loras
    experts: tuple[str, ...]
    recorded: dict[str, Json]


def convert_mttl(source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert one file or a library; raises AdapterRefused."""
    with _open(source, options) as opened:
        foreign = Foreign(
            family="mixture" if opened.experts else "lora",
            source_format="mttl/library" if opened.experts else "mttl/lora",
            sites=sites_of(opened.loras, LoraSource(opened.loras), options.base),
            experts=opened.experts,
            recorded=opened.recorded,
            values_read=_ALPHA_KEYS,
        )
        write_foreign(source, target, foreign, options)


@contextmanager
def open_mttl(source: Path, options: ConvertOptions) -> Iterator[SourceModel]:
    """Open what was converted before as its own forward."""
    with _open(source, options) as opened:
        yield LoraSource(opened.loras)


@contextmanager
def _open(source: Path, options: ConvertOptions) -> Iterator[_Opened]:
    values = OptionValues("an mttl checkpoint", options.declared.options, _KNOWN)
    by_name = {path.stem: path for path in tensor_paths(source)}
    names = values.names("experts", by_name) or tuple(sorted(by_name))
    if set(names) != set(by_name):
        raise InvalidOption(f"experts must name each of the {len(by_name)} files once", param="options.experts")
    rule = _rule(values, len(names))
    with ExitStack() as stack:
        found = []
        for name in names:
            alpha = _alpha(source, by_name[name], values)
            files = stack.enter_context(open_tensors([by_name[name]], _PREFIXES))
            found.append(_read(files, alpha, options.base))
        for other, name in zip(found, names, strict=True):
            if other.keys() != found[0].keys():
                raise UnsupportedAdapter(
                    f"{name} acts on other linear layers than {names[0]}; the experts must act on the same",
                    param="experts",
                )
        sites = [_site(place, tuple(own[place] for own in found), names, rule) for place in sorted(found[0])]
        yield _Opened(Loras(tuple(sites)), names if rule is not None else (), values.recorded)


def _site(place: tuple[int, str], loras: tuple[Lora, ...], names: tuple[str, ...], rule: Rule | None) -> SiteLoras:
    layer, site = place
    if rule is None:
        return SiteLoras(layer, site, loras)
    if rule.options.mix == "rank" and len({(lora.rank, lora.scaling) for lora in loras}) > 1:
        raise UnsupportedAdapter(
            f"the experts at layers.{layer} {site} differ in rank or alpha; mix=rank adds up their A and B, which must "
            "be alike",
            param="options.mix",
        )
    return SiteLoras(layer, site, loras, rule, Prototypes(loras, tuple(f"{n} at layers.{layer} {site}" for n in names)))


def _rule(values: OptionValues, num_files: int) -> Rule | None:
    """Return how a library routes; None for one LoRA alone."""
    if num_files == 1 and not values.has("routing"):
        return None
    routing = values.choice("routing", "how a library chooses: arrow", ("arrow", "phatgoose"))
    if routing == "phatgoose":
        raise UnsupportedAdapter(
            "PHATGOOSE's gates lie in the library's auxiliary data, not in its .ckpt files: train a MoLA, or use arrow",
            param="options.routing",
        )
    mix = values.choice(
        "mix", "rank: A and B are mixed, mttl's default; output: each LoRA's output", ("rank", "output")
    )
    temperature = values.number("temperature", "router_temp: 1.0 is mttl's default")
    top_k = values.whole("top_k", "moe_top_k; the number of experts for all of them, mttl's default")
    if top_k == num_files:
        options = GateOptions(logit="abs", select_all=True, weight="softmax_all", mix=mix)
        return Rule(0, temperature, options)
    return Rule(top_k, temperature, GateOptions(logit="abs", mix=mix))


def _alpha(source: Path, path: Path, values: OptionValues) -> float:
    held = values_by_file(source).get(path.name, {})
    default = next((held[key] for key in _ALPHA_KEYS if held.get(key) is not None), None)
    return values.number("alpha", "lora_alpha of the LoRAs: 16 is mttl's default", default)


def _read(files: TensorFiles, alpha: float, base: BaseDims) -> dict[tuple[int, str], Lora]:
    sites = {path: site for site, path in SITE_PATHS.items()}
    pairs: dict[tuple[int, str], dict[str, str]] = {}
    for name in sorted(files.names):
        match = _FACTOR.match(name)
        if match is None or match["path"] not in sites or int(match["layer"]) >= base.num_hidden_layers:
            raise UnsupportedAdapter(
                f"the file holds {name}, which is no LoRA of a linear layer of this base", param=name
            )
        pairs.setdefault((int(match["layer"]), sites[match["path"]]), {})[match["kind"]] = name
    return {place: _lora(files, names, alpha, base.site_shape(place[1])) for place, names in pairs.items()}


def _lora(files: TensorFiles, names: dict[str, str], alpha: float, shape: tuple[int, int]) -> Lora:
    if len(names) < 2:
        raise CorruptUpload(f"{next(iter(names.values()))} has no partner", param=next(iter(names.values())))
    a, b = names["a"], names["b"]
    rank = files.shape(a)[-1] if files.shape(a) else 0
    files.need_shape(a, (shape[1], rank))
    files.need_shape(b, (rank, shape[0]))
    return Lora(rank, alpha / max(rank, 1), lambda: files.floats(a).T, lambda: files.floats(b).T)
