"""What happened in a run so far, as plain facts that survive a kill with the parameters.

Owns the curves, the count of tokens and the best validation. Invariant: `History.of(history.facts()) == history`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from adapters_store.json_values import integer, json_list, json_object
from adapters_store.strict_json import Json


@dataclass(slots=True)
class History:
    """Curves are lists of [step, loss, token accuracy]; `exports` are [step, metrics] of saved checkpoints."""

    tokens: int = 0
    curve: list[Json] = field(default_factory=list)
    validations: list[Json] = field(default_factory=list)
    exports: list[Json] = field(default_factory=list)
    best_loss: float | None = None
    best_step: int = 0
    num_worse: int = 0
    is_ended: bool = False

    def facts(self) -> dict[str, Json]:
        """Return all of it as JSON."""
        return {
            "tokens": self.tokens,
            "curve": self.curve,
            "validations": self.validations,
            "exports": self.exports,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "num_worse": self.num_worse,
            "is_ended": self.is_ended,
        }

    @classmethod
    def of(cls, facts: dict[str, Json]) -> "History":
        """Read what `facts` returned."""
        best = facts["best_loss"]
        return cls(
            tokens=integer(facts["tokens"]),
            curve=json_list(facts["curve"]),
            validations=json_list(facts["validations"]),
            exports=json_list(facts["exports"]),
            best_loss=float(best) if isinstance(best, int | float) else None,
            best_step=integer(facts["best_step"]),
            num_worse=integer(facts["num_worse"]),
            is_ended=bool(facts["is_ended"]),
        )

    def note_validation(self, step: int, loss: float, accuracy: float) -> bool:
        """Note a validation; return whether it is the best so far."""
        self.validations.append([step, loss, accuracy])
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.num_worse = loss, step, 0
            return True
        self.num_worse += 1
        return False

    def metrics(self) -> dict[str, float]:
        """Return the newest numbers under OpenAI's names."""
        found: dict[str, float] = {}
        for prefix, points in (("train", self.curve), ("valid", self.validations)):
            if points:
                _, loss, accuracy = json_list(points[-1])
                found[f"{prefix}_loss"] = _number(loss)
                found[f"{prefix}_mean_token_accuracy"] = _number(accuracy)
        return found

    def saved(self) -> list[tuple[int, dict[str, float]]]:
        """Return step and metrics of every saved checkpoint."""
        pairs = (json_list(entry) for entry in self.exports)
        return [
            (integer(step), {name: _number(value) for name, value in json_object(metrics).items()})
            for step, metrics in pairs
        ]


def points(curve: list[Json]) -> Iterator[tuple[int, float, float]]:
    """Yield step, loss and token accuracy of a curve's points."""
    for point in curve:
        step, loss, accuracy = json_list(point)
        yield integer(step), _number(loss), _number(accuracy)


def _number(value: Json) -> float:
    if not isinstance(value, int | float):
        raise TypeError("number expected")
    return float(value)
