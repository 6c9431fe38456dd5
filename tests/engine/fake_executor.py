"""An executor without torch: keeps K/V by block, adapters by slot, and refuses plans that a real one would spoil.

Owns the model of device memory in tests. With `is_async` it is also a device that runs submitted steps in order while
the host goes on. Invariants: a row reads only what its block table names, and each read is checked: written before, by
the same adapter and salt, in a block that no non-finite row left behind; what a step in flight names is left alone.
"""

from collections import Counter, deque
from dataclasses import dataclass

from serve.engine.plan import LoadResult, Row, RowResult, StepPlan
from serve.messages import TokenLogprobs
from tests.engine.toy_model import (
    VOCAB_SIZE,
    Toy,
    adapter_number,
    composed_number,
    hidden_of,
    kv_of,
    kv_seed,
    logprob_of,
    sample_token,
)


class PlanViolation(BaseException):
    """The engine asked for something that would give wrong tokens or touch memory it does not own.

    No `Exception`, so that the engine's wall around a step cannot contain it.
    """


class StepLost(RuntimeError):
    """The fake device failed."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The K/V of one position; `is_finite` is False where a poisoned row wrote."""

    kv: int
    adapter: int
    salt: str
    writer: str
    is_finite: bool


@dataclass(slots=True)
class AdapterFile:
    """How the loads of one adapter go: bytes, polls until done, and how many of the first loads fail."""

    num_bytes: int
    num_polls: int = 1
    num_failures: int = 0


