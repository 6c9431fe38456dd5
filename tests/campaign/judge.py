"""Whether an answer is right: from the version that it names, which must have been current, token for token.

Owns the verdict only; knows no HTTP. Invariant: silence is never right: what is neither exact nor a declared refusal
is a complaint, in words.
"""

from dataclasses import dataclass

from tests.campaign.catalog import Catalog

# refusals that the API declares for a server that is full or that still loads; 404 is judged by the catalog
DECLARED = {
    (429, "queue_full"),
    (429, "rate_limit_exceeded"),
    (503, "adapter_loading"),
    (503, "model_loading"),
    (503, "draining"),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it was sent: no name means the base, no version the current one."""

    name: str | None
    version: int | None
    prompt_indices: tuple[int, ...]
    num_tokens: int
    sent: float


def possible(catalog: Catalog, asked: Asked, answered: float) -> set[str | None]:
    """Return the digests that may have answered; None stands for a 404."""
    assert asked.name is not None, "the base is always there"
    history = catalog.history(asked.name)
    if asked.version is None:
        return history.possible(asked.sent, answered)
    return history.possible_version(asked.version, asked.sent, answered)


def judge(
    catalog: Catalog, asked: Asked, digest: str | None, tokens: list[list[int]], answered: float, *, is_whole: bool
) -> str | None:
    """Return what is wrong with an answer, None if nothing is.

    Args:
        digest: of the adapter that the answer says it comes from.
        tokens: per prompt asked for; of an answer that was left, what had come: judged as far as its solo run goes.
    """
    if asked.name is None:
        expected: list[list[int]] | None = catalog.base_answers
        if digest is not None:
            return f"the base's answer names the adapter {digest[:12]}"
    else:
        if digest not in possible(catalog, asked, answered):
            return f"{asked.name}@{asked.version or 'current'} was answered by {digest and digest[:12]}, not current"
        expected = catalog.answers(digest or "")
    if expected is None:
        return f"{asked.name} was answered by {digest}, which nobody published"
    for index, got in zip(asked.prompt_indices, tokens, strict=True):
        wanted = expected[index][: asked.num_tokens]
        is_exact = got == wanted if is_whole else got[: len(wanted)] == wanted[: len(got)]
        if not is_exact:
            return f"{asked.name}@{asked.version or 'current'} prompt {index}: tokens {got}, alone {wanted}"
    return None


def judge_refusal(catalog: Catalog, asked: Asked, status: int, code: str, answered: float) -> str | None:
    """Return what is wrong with a refusal, None if it is one that the API declares for this case."""
    if (status, code) in DECLARED:
        return None
    if (status, code) == (404, "model_not_found") and asked.name is not None:
        if None in possible(catalog, asked, answered):
            return None
        return f"{asked.name}@{asked.version or 'current'} is published, but 404"
    return f"{asked.name}: status {status}, code {code!r}"
