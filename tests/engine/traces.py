"""Random traces over the engine: what a seed stands for, and the checker that holds answers to the slow simulation.

Owns the generation and the judgement; the tests choose how many. Invariant: a trace depends on its seed alone, so a
finding is replayed by `run_trace(seed)`.
"""

import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace

from serve.engine.engine import Engine
from serve.engine.limits import EngineLimits
from serve.messages import (
    Abort,
    Embed,
    Embedded,
    Event,
    Failed,
    Finished,
    FinishReason,
    LoadAdapter,
    SamplingParams,
    Started,
    Stats,
    Submit,
    Tokens,
    UnloadAdapter,
)
from tests.engine.fake_executor import AdapterFile, FakeExecutor
from tests.engine.fake_fetcher import FakeFetcher, ImageFile
from tests.engine.toy_model import EOS_ID, VOCAB_SIZE, Toy, run_alone
from tests.engine.trace_operator import TraceOperator

DIGESTS = tuple(f"{number:064x}" for number in range(1, 6))
# adapters with a prompt of so many virtual tokens, and those that act from some position on
PROMPTED = {DIGESTS[1]: 3, DIGESTS[2]: 5}
WAITING = (DIGESTS[3], DIGESTS[4])
WEIGHTS = (1.0, 1.0, 0.5, -2.0, 0.0)
# three times the longest trace seen in 10,000
MAX_DRAIN_STEPS = 2000


@dataclass(frozen=True, slots=True)
class Acts:
    """The fields of a command that say what acts."""

    adapter_digest: str | None = None
    adapters: tuple[tuple[str, float], ...] = ()
    num_virtual_tokens: int = 0
    active_from: int | None = None


class WrongAnswer(AssertionError):
    """An answer differs from the slow simulation, or a life did not end in exactly one terminal event."""


@dataclass(slots=True)
class Sent:
    """One request of a trace and all that came back."""

    command: Submit | Embed
    was_aborted: bool = False
    events: list[Event] = field(default_factory=list)


