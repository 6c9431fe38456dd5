"""Whether a base can do what a training job asks: its positions, its layers, the width of what S2FT selects.

Owns the arithmetic of both, for the door, which refuses the request, and for the trainer, which refuses the job.
Invariant: a spec that passes here finds room in this base; what data, experts and memory allow is not known here.
"""

from dataclasses import dataclass, replace

from adapters_store.base import SITES, BaseDims
from adapters_store.jobs.refusals import InvalidJob
from adapters_store.jobs.spec import TrainSpec
from adapters_store.jobs.spec_fields import MAX_RATIO, MIN_LENGTH, S2FT_SITES

# tokens per row where the job does not say
AUTO_MAX_LENGTH = 2048
# S2FT's sites that select inputs (columns of the weight); the others select outputs (rows)
COLUMN_SITES = frozenset({"o_proj", "down_proj"})
_DEFAULT_S2FT_SITES = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class BaseRoom:
    """What a base has room for; `windows` are the tokens that layers see which do not see all."""

    dims: BaseDims
    num_positions: int
    windows: tuple[int, ...] = ()


def fit_job(spec: TrainSpec, base: BaseRoom) -> TrainSpec:
    """Return the spec with its `max_length` decided; raises InvalidJob for what this base has no room for."""
    if spec.family == "s2ft":
        _check_channels(spec, base.dims)
    return fit_length(spec, base)


def fit_length(spec: TrainSpec, base: BaseRoom) -> TrainSpec:
    """Return the spec with its `max_length` decided; raises InvalidJob for more tokens than the base takes."""
    num_virtual = spec.num_virtual_tokens if spec.family == "prompt" else 0
    room = base.num_positions - num_virtual
    if room < MIN_LENGTH:
        raise InvalidJob(
            "num_virtual_tokens",
            f"num_virtual_tokens is {num_virtual}; the base has {base.num_positions} positions, of which "
            f"{MIN_LENGTH} must remain for the data: send at most {base.num_positions - MIN_LENGTH}",
        )
    if spec.max_length is None:
        return replace(spec, max_length=min(AUTO_MAX_LENGTH, room, *(base.windows if spec.packing else ())))
    if spec.max_length > room:
        beside = f", {num_virtual} of them the prompt's" if num_virtual else ""
        raise InvalidJob(
            "max_length", f"max_length is {spec.max_length} tokens; the base has {base.num_positions} positions{beside}"
        )
    if spec.packing and base.windows and min(base.windows) < spec.max_length:
        raise InvalidJob(
            "packing",
            f"packing masks whole lines, and layers of this base see {min(base.windows)} tokens only: set max_length "
            "to at most that, or packing to false",
        )
    return spec


def s2ft_sites(spec: TrainSpec) -> tuple[str, ...]:
    """Return the sites that S2FT trains."""
    if spec.target_modules == SITES:
        return S2FT_SITES
    return spec.target_modules or _DEFAULT_S2FT_SITES


def num_channels(spec: TrainSpec, layer: int, width: int, other: int) -> int:
    """Return S2FT's budget at one place: as given, a share, or as many parameters as a LoRA of the spec's rank has.

    Args:
        width: channels of the side that is selected; `other`: of the other side.
    Raises:
        InvalidJob: more than a quarter of them.
    """
    if spec.channels:
        param, count = "channels", spec.channels[layer] if len(spec.channels) > 1 else spec.channels[0]
    elif spec.ratio is not None:
        param, count = "ratio", max(1, int(spec.ratio * width))
    else:
        param, count = "rank", max(1, spec.rank * (width + other) // other)
    if count > int(MAX_RATIO * width):
        # a rank's budget in channels is our arithmetic, not the client's number
        cause = f" (the budget of rank {spec.rank})" if param == "rank" else ""
        raise InvalidJob(
            param, f"layer {layer}: {count} of {width} channels{cause}; the limit is {MAX_RATIO:.0%} ({width // 4})"
        )
    return count


def _check_channels(spec: TrainSpec, dims: BaseDims) -> None:
    num_layers = dims.num_hidden_layers
    if len(spec.channels) > 1 and len(spec.channels) != num_layers:
        raise InvalidJob("channels", f"channels has {len(spec.channels)} numbers; the base has {num_layers} layers")
    total = 0
    for site in s2ft_sites(spec):
        num_out, num_in = dims.site_shape(site)
        width, other = (num_in, num_out) if site in COLUMN_SITES else (num_out, num_in)
        total += sum(num_channels(spec, layer, width, other) for layer in range(num_layers))
    if not total:
        raise InvalidJob("channels", "channels is 0 for every layer: nothing would be trained; send at least one")
