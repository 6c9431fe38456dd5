"""How far the served model and the reference lie apart: errors, divergence, the first other token, the size of effects.

Owns the numbers only; what they mean is `verdict.py`'s. Invariant: noise is measured on the base, and what the adapter
makes of it on rounded twins of the reference; never on the served adapter, so a wrong one cannot raise its tolerance.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.probe.observed import Answers, Observed

Float64 = npt.NDArray[np.float64]
# below so many shared values a slope says nothing
_MIN_SHARED = 16


@dataclass(frozen=True, slots=True)
class Reference:
    """Log-probabilities [T, V] of each prompt by the reference.

    `twins` are (base, adapter) once more, every result rounded; some may be missing. `is_faithful`: they round as the
    serving dtype does, not only coarser than the reference.
    """

    base: list[Float64]
    adapter: list[Float64]
    twins: list[tuple[list[Float64], list[Float64]]]
    is_faithful: bool


@dataclass(frozen=True, slots=True)
class OtherToken:
    """The first position where the most likely tokens differ: of which prompt, after which token, and both ids."""

    prompt: int
    position: int
    served: int
    source: int


@dataclass(frozen=True, slots=True)
class Measured:
    """All in natural log-probabilities over the tokens that the engine reported.

    Attributes:
        max_error, rms_error: served adapter against the source's own formula in fp32.
        typical_error: the median over positions of a position's root mean square error.
        kl: the largest divergence of any position, of the served distribution from the source's.
        noise_max, noise_rms, noise_typical: the same of the served base, times `amplification`; or what rounding to
            the serving dtype does to the adapted reference, if that is more.
        amplification: how much more rounding does to the adapted reference than to the base's; at least 1.
        served_effect, source_effect: largest difference that the adapter makes to the base, as served and by formula.
        gain: the served effect along the source's, 1 if they agree; None where too little is shared to tell.
        gain_error: what noise may move it by.
    """

    num_compared: int
    max_error: float
    rms_error: float
    typical_error: float
    kl: float
    first_differing_token: OtherToken | None
    noise_max: float
    noise_rms: float
    noise_typical: float
    amplification: float
    served_effect: float
    source_effect: float
    gain: float | None
    gain_error: float | None


@dataclass(frozen=True, slots=True)
class _Spread:
    """How far apart two sides lie: at most, in the mean, and at most positions."""

    largest: float
    rms: float
    typical: float

    def scaled(self, factor: float) -> "_Spread":
        return _Spread(self.largest * factor, self.rms * factor, self.typical * factor)

    def larger(self, other: "_Spread") -> "_Spread":
        return _Spread(max(self.largest, other.largest), max(self.rms, other.rms), max(self.typical, other.typical))


def measure(observed: Observed, reference: Reference) -> Measured:
    """Compare; every number of both sides is finite."""
    found = _spread(_errors(observed.adapter, reference.adapter))
    amplification = _amplification(observed, reference)
    noise = _spread(_errors(observed.base, reference.base)).scaled(amplification)
    if reference.is_faithful:
        for _, twin in reference.twins:
            noise = noise.larger(_spread(_difference(observed.adapter, twin, reference.adapter)))
    served, source = _effects(observed, reference)
    gain = gain_error = None
    size = float(source @ source)
    if len(source) >= _MIN_SHARED and size > 0:
        gain = float(served @ source) / size
        # the tokens of one position share most of their noise
        num_independent = sum(len(prompt) for prompt in observed.prompts)
        gain_error = noise.rms / (_rms(source) * num_independent**0.5)
    return Measured(
        num_compared=sum(len(position.token_ids) for prompt in observed.adapter for position in prompt),
        max_error=found.largest,
        rms_error=found.rms,
        typical_error=found.typical,
        kl=max(_divergences(observed.adapter, reference.adapter)),
        first_differing_token=_first_other(observed.adapter, reference.adapter),
        noise_max=noise.largest,
        noise_rms=noise.rms,
        noise_typical=noise.typical,
        amplification=amplification,
        served_effect=_largest(served),
        source_effect=_largest(source),
        gain=gain,
        gain_error=gain_error,
    )


def _amplification(observed: Observed, reference: Reference) -> float:
    """Return how much further rounding moves the adapted reference than the base's."""
    base = sum(_spread(_difference(observed.base, twin, reference.base)).rms for twin, _ in reference.twins)
    adapter = sum(_spread(_difference(observed.adapter, twin, reference.adapter)).rms for _, twin in reference.twins)
    return max(1.0, adapter / base) if base > 0 else 1.0


def _positions(answers: Answers, logprobs: list[Float64]) -> Iterator[tuple[Float64, Float64]]:
    """Yield, for each position, the served values and the reference's of the same tokens."""
    for prompt, rows in zip(answers, logprobs, strict=True):
        for position, row in zip(prompt, rows, strict=True):
            yield np.array(position.logprobs), np.take(row, position.token_ids)


def _errors(answers: Answers, logprobs: list[Float64]) -> list[Float64]:
    """Return the differences of each position."""
    return [served - wanted for served, wanted in _positions(answers, logprobs)]


def _difference(answers: Answers, first: list[Float64], second: list[Float64]) -> list[Float64]:
    pairs = zip(_positions(answers, first), _positions(answers, second), strict=True)
    return [a - b for (_, a), (_, b) in pairs]


def _spread(errors: list[Float64]) -> "_Spread":
    together = np.concatenate(errors)
    return _Spread(_largest(together), _rms(together), float(np.median([_rms(error) for error in errors])))


def _effects(observed: Observed, reference: Reference) -> tuple[Float64, Float64]:
    """Return what the adapter changes, as served and by formula, over the tokens that both sides of a position name."""
    served, source = [], []
    for number, (before, after) in enumerate(zip(observed.base, observed.adapter, strict=True)):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            known = dict(zip(old.token_ids, old.logprobs, strict=True))
            for token, logprob in zip(new.token_ids, new.logprobs, strict=True):
                if token in known:
                    served.append(logprob - known[token])
                    change = reference.adapter[number][index, token] - reference.base[number][index, token]
                    source.append(float(change))
    return np.array(served), np.array(source)


def _divergences(answers: Answers, logprobs: list[Float64]) -> Iterator[float]:
    """Yield each position's KL(source | served) over the named tokens and the rest as one."""
    for served, wanted in _positions(answers, logprobs):
        p, q = _with_rest(wanted), _with_rest(served)
        yield max(0.0, float(np.sum(p * (np.log(p) - np.log(q)))))


def _with_rest(logprobs: Float64) -> Float64:
    shares = np.exp(logprobs)
    return np.asarray(np.maximum(np.append(shares, 1.0 - shares.sum()), np.finfo(np.float32).tiny), dtype=np.float64)


def _first_other(answers: Answers, logprobs: list[Float64]) -> OtherToken | None:
    for number, (prompt, rows) in enumerate(zip(answers, logprobs, strict=True)):
        for index, (position, row) in enumerate(zip(prompt, rows, strict=True)):
            best = int(np.argmax(row))
            if best != position.token_ids[0]:
                return OtherToken(number, index, position.token_ids[0], best)
    return None


def _largest(values: Float64) -> float:
    return float(np.max(np.abs(values), initial=0.0))


def _rms(values: Float64) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else 0.0
