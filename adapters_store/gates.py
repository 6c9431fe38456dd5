"""How a mixture weighs its experts: the gate's options, their form in the manifest, and their limits.

Owns what stands in a gate object; the tensors around it are in `ops.py` (a site's own gate) and `model_ops.py` (one
gate for a whole MLP). Invariant: `gate_json` and `parse_gate` are inverse to each other, and a gate that
`check_experts` lets pass can weigh its experts whatever the row.
"""

import math
from dataclasses import dataclass

from adapters_store.errors import CorruptUpload, InvalidGate, LimitExceeded
from adapters_store.json_values import integer, json_object, number, text
from adapters_store.strict_json import Json

MAX_EXPERTS = 128
MAX_TOP_K = 8
MAX_RANK_SUM = 2048
# far beyond any published value; nearer to 0 or infinity, logits divided by it leave float32
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6

IN_NORMS = ("none", "layernorm_noaffine", "unit")
LOGITS = ("linear", "abs")
WEIGHTS = ("softmax_selected", "softmax_all_renorm", "softmax_all", "one", "sigmoid")
MIXES = ("output", "rank")

_GROUP = "group:"


@dataclass(frozen=True, slots=True)
class GateOptions:
    """What a gate does beyond MeteoRA's, which is all defaults.

    `in_norm`: of the gate's input: none, (x - mean) / sqrt(variance + 1e-5), or x / max(|x|, 1e-12). `logit`: g = x W
    + bias, or |g|. `select_all`: every expert, and `top_k` is their number. `weight` of the selected: softmax over the
    selected g / temperature; softmax over all, then divided by their sum (the same but for rounding); softmax over all;
    one; sigmoid(g / temperature). `mix`: weigh each expert's output, or z = sum w A x and y = sum w B z over equal
    ranks. `group`: id of the MLP's gate that the site follows; empty: the site has its own.
    """

    in_norm: str = "none"
    logit: str = "linear"
    has_bias: bool = False
    select_all: bool = False
    weight: str = "softmax_selected"
    mix: str = "output"
    group: str = ""


METEORA_GATE = GateOptions()


@dataclass(frozen=True, slots=True)
class Experts:
    """Low-rank experts behind a gate of the layer's input; `top_k` of the logits are selected."""

    ranks: tuple[int, ...]
    top_k: int
    temperature: float
    gate: GateOptions = METEORA_GATE


def gate_json(experts: Experts, weight_tensor: str, bias_tensor: str) -> dict[str, Json]:
    """Return the manifest's gate object; the tensors are named only where the gate is the object's own."""
    gate = experts.gate
    tensors: dict[str, Json] = {} if gate.group else {"W": weight_tensor}
    if gate.has_bias and not gate.group:
        tensors["bias"] = bias_tensor
    select: Json = "all" if gate.select_all else {"topk": experts.top_k}
    return {
        "source": f"{_GROUP}{gate.group}" if gate.group else "self",
        "in_norm": gate.in_norm,
        "logit": gate.logit,
        "temperature": experts.temperature,
        "select": select,
        "weight": gate.weight,
        "mix": gate.mix,
        **tensors,
    }


def parse_gate(value: Json, ranks: tuple[int, ...]) -> Experts:
    """Read a gate object of experts of these ranks.

    Whether a group's gate has a bias is told by the group's own object.

    Raises:
        ValueError, TypeError, KeyError: no gate that could have been written.
    """
    gate = json_object(value)
    source = text(gate["source"])
    if source != "self" and not source.startswith(_GROUP):
        raise ValueError(source)
    select_all = gate["select"] == "all"
    return Experts(
        ranks=ranks,
        top_k=len(ranks) if select_all else integer(json_object(gate["select"])["topk"]),
        temperature=number(gate["temperature"]),
        gate=GateOptions(
            in_norm=text(gate["in_norm"]),
            logit=text(gate["logit"]),
            has_bias="bias" in gate,
            select_all=select_all,
            weight=text(gate["weight"]),
            mix=text(gate["mix"]),
            group="" if source == "self" else source.removeprefix(_GROUP),
        ),
    )


def check_experts(experts: Experts | None, what: str) -> None:
    """Hold a mixture to its limits; raises CorruptUpload, LimitExceeded, InvalidGate."""
    if experts is None:
        return
    num_experts = len(experts.ranks)
    if num_experts == 0 or min(experts.ranks) < 1:
        raise CorruptUpload(f"{what} has no experts, or one of rank 0", param=what)
    if num_experts > MAX_EXPERTS:
        raise LimitExceeded(f"{what} has {num_experts} experts; the limit is {MAX_EXPERTS}", param=what)
    if sum(experts.ranks) > MAX_RANK_SUM:
        raise LimitExceeded(
            f"the experts of {what} have rank {sum(experts.ranks)} together; the limit is {MAX_RANK_SUM}", param=what
        )
    check_choice(experts, what)
    check_options(experts.gate, what)
    if experts.gate.mix == "rank" and len(set(experts.ranks)) > 1:
        raise InvalidGate(f"{what} mixes in rank space, which needs equal ranks; it has {experts.ranks}", param=what)


def check_choice(experts: Experts, what: str) -> None:
    """Hold the number of selected experts and the temperature to their limits; raises InvalidGate."""
    num_experts = len(experts.ranks)
    most = min(num_experts, MAX_TOP_K)
    is_all = experts.gate.select_all
    if experts.top_k != num_experts if is_all else not 1 <= experts.top_k <= most:
        allowed = f"{num_experts}, all of them" if is_all else f"1 to {most}"
        raise InvalidGate(f"{what} takes the top {experts.top_k} experts; this mixture allows {allowed}", param=what)
    temperature = experts.temperature
    if not (math.isfinite(temperature) and MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE):
        raise InvalidGate(
            f"{what} has temperature {temperature:g}; it must lie in {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}",
            param=what,
        )


def check_options(gate: GateOptions, what: str) -> None:
    """Refuse an option that is not one of ours, naming those that are; raises InvalidGate."""
    for key, value, known in (
        ("in_norm", gate.in_norm, IN_NORMS),
        ("logit", gate.logit, LOGITS),
        ("weight", gate.weight, WEIGHTS),
        ("mix", gate.mix, MIXES),
    ):
        if value not in known:
            shown = ascii(value)[:60]
            raise InvalidGate(f"the gate of {what} has {key} {shown}; known are {', '.join(known)}", param=what)
