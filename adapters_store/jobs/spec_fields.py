"""The white list of a training job: one check per field, with its type and its cap.

Owns the caps. Invariant: a check returns the value as `TrainSpec` holds it or raises InvalidJob with the field's name;
a boolean is never taken for a number, and no string is passed on that is not in a list here or a name of an adapter.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from adapters_store.base import SITES
from adapters_store.jobs.refusals import InvalidJob
from adapters_store.strict_json import Json

FAMILIES = ("lora", "s2ft", "meteora", "ia3", "prompt")
INITS = ("default", "gaussian", "pissa", "olora", "eva")
DTYPES = ("float32", "bfloat16")
# the first four are the method's plain names: activation norms small first, the others large first
SELECTIONS = (
    "random",
    "activation-small",
    "weight",
    "gradient",
    "activation-large",
    "weight-small",
    "gradient-small",
)
S2FT_SITES = ("v_proj", "o_proj", "up_proj", "down_proj")

MAX_RANK, MAX_ALPHA, MAX_EXPERTS, MAX_TOP_K = 256, 1e4, 128, 8
MAX_EPOCHS, MAX_BATCH, MAX_STEPS, MAX_LENGTH, MAX_ACCUMULATION = 50, 256, 1_000_000, 32_768, 64
# tokens of a row
MIN_LENGTH = 8
# of a layer's channels, as the store's limit on served adapters
MAX_RATIO = 0.25

# a name with its owner, version or digest; it is looked up in the registry, never opened
_SELECTOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,271}\Z")

Check = Callable[[str, Json], Any]


def _whole(name: str, value: Json, *, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidJob(name, f"{name} is {_shown(value)}; it must be a whole number from {low} to {high}")
    return value


def _real(name: str, value: Json, *, low: float, high: float, is_open: bool = False) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # a huge whole number has no float
    number = float(value) if is_number and abs(value) < 1e300 else math.nan  # type: ignore[arg-type]
    if not low <= number <= high or (is_open and number == low):
        bound = "above" if is_open else "from"
        raise InvalidJob(name, f"{name} is {_shown(value)}; it must be a number {bound} {low:g} up to {high:g}")
    return number


def _flag(name: str, value: Json) -> bool:
    if not isinstance(value, bool):
        raise InvalidJob(name, f"{name} is {_shown(value)}; it must be true or false")
    return value


def _one_of(name: str, value: Json, *, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise InvalidJob(name, f"{name} is {_shown(value)}; known: {', '.join(known)}")
    return value


def _sites(name: str, value: Json) -> tuple[str, ...]:
    if value in ("all-linear", ["all-linear"]):
        return SITES
    wanted = f"it must be 'all-linear' or a list of {', '.join(SITES)}"
    if not isinstance(value, list):
        raise InvalidJob(name, f"{name} is {_shown(value)}; {wanted}")
    for site in value:
        if not isinstance(site, str) or site not in SITES:
            raise InvalidJob(name, f"{name} holds {_shown(site)}; {wanted}")
    if len(set(map(str, value))) != len(value):
        raise InvalidJob(name, f"{name} names a module twice")
    return tuple(site for site in SITES if site in value)


def _channels(name: str, value: Json) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if len(values) > 1024:
        raise InvalidJob(name, f"{name} has {len(values)} numbers; one for all layers or one per layer is wanted")
    return tuple(_whole(name, each, low=0, high=1 << 20) for each in values)


def _names(name: str, value: Json, *, high: int) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > high:
        given = f"has {len(value)} names" if isinstance(value, list) else f"is {_shown(value)}"
        raise InvalidJob(name, f"{name} {given}; it must be a list of at most {high} names of adapters")
    for each in value:
        if not isinstance(each, str) or not _SELECTOR.match(each):
            raise InvalidJob(name, f"{name} holds {_shown(each)}; the name of an adapter is wanted")
    if len(set(map(str, value))) != len(value):
        raise InvalidJob(name, f"{name} names an adapter twice")
    return tuple(map(str, value))


def _shown(value: Json) -> str:
    # a whole number of thousands of digits has no text in Python, and a list's text may be of any size
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 64:
        return "a number beyond 64 bits"
    return ascii(value)[:60] if isinstance(value, str | int | float | bool) else f"a {type(value).__name__}"


def _count(high: int, low: int = 1) -> Check:
    return partial(_whole, low=low, high=high)


def _number(high: float, low: float = 0.0, *, is_open: bool = False) -> Check:
    return partial(_real, low=low, high=high, is_open=is_open)


CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "family": partial(_one_of, known=FAMILIES),
        "rank": _count(MAX_RANK),
        "alpha": _number(MAX_ALPHA, is_open=True),
        "dropout": _number(0.9),
        "target_modules": _sites,
        "init": partial(_one_of, known=INITS),
        "use_dora": _flag,
        "use_rslora": _flag,
        "selection": partial(_one_of, known=SELECTIONS),
        "ratio": _number(MAX_RATIO, is_open=True),
        "channels": _channels,
        "disjoint_with": partial(_names, high=MAX_EXPERTS),
        "experts": partial(_names, high=MAX_EXPERTS),
        "top_k": _count(MAX_TOP_K),
        "temperature": _number(1e3, is_open=True),
        "train_experts": _flag,
        "gate_loss_weight": _number(1e3),
        "balanced": _flag,
        "num_virtual_tokens": _count(4096),
        "n_epochs": _count(MAX_EPOCHS),
        "batch_size": _count(MAX_BATCH),
        "max_steps": _count(MAX_STEPS),
        "learning_rate": _number(1.0, is_open=True),
        "learning_rate_multiplier": _number(1e3, is_open=True),
        "max_length": _count(MAX_LENGTH, low=MIN_LENGTH),
        "packing": _flag,
        "warmup": _number(1.0),
        "weight_decay": _number(1.0),
        "max_grad_norm": _number(1e3, is_open=True),
        "gradient_accumulation": _count(MAX_ACCUMULATION),
        "gradient_checkpointing": _flag,
        "dtype": partial(_one_of, known=DTYPES),
        "validation_split": _number(0.5),
        "eval_every": _count(MAX_STEPS),
        "checkpoint_every": _count(MAX_STEPS),
        "early_stopping": _count(1000),
        "seed": _count((1 << 31) - 1, low=0),
    }
)
# fields that mean nothing to other families: set there, they would be silently ignored
FAMILY_FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("alpha", "dropout", "init", "use_dora", "use_rslora"), ("lora",)),
        "rank": ("lora", "s2ft"),
        "target_modules": ("lora", "s2ft", "ia3"),
        **dict.fromkeys(("selection", "ratio", "channels", "disjoint_with"), ("s2ft",)),
        **dict.fromkeys(
            ("experts", "top_k", "temperature", "train_experts", "gate_loss_weight", "balanced"), ("meteora",)
        ),
        "num_virtual_tokens": ("prompt",),
    }
)


def refuse_empty(values: Mapping[str, Json]) -> None:
    """Refuse lists that a client sends empty: a spec's own JSON has them for "the default"; raises InvalidJob."""
    for name in ("target_modules", "channels"):
        if values.get(name) == []:
            raise InvalidJob(
                name, f"{name} is an empty list, so nothing would be trained; leave it out for the default"
            )