class Trace:
    """One seeded run: random limits, commands, loads, failures and aborts; checked after every step."""

    def __init__(self, seed: int, *, is_async: bool) -> None:
        self.rng = rng = random.Random(seed)
        block_size = rng.choice((2, 4))
        self.limits = EngineLimits(
            num_kv_blocks=rng.choice((4, 6, 8, 10, 14, 20)),
            block_size=block_size,
            max_model_len=rng.choice((12, 24, 40)),
            max_num_seqs=rng.randint(1, 6),
            max_step_tokens=rng.choice((1, 3, 7, 16)),
            max_waiting=rng.choice((3, 100)),
            adapter_device_bytes=rng.choice((4, 6, 10)),
            num_adapter_slots=rng.randint(1, 3),
            eos_token_ids=(EOS_ID,),
            enable_prefix_cache=rng.random() < 0.85,
        )
        # its own random numbers, as the host tier's below
        numbers = random.Random(-(1 << 32) - seed)
        mixed, divisor = numbers.choice((None, None, 1, 2, 5)), numbers.choice((None, 1, 2, 4))
        self.limits = replace(self.limits, max_mixed_prefill_tokens=mixed, mixed_prefill_divisor=divisor)
        files = {
            digest: AdapterFile(rng.choice((1, 2, 4, 5)), rng.randint(1, 6), rng.choice((0, 0, 0, 1)))
            for digest in DIGESTS
        }
        self.executor = FakeExecutor(self.limits.num_kv_blocks, block_size, files, is_async=is_async)
        self.fetcher = self._host_tier(random.Random(-1 - seed), files)
        self.now_s = 0.0
        self.engine = Engine(self.limits, self.executor, lambda: self.now_s, self.fetcher)
        self.sent: dict[str, Sent] = {}
        self.broken: set[str] = set()
        self.operator = TraceOperator(rng, self.engine, self.executor)
        stem = [rng.randrange(1, VOCAB_SIZE) for _ in range(20)]
        self.stems = [stem, stem[:6] + stem[2:16], [rng.randrange(1, VOCAB_SIZE) for _ in range(20)]]

    def _host_tier(self, rng: random.Random, files: dict[str, AdapterFile]) -> FakeFetcher | None:
        """Put a host tier under three of four traces, from one that holds a single image to one that holds all.

        Its own random numbers leave everything else that a seed stands for as it is.
        """
        if rng.random() < 0.25:
            return None
        self.limits = replace(
            self.limits, adapter_host_bytes=rng.choice((4, 6, 10, 40)), max_host_images=rng.choice((1, 2, 5))
        )
        # never the same bytes as on the device
        images = {
            digest: ImageFile(max(1, file.num_bytes - rng.randint(0, 2)), rng.randint(1, 5), rng.choice((0, 0, 0, 1)))
            for digest, file in files.items()
        }
        fetcher = FakeFetcher(images, self.limits.max_host_images, self.limits.adapter_host_bytes)
        self.executor.images_here = fetcher.here
        return fetcher

    def run(self) -> Stats:
        """Play the trace to its end, check everything, and return the engine's last heartbeat."""
        for _ in range(self.rng.randint(5, 30)):
            self._command()
            for _ in range(self.rng.choice((0, 1, 1, 2, 6))):
                self._step()
        self.executor.broken_digest = None
        for _ in range(MAX_DRAIN_STEPS):
            if not self.engine.has_work():
                break
            self._step()
        else:
            raise WrongAnswer("the engine does not come to rest")
        for sent in self.sent.values():
            self._judge(sent)
        return self._judge_rest()

    def _step(self) -> None:
        self.now_s += 0.25
        for event in self.engine.step():
            if not self.operator.saw(event):
                self.sent[event.request_id].events.append(event)  # type: ignore[union-attr]
        self.engine.check_invariants()
        self.operator.judge()

    def _command(self) -> None:
        kind = self.rng.random()
        if kind < 0.59:
            self._submit()
        elif kind < 0.66:
            prompt, pooling = self._prompt(), self.rng.choice(("mean", "last"))
            acts = self._acts(prompt)
            self._send(
                Embed(
                    f"r{len(self.sent)}",
                    prompt,
                    pooling,
                    acts.adapter_digest,
                    acts.adapters,
                    acts.num_virtual_tokens,
                    acts.active_from,
                )
            )
        elif kind < 0.78 and self.sent:
            # an abort under rows that come back not finite is rare and worth meeting
            poisoned = [self.sent[request_id] for request_id in self.executor.poisoned_from]
            sent = self.rng.choice(poisoned if poisoned and self.rng.random() < 0.3 else list(self.sent.values()))
            sent.was_aborted = True
            self.engine.handle(Abort(sent.command.request_id))
        elif kind < 0.83:
            digest = self.rng.choice(DIGESTS)
            self.operator.pinned.discard(digest)
            self.engine.handle(UnloadAdapter(digest))
        elif kind < 0.87:
            self.engine.handle(LoadAdapter(self.rng.choice(DIGESTS)))
        elif kind < 0.91:
            self.executor.num_lost_steps = 1
            self.executor.loses_at_submit = self.rng.random() < 0.3
        elif kind < 0.93:
            # one adapter failing alone would rightly end the engine, so something else runs beside it
            digest = self.rng.choice(DIGESTS)
            self._break(digest)
        elif kind < 0.98:
            self.operator.act(self.rng.choice(DIGESTS))
            self._step()
        else:
            self._step()

    def _break(self, digest: str) -> None:
        params = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
        self._send(Submit(f"r{len(self.sent)}", [3], params, priority=-1))
        self._send(Submit(f"r{len(self.sent)}", [3], params, digest, priority=-1))
        self.broken.add(digest)
        self.executor.broken_digest = digest
        self._step()
        self.executor.broken_digest = None

    def _submit(self) -> None:
        rng = self.rng
        num_siblings = rng.choice((1, 1, 1, 2, 3))
        group_id = f"g{len(self.sent)}" if num_siblings > 1 else ""
        prompt, salt = self._prompt(), rng.choice(("", "", "t1"))
        acts = self._acts(prompt)
        priority, cold_start = rng.choice((0, 0, 0, 1)), rng.choice(("wait", "wait", "wait", "fail"))
        wants_prompt_logprobs = rng.random() < 0.15
        for sibling in range(num_siblings):
            if sibling and acts.active_from is not None and rng.random() < 0.5:
                # the same tokens, one block's K/V of which is another
                acts = replace(acts, active_from=max(0, acts.active_from - 1))
            params = SamplingParams(
                max_tokens=rng.choice((0, 1, 4, 9, 20)) if wants_prompt_logprobs else rng.choice((1, 4, 9, 20)),
                seed=rng.randrange(100),
                min_tokens=rng.choice((0, 0, 3)),
                ignore_eos=rng.random() < 0.3,
                # the toy model minds no penalty, but a sequence that has one waits for its last token
                presence_penalty=rng.choice((0.0, 0.0, 0.0, 0.5)),
                stop_token_ids=rng.choice(((), (), (5,))),
                num_logprobs=rng.choice((None, None, 1)),
                num_prompt_logprobs=0 if wants_prompt_logprobs else None,
            )
            request_id = f"r{len(self.sent)}"
            self.executor.salts[request_id] = salt
            if rng.random() < 0.05:
                self.executor.poisoned_from[request_id] = rng.randrange(20)
            self._send(
                Submit(
                    request_id,
                    prompt,
                    params,
                    acts.adapter_digest,
                    salt,
                    priority,
                    group_id,
                    cold_start,
                    acts.adapters,
                    acts.num_virtual_tokens,
                    acts.active_from,
                )
            )

    def _send(self, command: Submit | Embed) -> None:
        # tenants of unequal weights; nothing random, so that what else a seed stands for stays
        number = len(self.sent) % 3
        command = replace(command, tenant=f"t{number}", tenant_weight=1.0 + number)
        self.sent[command.request_id] = Sent(command)
        self.executor.toys[command.request_id] = Toy.of(command)
        self.engine.handle(command)

    def _prompt(self) -> list[int]:
        stem = self.rng.choice(self.stems)
        tail = [self.rng.randrange(1, VOCAB_SIZE) for _ in range(self.rng.choice((0, 1, 3)))]
        return stem[: self.rng.randint(1, len(stem))] + tail

    def _acts(self, prompt: list[int]) -> "Acts":
        """Choose what acts on a prompt: the base, an adapter of each kind, or a composition of any size."""
        rng = self.rng
        if rng.random() < 0.2:
            chosen = rng.sample(DIGESTS, rng.choice((1, 2, 2, 3)))
            return Acts(adapters=tuple((digest, rng.choice(WEIGHTS)) for digest in chosen))
        digest = None if rng.random() < 0.3 else rng.choice(DIGESTS)
        if digest in PROMPTED:
            return Acts(digest, num_virtual_tokens=PROMPTED[digest])
        # often in the same block, so that prefixes meet
        active_from = rng.choice((0, 2, 3, 3, 4, rng.randrange(20))) if digest in WAITING else None
        if active_from is not None and active_from >= len(prompt):
            return Acts()
        return Acts(digest, active_from=active_from)

    def _judge(self, sent: Sent) -> None:
        request_id, events = sent.command.request_id, sent.events
        kinds = "".join(_LETTERS[type(event)] for event in events)
        if re.fullmatch("ST*[FX]|SE|[FX]", kinds) is None:
            raise WrongAnswer(f"{request_id}: the order of events is {kinds}")
        expected = run_alone(sent.command, self.limits)
        token_ids = [token_id for event in events if isinstance(event, Tokens) for token_id in event.token_ids]
        if token_ids != expected.token_ids[: len(token_ids)]:
            raise WrongAnswer(f"{request_id}: got {token_ids}, alone it gives {expected.token_ids}")
        if isinstance(events[0], Started) and events[0].prompt_logprobs != expected.prompt_logprobs:
            raise WrongAnswer(f"{request_id}: prompt logprobs differ")
        if isinstance(events[0], Started) and events[0].num_cached_tokens >= len(sent.command.prompt_token_ids):
            raise WrongAnswer(f"{request_id}: more tokens are cached than can be")
        end = events[-1]
        if isinstance(end, Embedded) and end.vector != expected.vector:
            raise WrongAnswer(f"{request_id}: got {end.vector}, alone it gives {expected.vector}")
        if isinstance(end, Failed):
            self._judge_failure(sent, end)
        if isinstance(end, Finished) and end.reason is FinishReason.ABORTED:
            if not sent.was_aborted:
                raise WrongAnswer(f"{request_id} was aborted by nobody")
        elif isinstance(end, Finished) and (
            token_ids != expected.token_ids
            or (end.reason, end.stop_token_id) != (expected.reason, expected.stop_token_id)
        ):
            raise WrongAnswer(f"{request_id}: {end} after {token_ids}, alone {expected}")

    def _judge_failure(self, sent: Sent, end: Failed) -> None:
        command = sent.command
        num_prompt = len(command.prompt_token_ids) + command.num_virtual_tokens
        takes_no_wait = command.cold_start == "fail"
        named = {digest for digest, _ in command.adapters} | {command.adapter_digest} - {None}
        is_allowed = {
            "context_length_exceeded": num_prompt >= self.limits.max_sequence_tokens,
            "queue_full": self.limits.max_waiting <= 3,
            "adapter_load_failed": bool(named),
            "adapter_not_loaded": takes_no_wait and bool(named),
            "engine_error": command.request_id in self.executor.poisoned_from or not named.isdisjoint(self.broken),
        }
        if not is_allowed.get(end.code, False):
            raise WrongAnswer(f"{command.request_id} failed for no reason: {end}")

    def _judge_rest(self) -> Stats:
        stats = self.operator.judge_rest()
        if stats.num_running or stats.num_waiting or stats.num_kv_blocks_in_use or stats.num_adapter_pins:
            raise WrongAnswer(f"the engine rests and still holds something: {stats}")
        if self.executor.num_bytes_loaded > self.limits.adapter_device_bytes:
            raise WrongAnswer("more adapter bytes are loaded than the budget allows")
        if {state.digest for state in stats.adapters if state.tier == "device"} != self.executor.loaded:
            raise WrongAnswer("the engine and the device disagree on what is loaded")
        on_host = {state.digest for state in stats.adapters if state.num_host_bytes}
        if on_host != (set() if self.fetcher is None else self.fetcher.here):
            raise WrongAnswer("the engine and the host tier disagree on what is there")
        refusals = ("context_length_exceeded", "queue_full", "adapter_not_loaded", "invalid_value")
        accepted = Counter(
            request_id
            for request_id, sent in self.sent.items()
            if not (isinstance(sent.events[-1], Failed) and sent.events[-1].code in refusals)
        )
        # a refusal for a known too large adapter and a failed load share one code
        doubtful = {r for r, sent in self.sent.items() if getattr(sent.events[-1], "code", "") == "adapter_load_failed"}
        released = self.executor.released
        if {r: n for r, n in released.items() if r not in doubtful} != {r: 1 for r in accepted if r not in doubtful}:
            raise WrongAnswer("a request was released not at all, or more than once")
        return stats


_LETTERS: dict[type, str] = {Started: "S", Tokens: "T", Finished: "F", Failed: "X", Embedded: "E"}


def run_trace(seed: int, *, is_async: bool = False) -> Stats:
    """Run and check one trace, on a synchronous executor or on one that runs two steps deep.

    Raises:
        AssertionError: the engine, its books or an answer is wrong.
    """
    return Trace(seed, is_async=is_async).run()
