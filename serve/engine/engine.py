"""The engine: commands in, one step at a time, events out.

Owns the order of a step and nothing else: what runs is the scheduler's decision, how it runs is the executor's. Single
thread; no torch; the clock is injected. On an asynchronous executor the next step is decided and submitted before the
last one is waited for. Invariant: every command's answers leave through `step`, in order.
"""

from collections.abc import Callable

from serve.adapter_messages import AskReady, EvictAdapter, PinAdapter, UnpinAdapter
from serve.engine.admission import answer_ready
from serve.engine.limits import EngineLimits
from serve.engine.operator_hands import carry_out
from serve.engine.pipeline import StepPipeline
from serve.engine.plan import Executor
from serve.engine.resident import ImageFetcher
from serve.engine.scheduler import Scheduler
from serve.messages import Abort, Command, Embed, Event, LoadAdapter, Stats, Submit, UnloadAdapter


class Engine:
    """Continuous batching over one executor."""

    def __init__(
        self,
        limits: EngineLimits,
        executor: Executor,
        clock: Callable[[], float],
        fetcher: ImageFetcher | None = None,
    ) -> None:
        """Prepare; `fetcher` brings images into the host tier, without one the executor reads the disk."""
        self._limits = limits
        self._executor = executor
        self._fetcher = fetcher
        self._pipeline = StepPipeline(executor)
        self._scheduler = Scheduler(limits, executor, clock, fetcher)
        self._events: list[Event] = []

    def handle(self, command: Command) -> None:
        """Take one command; refusals and aborts are answered by the next `step`."""
        match command:
            case Submit() | Embed():
                self._events += self._scheduler.submit(command)
            case Abort(request_id=request_id):
                self._events += self._scheduler.abort(request_id)
            case LoadAdapter(digest=digest):
                self._scheduler.live.tiers.prefetch(digest)
            case UnloadAdapter(digest=digest):
                self._scheduler.live.tiers.unload(digest)
            case AskReady():
                self._events.append(answer_ready(command, self._scheduler.live))
            case PinAdapter() | UnpinAdapter() | EvictAdapter():
                self._events.append(carry_out(command, self._scheduler.live))
            case _:
                # Shutdown ends the worker's loop; it is no business of the engine
                pass

    def has_work(self) -> bool:
        """Say whether a step could do anything; true while a load is under way, though the step may then be empty."""
        live = self._scheduler.live
        return bool(self._events or live.by_id or self._pipeline or live.tiers.is_loading or live.tiers.has_wish)

    def step(self) -> list[Event]:
        """Run one step: finished loads, plans, one step's results; return all events since the last call, in order.

        A synchronous executor has one plan executed. An asynchronous one is given plans until two are submitted, and
        the results are those of the older one.

        Raises:
            Exception: the executor lost the step as a whole, twice and in every part; the process must be replaced.
        """
        events, self._events = self._events, []
        for fetch in self._fetcher.poll() if self._fetcher is not None else ():
            events += self._scheduler.finish_fetch(fetch)
        for load in self._executor.poll_loads():
            events += self._scheduler.finish_load(load)
        events += self._scheduler.fail_pinned_out()
        events += self._scheduler.expire()
        while not self._pipeline.is_full:
            step = self._scheduler.schedule(is_ahead=bool(self._pipeline))
            if step is None:
                break
            self._pipeline.push(step)
        if self._pipeline:
            step, results = self._pipeline.pop()
            events += self._scheduler.finish_step(step, results)
        return events

    def stats(self) -> Stats:
        """Describe the engine for the heartbeat; hands out what was gathered since the last call."""
        live, counters = self._scheduler.live, self._scheduler.counters
        step_adapters, counters.step_adapters = counters.step_adapters, []
        tiers, hits = live.tiers, live.tiers.hits
        return Stats(
            step_index=counters.num_steps,
            num_running=len(live.running),
            num_waiting=len(live.waiting),
            num_kv_blocks=self._limits.num_kv_blocks,
            num_kv_blocks_in_use=live.kv.num_in_use,
            block_size=self._limits.block_size,
            num_adapter_pins=tiers.num_pins,
            adapters=tiers.states(),
            num_preemptions_total=live.num_preemptions,
            num_prompt_tokens_total=counters.num_prompt_tokens,
            num_generated_tokens_total=counters.num_generated_tokens,
            num_prefix_hit_tokens_total=counters.num_prefix_hit_tokens,
            num_adapter_loads_total=tiers.device.num_loads_total,
            num_adapter_evictions_total=tiers.device.num_evictions_total,
            num_steps_total=counters.num_steps,
            num_adapter_hits_total=hits.num_on_device,
            num_adapter_misses_total=hits.num_on_host + hits.num_missed,
            num_adapter_host_hits_total=hits.num_on_host,
            num_adapter_fetches_total=0 if tiers.host is None else tiers.host.num_fetches_total,
            num_adapter_host_evictions_total=0 if tiers.host is None else tiers.host.num_evictions_total,
            adapter_moves=tiers.take_moves(),
            step_adapters=step_adapters,
            operator_pins=tiers.operator_pins.states(),
        )

    def check_invariants(self) -> None:
        """Recompute all bookkeeping from sequences and steps in flight; AssertionError on the first difference."""
        self._scheduler.live.check_invariants(self._pipeline)
