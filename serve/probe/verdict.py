"""Whether a version may be published: the rules over what a probe measured, and the words of each refusal.

Owns the tolerances. Invariant: a tolerance grows only with noise that was measured without the served adapter.
"""

from dataclasses import asdict, dataclass

from adapters_store.errors import AdapterWithoutEffect, ProbeDisagrees
from adapters_store.proof import Proof
from adapters_store.strict_json import Json
from serve.probe.change import SiteChange, change_warnings
from serve.probe.measure import Measured
from serve.probe.observed import Observed


@dataclass(frozen=True, slots=True)
class Bounds:
    """One number for the largest error, the root mean square and the typical error."""

    max_error: float
    rms_error: float
    typical_error: float


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest errors that pass."""

    max_error: float
    rms_error: float
    typical_error: float
    gain_error: float | None


# errors of log-probabilities that are never held against an adapter: largest, root mean square, and typical. float32:
# 65 adapters of PEFT's over a tiny base gave at most 1e-4 (CPU, 2026-11); 16 bits: two roundings of a logit of 8
_LEAST = {
    "float32": Bounds(2e-4, 5e-5, 3e-5),
    "float16": Bounds(1e-2, 3e-3, 2e-3),
    "bfloat16": Bounds(6e-2, 2e-2, 1.5e-2),
}
# how far an honest adapter may lie above noise that is only estimated. Gates that choose otherwise within rounding move
# single positions far and most of them little: over LoRAs and sharp mixtures on a tiny base in three dtypes the typical
# error was up to 1.3 times its noise, the others up to 5 times (CPU, 2026-11)
_FACTORS = Bounds(16.0, 8.0, 2.0)
# an effect may be off by as much as rounding its factors explains, and by what the noise may feign
_GAIN_SLACK = {"float32": 0.01, "float16": 0.02, "bfloat16": 0.05}
_GAIN_ERRORS = 6.0
_SHOWN_DIGITS = 3


def tolerance(measured: Measured, dtype: str) -> Tolerance:
    """Return what this probe could tell apart."""
    least = _LEAST[dtype]
    gain = None if measured.gain_error is None else _GAIN_SLACK[dtype] + _GAIN_ERRORS * measured.gain_error
    return Tolerance(
        max_error=max(least.max_error, _FACTORS.max_error * measured.noise_max),
        rms_error=max(least.rms_error, _FACTORS.rms_error * measured.noise_rms),
        typical_error=max(least.typical_error, _FACTORS.typical_error * measured.noise_typical),
        gain_error=gain,
    )


def check_effect(observed: Observed) -> None:
    """Refuse an adapter that the engine answers exactly like the base; raises AdapterWithoutEffect."""
    if observed.adapter == observed.base:
        raise AdapterWithoutEffect(
            "served on the base, the adapter changes nothing: every log-probability of the probe's prompts is the "
            "base's. Was it trained, and saved after training?"
        )


def check_agreement(measured: Measured, dtype: str) -> None:
    """Refuse an adapter that acts otherwise than its source.

    Raises:
        ProbeDisagrees: with the numbers and the way out.
    """
    allowed = tolerance(measured, dtype)
    reasons = [
        f"{what} {found:.3g}, more than the {most:.3g} that rounding explains"
        for what, found, most in (
            ("largest error of log-probabilities", measured.max_error, allowed.max_error),
            ("their root mean square error", measured.rms_error, allowed.rms_error),
            ("their error at a typical position", measured.typical_error, allowed.typical_error),
        )
        if found > most
    ]
    gain, most_gain = measured.gain, allowed.gain_error
    if gain is not None and most_gain is not None and most_gain < 1 and abs(gain - 1) > most_gain:
        reasons.append(f"its effect is {gain:.3g} times the source's, where 1 +- {most_gain:.2g} is expected")
    if reasons:
        raise ProbeDisagrees(
            f"served on the base, the adapter acts otherwise than its own formula: {'; '.join(reasons)} "
            f"({measured.num_compared} values, KL {measured.kl:.3g}). Nothing was stored. If its files are right this "
            "is a bug of the server: report it with adapter_config.json; the operator can publish without the probe "
            "(--probe off)"
        )


def proof_of(measured: Measured, observed: Observed, device: str, change: SiteChange | None) -> Proof:
    """Return what is stored with the version, numbers to three digits."""
    allowed = tolerance(measured, observed.dtype)
    return {
        "dtype": observed.dtype,
        "device": device,
        "prompts": [list(prompt) for prompt in observed.prompts],
        **{key: _shown(value) for key, value in asdict(measured).items()},
        "tolerance": {key: _shown(value) for key, value in asdict(allowed).items()},
        "largest_change": None if change is None else {**asdict(change), "ratio": _shown(change.ratio)},
        "warnings": change_warnings(change),
    }


def _shown(value: Json) -> Json:
    return float(f"{value:.{_SHOWN_DIGITS}g}") if isinstance(value, float) else value
