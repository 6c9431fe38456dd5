"""The parts of the probe without a server: prompts, numbers, verdicts, and an engine that fails in the middle."""

import asyncio
import math
from collections.abc import AsyncGenerator
from dataclasses import replace

import numpy as np
import pytest

from adapters_store.convert.source_model import Floats, SourceModel
from adapters_store.errors import (
    AdapterWithoutEffect,
    ProbeDisagrees,
    ProbeFailed,
    ProbeNotFinite,
    UnsupportedAdapter,
)
from serve.errors import EngineFailed, EngineLoading, ServeError, Unavailable
from serve.messages import Finished, FinishReason, Ready, Started, Submit, TokenLogprobs, Tokens
from serve.probe.change import ChangeWatch, SiteChange, change_warnings
from serve.probe.measure import Measured, OtherToken, Reference, measure
from serve.probe.observed import Answers, Observed, Position
from serve.probe.probe import proving_on
from serve.probe.prompts import Wishes, choose_prompts
from serve.probe.served import Carrier, ask
from serve.probe.verdict import check_agreement, check_effect, proof_of

VOCAB = 40
DIGEST = "a" * 64
READY = Ready("sha256:0", 64, 8, 16, "float32", "cpu", [0], VOCAB, 8)
GOOD = Measured(
    num_compared=640,
    max_error=1e-5,
    rms_error=1e-6,
    typical_error=1e-6,
    kl=0.0,
    first_differing_token=None,
    noise_max=1e-5,
    noise_rms=1e-6,
    noise_typical=1e-6,
    amplification=1.0,
    served_effect=2.0,
    source_effect=2.0,
    gain=1.0,
    gain_error=1e-6,
)


class ScriptedEngine:
    """Answers flat distributions, and fails base or adapter as it is told."""

    def __init__(self, *, adapter_error: Exception | None = None, base_error: Exception | None = None) -> None:
        self.errors = {True: adapter_error, False: base_error}
        self.ready: Ready | None = READY
        self.is_ready = True
        self.logprob = -math.log(VOCAB)
        self.submits: list[Submit] = []
        self.unloaded: list[str] = []

    async def generate(self, submit: Submit) -> AsyncGenerator[Started | Tokens | Finished, None]:
        self.submits.append(submit)
        if (error := self.errors[submit.adapter_digest is not None]) is not None:
            raise error
        entry = TokenLogprobs(30, self.logprob, [1, 2], [self.logprob, self.logprob])
        prompt = [entry] * (len(submit.prompt_token_ids) - 1 + bool(submit.num_virtual_tokens))
        yield Started(submit.request_id, 0, 0.0, 0.0, prompt)
        yield Tokens(submit.request_id, [1], [entry])
        yield Finished(submit.request_id, FinishReason.LENGTH)

    def unload_adapter(self, digest: str) -> None:
        self.unloaded.append(digest)


def run(engine: ScriptedEngine, carrier: Carrier) -> Answers:
    return asyncio.run(ask(engine, carrier, ((1, 2, 3), (4, 5))))


def test_prompts_are_the_same_every_time_and_within_bounds() -> None:
    wishes = Wishes(vocab_size=VOCAB, max_tokens=1000)
    first, second = choose_prompts(wishes)
    assert choose_prompts(wishes) == (first, second) and first != second
    assert (len(first), len(second)) == (16, 16) and all(0 <= token < VOCAB for token in (*first, *second))
    assert [len(prompt) for prompt in choose_prompts(replace(wishes, max_tokens=5))] == [5, 5]


def test_prompts_hold_the_invocation_and_tokens_on_both_sides_of_it() -> None:
    invocation = (39, 38, 37)
    first, second = choose_prompts(Wishes(vocab_size=30, max_tokens=64, invocation=invocation))
    begins = [[i for i in range(len(p)) if p[i : i + 3] == invocation] for p in (first, second)]
    assert [len(found) for found in begins] == [1, 2] and begins[0][0] > 0
    assert Carrier(DIGEST, 0, invocation).active_from(second) == begins[1][-1]
    assert Carrier(DIGEST, 0, (1, 1, 1, 1)).active_from(first) == len(first)
    assert Carrier(DIGEST).active_from(first) is None


def test_prompts_hold_the_tokens_that_were_trained() -> None:
    for trained in ((33,), tuple(range(31, 37))):
        prompts = choose_prompts(Wishes(vocab_size=30, max_tokens=64, trained=trained))
        assert set(trained) <= set(prompts[0]) | set(prompts[1])
        assert all(set(trained) & set(prompt) for prompt in prompts)


