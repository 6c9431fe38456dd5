"""`--verify`: every answer of a run, compared with the answer of the same request sent alone.

Owns the solo runs and the verdict. Invariant: an answer is called equal only if its token ids (where the server gives
them, else its text and number of tokens) are those of the solo run on the same version of the same adapter; what cannot
be compared is counted apart, never as equal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loadtest.client import Client, encode_body
from loadtest.prompts import request_body
from loadtest.samples import Sample
from loadtest.scenario import Scenario
from loadtest.workload import Plan


@dataclass(frozen=True, slots=True)
class Mismatch:
    """An answer that differs; texts are cut."""

    index: int
    model: str
    under_load: str
    alone: str


@dataclass(slots=True)
class Verdict:
    """How many answers were equal, which were not, and how many could not be compared: `why` counts by reason."""

    num_equal: int = 0
    by_token_ids: bool = True
    mismatches: list[Mismatch] = field(default_factory=list)
    num_incomparable: int = 0
    why: dict[str, int] = field(default_factory=dict)

    def leave_out(self, reason: str) -> None:
        """Count an answer that says nothing."""
        self.num_incomparable += 1
        self.why[reason] = self.why.get(reason, 0) + 1


async def verify(
    client: Client,
    scenario: Scenario,
    plan: Plan,
    samples: Sequence[Sample],
    versions: Mapping[str, Sequence[int]],
    advance: Callable[[], None],
) -> Verdict:
    """Send every answered request again, one at a time, and compare.

    Args:
        versions: version numbers that adapters were given during the run; an answer that came from an older one is
            compared with that one.
        advance: called after each request.
    """
    verdict = Verdict()
    for sample in samples:
        if sample.is_ok:
            await _verify_one(client, scenario, plan, sample, versions.get(sample.model, ()), verdict)
        else:
            verdict.leave_out("failed under load")
        advance()
    return verdict


async def _verify_one(
    client: Client, scenario: Scenario, plan: Plan, sample: Sample, versions: Sequence[int], verdict: Verdict
) -> None:
    names = [sample.model, *(f"{sample.model}@{version}" for version in versions[-2::-1])]
    for name in names:
        solo = await _solo(client, scenario, plan, sample, name)
        if not solo.is_ok:
            verdict.leave_out(f"failed alone: {solo.failure}")
            return
        if solo.fingerprint == sample.fingerprint:
            _compare(sample, solo, verdict)
            return
    verdict.leave_out("its version is gone")


async def _solo(client: Client, scenario: Scenario, plan: Plan, sample: Sample, model: str) -> Sample:
    request = plan.requests[sample.index]
    body = request_body(scenario.request, model, request.prompt, request.output_tokens)
    solo = replace(
        sample,
        model=model,
        scheduled_s=client.now_s(),
        token_at_s=[],
        token_ids=[],
        text="",
        num_output_tokens=0,
        is_counted=False,
        fingerprint=None,
        finish_reason=None,
        status=None,
    )
    await client.send(scenario.request.path, encode_body(body), solo)
    return solo


def _compare(sample: Sample, solo: Sample, verdict: Verdict) -> None:
    has_ids = bool(sample.token_ids) and bool(solo.token_ids)
    verdict.by_token_ids = verdict.by_token_ids and has_ids
    if has_ids:
        is_equal = sample.token_ids == solo.token_ids
    else:
        is_equal = (sample.text, sample.num_output_tokens) == (solo.text, solo.num_output_tokens)
    if is_equal:
        verdict.num_equal += 1
    else:
        shown = (repr(one.token_ids[:24] if has_ids else one.text[:120]) for one in (sample, solo))
        verdict.mismatches.append(Mismatch(sample.index, sample.model, *shown))
