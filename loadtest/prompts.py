"""What a request says: prompts of a wanted length, as token ids, text or chat messages, and the body around them.

Owns the contents of requests. Invariant: a prompt is a function of the plan's seed, its request and the shape, so a
second run, or a solo run of one request, sends the same bytes; two requests share a prefix only where the plan says so.
"""

import random
from dataclasses import dataclass

from loadtest.errors import InvalidScenario
from loadtest.tables import Table

KINDS = ("chat", "text", "tokens")
# ids below are special tokens in every tokenizer we know, and every vocabulary has those in between
_FIRST_ID, _LAST_ID = 16, 255
# everyday words: one token each in most vocabularies of real models
_TEXT = (
    "the be to of and in that have it for not on with he as you do at this but his by from they we say her she or an "
    "will my one all would there their what so up out if about who get which go me when make can like time no just "
    "him know take people into year your good some could them see other than then now look only come its over think"
)
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class RequestShape:
    """How every request of a run looks.

    kind: `tokens` (completions with token ids in [first_id, last_id], the length exact), `text` (completions with
    words) or `chat`; of words a request has as many as it should have tokens, the server's usage says what they came
    to.
    """

    kind: str
    first_id: int
    last_id: int
    prefix_tokens: int
    temperature: float
    ignore_eos: bool
    wants_token_ids: bool
    timeout_s: float

    @property
    def path(self) -> str:
        """Return where requests go."""
        return "/v1/chat/completions" if self.kind == "chat" else "/v1/completions"


def read_request_shape(table: Table) -> RequestShape:
    """Read a scenario's `[request]`; every key has a default."""
    first_id = table.whole("first_id", _FIRST_ID, high=2**31)
    shape = RequestShape(
        kind=table.text("kind", "tokens", among=KINDS),
        first_id=first_id,
        last_id=table.whole("last_id", max(first_id, _LAST_ID), low=first_id, high=2**31),
        prefix_tokens=table.whole("prefix_tokens", 0, high=1 << 20),
        temperature=table.number("temperature", 0.0, high=2.0),
        ignore_eos=table.flag("ignore_eos", default=True),
        wants_token_ids=table.flag("return_token_ids", default=False),
        timeout_s=table.number("timeout_s", 600.0, low=1e-3, high=86_400.0),
    )
    table.close()
    return shape


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """What a prompt is made from; `blocks` are shared pieces of `block_tokens` each, as in Mooncake's traces."""

    seed: int
    index: int
    num_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0


def prompt_ids(shape: RequestShape, plan: PromptPlan) -> list[int]:
    """Return `plan.num_tokens` token ids."""
    ids = _draw(shape, f"{plan.seed}/prefix", shape.prefix_tokens)
    for block in plan.blocks:
        if len(ids) + plan.block_tokens > plan.num_tokens:
            break
        ids += _draw(shape, f"{plan.seed}/block/{block}", plan.block_tokens)
    own = plan.num_tokens - len(ids)
    return (ids + _draw(shape, f"{plan.seed}/prompt/{plan.index}", max(0, own)))[: plan.num_tokens]


def request_body(shape: RequestShape, model: str, plan: PromptPlan, output_tokens: int) -> dict[str, object]:
    """Return the JSON body of one streamed request."""
    ids = prompt_ids(shape, plan)
    body: dict[str, object] = {"model": model}
    if shape.kind == "tokens":
        body["prompt"] = ids
    else:
        text = " ".join(_WORDS[token_id % len(_WORDS)] for token_id in ids)
        body |= {"messages": [{"role": "user", "content": text}]} if shape.kind == "chat" else {"prompt": text}
    body |= {"max_tokens": output_tokens, "temperature": shape.temperature, "seed": plan.seed + plan.index}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if shape.ignore_eos:
        body["ignore_eos"] = True
    if shape.wants_token_ids:
        body["return_token_ids"] = True
    return body


def check_shape(shape: RequestShape, vocab: int | None) -> None:
    """Refuse token ids that the server's vocabulary, where known, does not have."""
    if shape.kind == "tokens" and vocab is not None and shape.last_id >= vocab:
        raise InvalidScenario(f"request.last_id {shape.last_id} is outside the vocabulary of {vocab} tokens (--vocab)")


def _draw(shape: RequestShape, key: str, count: int) -> list[int]:
    return random.Random(key).choices(range(shape.first_id, shape.last_id + 1), k=count) if count else []
