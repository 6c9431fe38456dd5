"""How long prompts and answers are: laws that numbers of tokens are drawn from.

Owns the laws and their reading from a scenario. Invariant: a draw depends on the law and the generator handed in
only, and lies within the law's bounds; a draw outside them is drawn again: the law is the truncated one, not a clipped
one.
"""

import random
from dataclasses import dataclass

from loadtest.errors import InvalidScenario
from loadtest.tables import Table

KINDS = ("choice", "fixed", "lognormal", "normal", "trace", "uniform")
MAX_TOKENS = 1 << 20
# a law whose bounds hold less than this share of it is a mistake in the scenario
_MAX_REDRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """One law. `low` and `high` bound every draw, both inclusive.

    fixed: `low`; uniform: every whole number from `low` to `high` equally likely; normal: mean `centre`, standard
    deviation `spread`; lognormal: median `centre`, standard deviation of the logarithm `spread`; choice: one of
    `values`, by `weights`; trace: what the trace says.
    """

    kind: str
    low: int
    high: int
    centre: float = 0.0
    spread: float = 0.0
    values: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    def draw(self, rng: random.Random) -> int:
        """Return a number of tokens.

        Raises:
            InvalidScenario: the bounds hold next to nothing of the law.
        """
        if self.kind == "fixed":
            return self.low
        if self.kind == "uniform":
            return rng.randint(self.low, self.high)
        if self.kind == "choice":
            return rng.choices(self.values, self.weights)[0]
        assert self.kind in {"normal", "lognormal"}, f"no draw from a law of kind {self.kind}"
        for _ in range(_MAX_REDRAWS):
            drawn = rng.gauss(self.centre, self.spread)
            if self.kind == "lognormal":
                drawn = rng.lognormvariate(0.0, self.spread) * self.centre
            if self.low <= round(drawn) <= self.high:
                return round(drawn)
        raise InvalidScenario(
            f"a {self.kind} law of centre {self.centre:g} and spread {self.spread:g} has next to nothing between "
            f"{self.low} and {self.high}; widen 'low' and 'high'"
        )


def read_lengths(table: Table) -> Lengths:
    """Read one law, for example `{kind = "uniform", low = 8, high = 512}`."""
    kind = table.text("kind", among=KINDS)
    if kind == "choice":
        law = _read_choice(table)
    elif kind == "trace":
        law = Lengths(kind, 1, MAX_TOKENS)
    elif kind == "fixed":
        value = table.whole("value", low=1, high=MAX_TOKENS)
        law = Lengths(kind, value, value)
    else:
        law = _read_bounded(table, kind)
    table.close()
    return law


def _read_bounded(table: Table, kind: str) -> Lengths:
    is_uniform = kind == "uniform"
    low = table.whole("low", None if is_uniform else 1, low=1, high=MAX_TOKENS)
    high = table.whole("high", None if is_uniform else MAX_TOKENS, low=low, high=MAX_TOKENS)
    if is_uniform:
        return Lengths(kind, low, high)
    centre = table.number("mean" if kind == "normal" else "median", low=1e-9)
    return Lengths(kind, low, high, centre, table.number("sd" if kind == "normal" else "sigma"))


def _read_choice(table: Table) -> Lengths:
    values = []
    for value in table.values("values"):
        if type(value) is not int or not 1 <= value <= MAX_TOKENS:
            raise InvalidScenario(f"{table.where}.values: {value!r} is no number of tokens from 1 to {MAX_TOKENS}")
        values.append(value)
    weights = [1.0] * len(values)
    if table.has("weights"):
        weights = []
        for weight in table.values("weights"):
            if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < float("inf"):
                raise InvalidScenario(f"{table.where}.weights: {weight!r} is no weight from 0")
            weights.append(float(weight))
    if len(weights) != len(values) or not sum(weights) > 0:
        raise InvalidScenario(f"{table.where}.weights: one per value, not all 0; {len(weights)} for {len(values)}")
    return Lengths("choice", min(values), max(values), values=tuple(values), weights=tuple(weights))