@dataclass(frozen=True, slots=True)
class RowInFlight:
    """What a row of a submitted step names, as it was when it was submitted, and what it will come back with."""

    row: Row
    block_table: list[int]
    written_blocks: set[int]
    result: RowResult


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A submitted step; `is_lost`: its collection raises."""

    rows: dict[str, RowInFlight]
    slots: set[int]
    is_lost: bool


class FakeExecutor:
    """`serve.engine.plan.AsyncExecutor` over the toy model; synchronous unless `is_async`."""

    def __init__(
        self, num_blocks: int, block_size: int, files: dict[str, AdapterFile], *, is_async: bool = False
    ) -> None:
        self.is_async = is_async
        self._block_size = block_size
        self._cells: list[list[Cell | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._files = files
        self._loaded: dict[int, str] = {}
        self._loading: deque[tuple[str, int, int]] = deque()
        # images that loads read, where there is a host tier
        self.images_here: set[str] | None = None
        # what the tests tell of each request: its salt, what acts where, the first position that comes out not finite
        self.salts: dict[str, str] = {}
        self.toys: dict[str, Toy] = {}
        self.poisoned_from: dict[str, int] = {}
        # the next steps that are lost; then every one that names this adapter is
        self.num_lost_steps = 0
        self.broken_digest: str | None = None
        # where a lost step raises in the asynchronous mode
        self.loses_at_submit = False
        self._in_flight: deque[StepInFlight] = deque()
        self.released: Counter[str] = Counter()
        self.max_bytes_loaded = 0
        self.num_rows = 0

    def execute(self, plan: StepPlan) -> list[RowResult]:
        """Run one step of the toy model, alone."""
        if self._in_flight:
            raise PlanViolation("a plan is executed while submitted steps are in flight")
        results = self._run_plan(plan)
        # lost after the writes: the second attempt must not mind them
        if self._is_lost(plan):
            raise StepLost("the step was lost")
        return results

    def submit(self, plan: StepPlan) -> None:
        """Run one step of the toy model and keep its results back."""
        if not self.is_async or len(self._in_flight) == 2:
            raise PlanViolation(f"a step is submitted behind {len(self._in_flight)} others")
        is_lost = self._is_lost(plan)
        if is_lost and self.loses_at_submit:
            raise StepLost("the step could not be submitted")
        rows = {}
        for row, result in zip(plan.rows, self._run_plan(plan), strict=True):
            first, last = self._written(row)
            rows[row.request_id] = RowInFlight(row, list(row.block_table), set(row.block_table[first:last]), result)
        self._in_flight.append(StepInFlight(rows, set(plan.slot_digests), is_lost))

    def collect(self) -> list[RowResult]:
        """Hand out the results of the oldest submitted step."""
        if not self._in_flight:
            raise PlanViolation("a step is collected that was not submitted")
        step = self._in_flight.popleft()
        if step.is_lost:
            raise StepLost("the submitted step was lost")
        return [in_flight.result for in_flight in step.rows.values()]

    def _run_plan(self, plan: StepPlan) -> list[RowResult]:
        if not plan.rows:
            raise PlanViolation("an empty plan was executed")
        names = [row.request_id for row in plan.rows]
        if len(set(names)) != len(names):
            raise PlanViolation(f"a request has two rows in one step: {names}")
        for slot, digest in plan.slot_digests.items():
            if self._loaded.get(slot) != digest:
                raise PlanViolation(f"slot {slot} is named as {digest} and holds {self._loaded.get(slot)}")
        self._check_writers(plan)
        for row in plan.rows:
            self._check_against_flight(row)
            if row.sample is not None and min(row.sample.prompt_ids) < 0:
                raise PlanViolation(f"{row.request_id} shows the sampler virtual tokens")
        return [self._run(row, plan) for row in plan.rows]

    def _is_lost(self, plan: StepPlan) -> bool:
        if self.num_lost_steps > 0:
            self.num_lost_steps -= 1
            return True
        return self.broken_digest is not None and self.broken_digest in plan.slot_digests.values()

    def start_load(self, digest: str, slot: int) -> None:
        """Queue a load."""
        if slot in self._loaded or slot in {other for _, other, _ in self._loading}:
            raise PlanViolation(f"slot {slot} is loaded over")
        self._check_slot_is_at_rest(slot)
        if digest in self._loaded.values() or digest in {other for other, _, _ in self._loading}:
            raise PlanViolation(f"{digest} is loaded twice")
        self._check_image(digest)
        self._loading.append((digest, slot, self._files[digest].num_polls))

    def poll_loads(self) -> list[LoadResult]:
        """Advance all loads by one poll and return those that ended."""
        ended, still = [], deque[tuple[str, int, int]]()
        for digest, slot, num_polls in self._loading:
            self._check_image(digest)
            file = self._files[digest]
            if num_polls > 1:
                still.append((digest, slot, num_polls - 1))
            elif file.num_failures > 0:
                file.num_failures -= 1
                ended.append(LoadResult(digest, slot, 0, 0, 0.5, "the file is damaged"))
            else:
                self._loaded[slot] = digest
                ended.append(LoadResult(digest, slot, file.num_bytes, 8, 0.5))
        self._loading = still
        return ended

    def drop(self, digest: str, slot: int) -> None:
        """Free a slot."""
        self._check_slot_is_at_rest(slot)
        if self._loaded.pop(slot, None) != digest:
            raise PlanViolation(f"{digest} is dropped from slot {slot}, where it is not")

    def release_request(self, request_id: str) -> None:
        """Count the goodbye."""
        if any(request_id in step.rows for step in self._in_flight):
            raise PlanViolation(f"{request_id} is released with a row in flight")
        self.released[request_id] += 1

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Clear blocks."""
        for block_id in block_ids:
            self._cells[block_id] = [None] * self._block_size

    @property
    def num_bytes_loaded(self) -> int:
        """Bytes of all loaded adapters."""
        return sum(self._files[digest].num_bytes for digest in self._loaded.values())

    @property
    def loaded(self) -> set[str]:
        """Digests in memory."""
        return set(self._loaded.values())

    def _check_writers(self, plan: StepPlan) -> None:
        writers: Counter[int] = Counter()
        for row in plan.rows:
            first, last = self._written(row)
            if last > len(row.block_table):
                raise PlanViolation(f"{row.request_id} writes behind its block table")
            writers.update(row.block_table[first:last])
        for row in plan.rows:
            first, last = self._written(row)
            for index, block_id in enumerate(row.block_table):
                mine = first <= index < last
                if writers[block_id] > mine:
                    raise PlanViolation(f"block {block_id} of {row.request_id} is written by another row of the step")

    def _written(self, row: Row) -> tuple[int, int]:
        """Return which part of its block table a row writes."""
        return row.start // self._block_size, -(-(row.start + len(row.token_ids)) // self._block_size)

    def _check_image(self, digest: str) -> None:
        if self.images_here is not None and digest not in self.images_here:
            raise PlanViolation(f"a load reads the image of {digest}, which is not in host memory")

    def _check_slot_is_at_rest(self, slot: int) -> None:
        if any(slot in step.slots for step in self._in_flight):
            raise PlanViolation(f"slot {slot} is changed while a step in flight names it")

    def _check_against_flight(self, row: Row) -> None:
        """Refuse a row that does not go on where its last one in flight ends, or that touches what others write."""
        for step in self._in_flight:
            for request_id, other in step.rows.items():
                if request_id != row.request_id and not other.written_blocks.isdisjoint(row.block_table):
                    raise PlanViolation(f"{row.request_id} holds a block that {request_id} writes in flight")
        mine = self._in_flight[-1].rows.get(row.request_id) if self._in_flight else None
        if mine is not None and row.start != mine.row.start + len(mine.row.token_ids):
            raise PlanViolation(f"{row.request_id} does not go on where its row in flight ends")
        if row.is_chained:
            self._check_chained(row, mine)
        elif not row.token_ids or any(token_id < 0 for token_id in self._own_tokens(row)):
            raise PlanViolation(f"{row.request_id} runs {row.token_ids}")

    def _check_chained(self, row: Row, mine: RowInFlight | None) -> None:
        if mine is None or mine.row.sample is None or row.token_ids != [-1] or row.sample is None:
            raise PlanViolation(f"{row.request_id} is chained to nothing, or is no decode row")
        params = row.sample.params
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        if params.grammar is not None or penalties != (1.0, 0.0, 0.0):
            raise PlanViolation(f"{row.request_id} is chained and needs its last token to sample")

    def _own_tokens(self, row: Row) -> list[int]:
        """Return the row's tokens behind the adapter's prompt, which is checked."""
        toy = self.toys.get(row.request_id)
        num_virtual = 0 if toy is None else max(0, min(toy.num_virtual - row.start, len(row.token_ids)))
        if row.token_ids[:num_virtual] != [-2 - row.start - i for i in range(num_virtual)]:
            raise PlanViolation(f"{row.request_id} runs {row.token_ids} at {row.start}, where its adapter's prompt is")
        if num_virtual and (row.num_prompt_logprobs is not None or row.embed == "mean"):
            raise PlanViolation(f"{row.request_id} is asked for something at its virtual tokens")
        return row.token_ids[num_virtual:]

    def _adapter(self, row: Row, plan: StepPlan) -> int:
        """Return the number of what acts on a row, which must be the same at all of its positions."""
        if row.composed:
            adapter = composed_number(tuple((plan.slot_digests[slot], weight) for slot, weight in row.composed))
        else:
            adapter = adapter_number(None if row.adapter_slot is None else plan.slot_digests[row.adapter_slot])
        toy = self.toys.get(row.request_id)
        if toy is not None and {toy.at(row.start + i) for i in range(len(row.token_ids))} != {adapter}:
            raise PlanViolation(f"{row.request_id} runs another adapter than acts at {row.start}")
        return adapter

    def _tokens(self, row: Row) -> list[int]:
        if not row.is_chained:
            return row.token_ids
        step = self._in_flight[-1]
        sampled = step.rows[row.request_id].result.token_id
        # a device samples something from NaN, too, and anything in a step that is lost
        return [0 if sampled is None else (sampled + step.is_lost) % VOCAB_SIZE]

    def _run(self, row: Row, plan: StepPlan) -> RowResult:
        self.num_rows += 1
        adapter, salt = self._adapter(row, plan), self.salts.get(row.request_id, "")
        chain = self._read(row, adapter, salt)
        begin = len(chain)
        poisoned_from = self.poisoned_from.get(row.request_id)
        is_finite = True
        for offset, token_id in enumerate(self._tokens(row)):
            position = begin + offset
            chain.append(kv_of(chain[-1] if chain else kv_seed(adapter), token_id, adapter))
            is_finite = is_finite and (poisoned_from is None or position < poisoned_from)
            block_id = row.block_table[position // self._block_size]
            self._cells[block_id][position % self._block_size] = Cell(
                chain[-1], adapter, salt, row.request_id, is_finite
            )
        if not is_finite:
            return RowResult(row.request_id, None, is_finite=False)
        return self._result(row, chain, begin)

    def _read(self, row: Row, adapter: int, salt: str) -> list[int]:
        """Read the K/V before the row's first token, through its block table."""
        cells = [cell for block_id in row.block_table for cell in self._cells[block_id]]
        # its own ones may be there: a lost step is run again
        if any(cell is not None and not cell.is_finite and cell.writer != row.request_id for cell in cells):
            raise PlanViolation(f"{row.request_id} holds a block that a non-finite row wrote")
        chain, toy = [], self.toys.get(row.request_id)
        for position, cell in enumerate(cells[: row.start]):
            if cell is None:
                raise PlanViolation(f"{row.request_id} reads position {position}, which nobody wrote")
            expected = adapter if toy is None else toy.at(position)
            if cell.adapter != expected or cell.salt != salt:
                raise PlanViolation(f"{row.request_id} reads another adapter's or tenant's K/V at {position}")
            chain.append(cell.kv)
        return chain

    def _result(self, row: Row, chain: list[int], begin: int) -> RowResult:
        token_id, hidden, logprobs = None, None, None
        if row.sample is not None:
            params, output_index = row.sample.params, len(row.sample.output_ids) + row.is_chained
            allows_eos = output_index >= params.min_tokens
            token_id = sample_token(chain, params.seed, output_index, allows_eos=allows_eos)
        if row.embed is not None:
            states = [hidden_of(kv) for kv in (chain[begin:] if row.embed == "mean" else chain[-1:])]
            hidden = [sum(column) for column in zip(*states, strict=True)]
        if row.num_prompt_logprobs is not None and row.prompt_targets is not None:
            logprobs = [logprob_of(chain[begin + i], target) for i, target in enumerate(row.prompt_targets)]
        chosen = None
        if token_id is not None and row.sample is not None and row.sample.params.num_logprobs is not None:
            chosen = TokenLogprobs(token_id, -1.0, [], [])
        return RowResult(row.request_id, token_id, chosen, logprobs, hidden)