def task_label(expert: str) -> str:
    """Return what data calls an expert: its name without `@version`."""
    return expert.partition("@")[0]


def check_together(values: Mapping[str, Any], family: str) -> None:
    """Refuse fields that exclude each other, or lack each other; raises InvalidJob."""
    for one, other in (("learning_rate", "learning_rate_multiplier"), ("ratio", "channels")):
        if one in values and other in values:
            raise InvalidJob(one, f"{one} and {other} say the same thing twice; send one of them")
    if values.get("use_dora") and values.get("init", "default") in ("pissa", "olora"):
        raise InvalidJob("use_dora", f"DoRA cannot start from init {values['init']}, which changes the base's weights")
    if values.get("dtype") == "bfloat16" and values.get("init", "default") in ("pissa", "olora"):
        raise InvalidJob(
            "dtype", f"init {values['init']} changes the base's weights, which bfloat16 would round; use float32"
        )
    if values.get("packing") and family == "prompt":
        raise InvalidJob("packing", "a prompt stands before every row, so rows cannot share a line: leave packing out")
    if family == "meteora":
        experts = values.get("experts", ())
        if len(experts) < 2:
            raise InvalidJob("experts", f"a meteora job needs at least 2 experts; {len(experts)} were named")
        if len({task_label(name) for name in experts}) < len(experts):
            raise InvalidJob("experts", "experts names one adapter in two versions, which data could not tell apart")
        if values.get("top_k", 2) > len(experts):
            raise InvalidJob("top_k", f"top_k is {values['top_k']}; there are {len(experts)} experts")
    if family == "s2ft":
        wrong = [site for site in values.get("target_modules", ()) if site not in S2FT_SITES]
        # all-linear means all that the method knows
        if wrong and values["target_modules"] != SITES:
            raise InvalidJob("target_modules", f"S2FT trains {', '.join(S2FT_SITES)}, not {wrong[0]}")
    if "early_stopping" in values and "eval_every" not in values:
        raise InvalidJob("early_stopping", "early_stopping counts evaluations; set eval_every too")