def test_every_position_is_asked_and_virtual_tokens_are_left_out() -> None:
    engine = ScriptedEngine()
    for carrier in (Carrier(), Carrier(DIGEST, num_virtual_tokens=4)):
        assert [len(answer) for answer in run(engine, carrier)] == [3, 2]
    (position, *_), *_ = run(engine, Carrier())
    # the chosen token counts beside the most likely ones
    assert position.token_ids == (1, 2, 30)
    assert [submit.adapter_digest for submit in engine.submits[:4]] == [None, None, DIGEST, DIGEST]
    salts = {submit.cache_salt for submit in engine.submits}
    assert len(salts) == len(engine.submits) and "" not in salts


def test_an_engine_that_dies_in_the_middle_is_no_fault_of_the_adapter() -> None:
    engine = ScriptedEngine(adapter_error=EngineFailed("the engine stopped and is being restarted"))
    engine.is_ready = False
    with pytest.raises(Unavailable, match="nothing was stored, send the upload again") as raised:
        run(engine, Carrier(DIGEST))
    assert raised.value.http_status == 503 and raised.value.retry_after_s == 5


@pytest.mark.parametrize(
    ("message", "carrier", "kind"),
    [
        ("the model produced numbers that are not finite", Carrier(DIGEST), ProbeNotFinite),
        ("the engine could not run this step", Carrier(DIGEST), ProbeFailed),
        ("the model produced numbers that are not finite", Carrier(), ProbeFailed),
    ],
)
def test_a_living_engine_that_fails_says_what_failed(message: str, carrier: Carrier, kind: type[Exception]) -> None:
    error = EngineFailed(message)
    with pytest.raises(kind):
        run(ScriptedEngine(adapter_error=error, base_error=error), carrier)


def test_the_engines_own_refusal_reaches_the_uploader_as_it_is() -> None:
    refusal = ServeError("this device serves no rotations", code="unsupported_adapter")
    with pytest.raises(ServeError, match="no rotations"):
        run(ScriptedEngine(adapter_error=refusal), Carrier(DIGEST))


def test_what_can_never_be_loaded_here_is_refused_and_what_may_be_later_is_not() -> None:
    def load_failed(reason: str) -> ScriptedEngine:
        message = f"the adapter could not be loaded: {reason}"
        return ScriptedEngine(adapter_error=Unavailable(message, code="adapter_load_failed", retry_after_s=1))

    with pytest.raises(UnsupportedAdapter, match="device path does not compute") as refusal:
        run(load_failed("turned inputs, which this server's device path does not compute"), Carrier(DIGEST))
    assert (refusal.value.http_status, refusal.value.code) == (400, "unsupported_adapter")
    with pytest.raises(Unavailable, match="send the request again"):
        run(load_failed("the adapter could not be loaded (OSError); send the request again"), Carrier(DIGEST))


def test_a_log_probability_that_is_not_finite_is_never_compared() -> None:
    engine = ScriptedEngine()
    engine.logprob = math.nan
    with pytest.raises(ProbeNotFinite):
        run(engine, Carrier(DIGEST))


def test_an_upload_is_refused_before_its_bytes_while_the_engine_starts() -> None:
    engine = ScriptedEngine()
    engine.ready = None
    with pytest.raises(EngineLoading):
        proving_on(engine, is_on=True)
    assert "--probe off" in getattr(proving_on(engine, is_on=False), "reason", "")


def log_softmax(rows: int, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).standard_normal((rows, VOCAB)) * 2
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def top(logprobs: np.ndarray, count: int = 30) -> tuple[Position, ...]:
    order = np.argsort(-logprobs, axis=-1)[:, :count]
    return tuple(
        Position(tuple(int(i) for i in ids), tuple(float(v) for v in row[ids]))
        for row, ids in zip(logprobs, order, strict=True)
    )


def measured(shift: float, *, twin_noise: float = 0.0, is_faithful: bool = False) -> Measured:
    """Measure an adapter whose served effect is `shift` times what its source says."""
    base, adapter = log_softmax(6, 1), log_softmax(6, 2)
    served = base + shift * (adapter - base)
    observed = Observed(((0,) * 6,), (top(base + 1e-6),), (top(served),), "float32", 64)
    twins = [([base + 1e-6], [adapter + twin_noise])] if twin_noise else []
    return measure(observed, Reference([base], [adapter], twins, is_faithful=is_faithful))


def test_numbers_of_an_adapter_that_acts_as_it_should() -> None:
    found = measured(1.0)
    assert found.max_error < 1e-12 and found.kl < 1e-12 and found.first_differing_token is None
    assert found.noise_max == pytest.approx(1e-6) and found.amplification == 1.0
    assert found.gain == pytest.approx(1.0) and found.source_effect > 1
    assert found.served_effect == pytest.approx(found.source_effect)
    check_agreement(found, "float32")


