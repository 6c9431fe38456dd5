"""LoRAs and their mixtures as their own forward: token by token, expert by expert, as their papers and code say it.

Owns the formulas. Invariant: the experts' factors are used as the file holds them, each with its scaling on its output,
and weights come from the formula that the format's own code has, not from the options of the canonical gate's reader.
"""

import numpy as np

from adapters_store.convert.lora_mixtures import Lora, Loras, MlpLoras, Rule, SiteLoras, normed
from adapters_store.convert.source_model import Activation, Floats, Linears, SourceModel


class LoraSource(SourceModel):
    """The LoRAs of an open file."""

    def __init__(self, loras: Loras) -> None:
        self._sites = {(own.layer, own.site): own for own in loras.sites}
        self._mlps = {own.layer: own for own in loras.mlps}

    def linear(self, layer: int, site: str, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        """Return the base's output plus each row's experts, by their weights."""
        y = super().linear(layer, site, x, weight, bias)
        own = self._sites.get((layer, site))
        return y if own is None else y + self._added(own, x.astype(np.float64))

    def mlp(self, layer: int, x: Floats, linears: Linears, activation: Activation) -> Floats | None:
        """Return the MLP's output with one choice of experts per row, for the whole MLP."""
        own = self._mlps.get(layer)
        if own is None:
            return None
        logits = x.astype(np.float64) @ own.gate().astype(np.float64).T
        if own.bias is not None:
            logits = logits + own.bias()
        weights = np.array([_weigh(row, own.rule) for row in logits])
        return (
            _whole(own, weights, x, linears, activation)
            if own.is_whole
            else _shared(own, weights, x, linears, activation)
        )

    def _added(self, own: SiteLoras, x: Floats) -> Floats:
        if own.rule is None or own.gate is None:
            return _product(own.loras[0], x)
        logits = normed(x.astype(np.float64), own.rule.options.in_norm) @ own.gate().astype(np.float64).T
        if own.rule.options.logit == "abs":
            logits = np.abs(logits)
        weights = np.array([_weigh(row, own.rule) for row in logits])
        if own.rule.options.mix == "output":
            outputs = (_product(lora, x) * weights[:, [e]] for e, lora in enumerate(own.loras))
            return np.asarray(sum(outputs))
        return np.array([_merged(own.loras, row, share) for row, share in zip(x, weights, strict=True)])


def _weigh(logits: Floats, rule: Rule) -> Floats:
    """Return softmax over all experts, the best `top_k` kept and divided by their sum; the first of equals wins.

    Where the weight is one, it is the best expert's, whatever its probability.
    """
    if rule.options.weight == "one":
        return np.where(np.arange(len(logits)) == int(np.argmax(logits)), 1.0, 0.0)
    shares = np.exp((logits - logits.max()) / rule.temperature)
    shares = shares / shares.sum()
    if not rule.options.select_all:
        kept = np.argsort(-logits, kind="stable")[: rule.top_k]
        shares = np.where(np.isin(np.arange(len(logits)), kept), shares, 0.0)
        shares = shares / shares.sum()
    return np.asarray(shares)


def _product(lora: Lora, x: Floats) -> Floats:
    a, b = lora.a().astype(np.float64), lora.b().astype(np.float64)
    return np.asarray(lora.scaling * ((x @ a.T) @ b.T))


def _merged(loras: tuple[Lora, ...], x: Floats, shares: Floats) -> Floats:
    """Return one row through the weighted sum of all A and that of all B."""
    a = np.sum([share * lora.a() for share, lora in zip(shares, loras, strict=True)], axis=0)
    b = np.sum([share * lora.scaling * lora.b() for share, lora in zip(shares, loras, strict=True)], axis=0)
    return np.asarray(b @ (a @ x))


def _whole(own: MlpLoras, weights: Floats, x: Floats, linears: Linears, activation: Activation) -> Floats:
    """Run every expert's whole MLP and add up the outputs by the weights."""
    total = None
    for expert in range(weights.shape[1]):

        def run(site: str, rows: Floats, expert: int = expert) -> Floats:
            y = linears(site, rows)
            return y + _product(own.sites[site][expert], rows) if site in own.sites else y

        y = run("down_proj", activation(run("gate_proj", x)) * run("up_proj", x)) * weights[:, [expert]]
        total = y if total is None else total + y
    assert total is not None, "a mixture has experts"
    return total


def _shared(own: MlpLoras, weights: Floats, x: Floats, linears: Linears, activation: Activation) -> Floats:
    """Run one MLP in which every linear layer adds its experts by the weights."""

    def run(site: str, rows: Floats) -> Floats:
        y = linears(site, rows)
        for expert, lora in enumerate(own.sites.get(site, ())):
            y = y + _product(lora, rows) * weights[:, [expert]]
        return y

    return run("down_proj", activation(run("gate_proj", x)) * run("up_proj", x))
