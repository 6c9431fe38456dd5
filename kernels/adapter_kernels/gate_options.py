"""The options of a mixture's gate: what differs between the published mixtures, as plain values.

Owns the names alone; `gate.py` computes by them, `reference.gate_weights` defines them.
"""

from dataclasses import dataclass

IN_NORMS = ("none", "layernorm_noaffine", "unit")
LOGITS = ("linear", "abs")
WEIGHTS = ("softmax_selected", "softmax_all_renorm", "softmax_all", "one", "sigmoid")
MIXES = ("output", "rank")


@dataclass(frozen=True, slots=True)
class GateOptions:
    """What a gate does beyond MeteoRA's, which is all defaults. `group`: id of the MLP's gate that a site follows."""

    in_norm: str = "none"
    logit: str = "linear"
    weight: str = "softmax_selected"
    mix: str = "output"
    group: str = ""

    @property
    def are_known(self) -> bool:
        """Is each option one of those above?"""
        return self.in_norm in IN_NORMS and self.logit in LOGITS and self.weight in WEIGHTS and self.mix in MIXES


METEORA = GateOptions()