def test_numbers_of_an_adapter_of_half_the_strength() -> None:
    found = measured(0.5)
    assert found.gain == pytest.approx(0.5) and found.max_error > 0.5 and found.kl > 0.01
    assert isinstance(found.first_differing_token, OtherToken)
    with pytest.raises(ProbeDisagrees, match=r"0\.5 times the source's"):
        check_agreement(found, "float32")


def test_noise_grows_with_what_the_source_makes_of_rounding_and_never_with_the_served_error() -> None:
    assert measured(0.5).noise_max == measured(1.0).noise_max
    assert measured(1.0, twin_noise=3e-6).amplification == pytest.approx(3.0)
    assert measured(1.0, twin_noise=3e-6).noise_rms == pytest.approx(3e-6)
    # where the twins round as the engine does, their error is noise that nobody has to estimate
    faithful = measured(1.0, twin_noise=1e-3, is_faithful=True)
    assert faithful.noise_typical == pytest.approx(1e-3) and faithful.noise_max == pytest.approx(1e-3)
    # a source that is steadier than the base gets no less than the base
    assert measured(1.0, twin_noise=1e-7).amplification == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        replace(GOOD, max_error=3e-4),
        replace(GOOD, rms_error=6e-5),
        replace(GOOD, typical_error=4e-5),
        replace(GOOD, gain=0.98),
        replace(GOOD, gain=1.02),
    ],
)
def test_each_rule_refuses_alone(wrong: Measured) -> None:
    check_agreement(GOOD, "float32")
    with pytest.raises(ProbeDisagrees):
        check_agreement(wrong, "float32")


def test_a_gain_that_noise_could_feign_is_not_held_against_the_adapter() -> None:
    check_agreement(replace(GOOD, gain=0.9, gain_error=0.03), "float32")
    check_agreement(replace(GOOD, gain=None, gain_error=None), "float32")


def test_the_proof_is_plain_json_of_three_digits() -> None:
    observed = Observed(((1, 2),), ((),), ((),), "float32", 64)
    measured = replace(GOOD, max_error=1.23456e-5, first_differing_token=OtherToken(0, 1, 2, 3))
    proof = proof_of(measured, observed, "cpu", SiteChange(1, "q_proj", 0.123456))
    assert proof["max_error"] == 1.23e-5 and proof["prompts"] == [[1, 2]] and proof["device"] == "cpu"
    assert proof["first_differing_token"] == {"prompt": 0, "position": 1, "served": 2, "source": 3}
    assert proof["tolerance"] == {"max_error": 2e-4, "rms_error": 5e-5, "typical_error": 3e-5, "gain_error": 0.01}
    assert proof["largest_change"] == {"layer": 1, "site": "q_proj", "ratio": 0.123} and proof["warnings"] == []


class _PlusLowRank(SourceModel):
    """Adds a matrix to one site of the base."""

    def __init__(self, delta: Floats) -> None:
        self.delta = delta

    def linear(self, layer: int, site: str, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        own = weight + self.delta if (layer, site) == (1, "o_proj") else weight
        return super().linear(layer, site, x, own, bias)


@pytest.mark.parametrize("times", [0.25, 0.9, 1.2, 40.0])
def test_a_change_larger_than_the_layer_is_named_and_a_smaller_one_is_not(times: float) -> None:
    random = np.random.default_rng(1)
    weights = {(layer, site): random.standard_normal((24, 64)) for layer in range(3) for site in ("q_proj", "o_proj")}
    delta = random.standard_normal((24, 4)) @ random.standard_normal((4, 64))
    delta *= times * np.linalg.norm(weights[1, "o_proj"]) / np.linalg.norm(delta)
    watch = ChangeWatch(_PlusLowRank(delta))
    for _ in range(2):
        for (layer, site), weight in weights.items():
            watch(layer, site, weight.astype(np.float32))
    change = watch.largest
    assert change is not None and (change.layer, change.site) == (1, "o_proj")
    # 16 rows through rank 4: within a fifth
    assert change.ratio == pytest.approx(times, rel=0.2)
    assert len(change_warnings(change)) == (times > 1) and change_warnings(None) == []
    if times > 1:
        (text,) = change_warnings(change)
        assert f"{change.ratio:.3g} times" in str(text) and "lora_alpha" in str(text)


def test_equal_answers_are_no_effect() -> None:
    position = Position((1,), (-0.1,))
    same = Observed(((1,),), ((position,),), ((position,),), "float32", 64)
    with pytest.raises(AdapterWithoutEffect):
        check_effect(same)
    check_effect(replace(same, adapter=((replace(position, logprobs=(-0.2,)),),)))
