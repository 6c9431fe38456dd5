"""A tiny engine without torch, and the worker module that runs it in a real child process.

`python -m tests.process.fake_engine --socket PATH` is what the supervisor spawns in these tests. A prompt's first token
says how the sequence behaves; the folder name in `model_dir` says how the start goes.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from serve.adapter_messages import AdapterDone, AskReady, EvictAdapter, PinAdapter, PinState, UnpinAdapter
from serve.config import EngineConfig
from serve.engine.step_loop import BuiltEngine, run_worker
from serve.errors import StartError
from serve.messages import (
    Abort,
    AdapterState,
    Command,
    Embed,
    Embedded,
    Event,
    Failed,
    Finished,
    FinishReason,
    LoadAdapter,
    Ready,
    Started,
    Stats,
    Submit,
    Tokens,
    UnloadAdapter,
)

COUNT, CRASH, HANG, REFUSE, EXIT = range(5)
STEP_S = 0.002


@dataclass(slots=True)
class FakeSequence:
    """One running sequence."""

    submit: Submit
    num_done: int = 0


# names a file that appears when the engine is closed
END_NOTE = "FAKE_ENGINE_END_NOTE"
# names a file: while it is there, no sequence gets its last token, and no engine becomes ready
HOLD = "FAKE_ENGINE_HOLD"


class FakeEngine:
    """Counts: output token i of a sequence is i."""

    def __init__(self) -> None:
        self._sequences: dict[str, FakeSequence] = {}
        self._answers: list[Event] = []
        self._adapters: dict[str, None] = {}
        self._pins: dict[str, None] = {}
        self._num_steps = 0
        self._num_tokens = 0

    def handle(self, command: Command) -> None:
        """Take one command."""
        if isinstance(command, Submit):
            self._sequences[command.request_id] = FakeSequence(command)
            if command.adapter_digest is not None:
                self._adapters[command.adapter_digest] = None
        elif isinstance(command, Embed):
            self._answers.append(Embedded(command.request_id, [float(t) for t in command.prompt_token_ids]))
        elif isinstance(command, Abort):
            self._sequences.pop(command.request_id, None)
        elif isinstance(command, PinAdapter | UnpinAdapter | EvictAdapter):
            self._operate(command)
        elif isinstance(command, LoadAdapter):
            self._adapters[command.digest] = None
        elif isinstance(command, AskReady):
            is_cold = not self._adapters.keys() >= set(command.digests)
            self._adapters |= dict.fromkeys(command.digests)
            self._answers.append(AdapterDone(command.request_id, is_pending=is_cold))
        elif isinstance(command, UnloadAdapter):
            self._adapters.pop(command.digest, None)

    def _operate(self, command: PinAdapter | UnpinAdapter | EvictAdapter) -> None:
        """Do as the operator asks; an adapter called "silent" is never answered for, "refused" is."""
        if command.digest == "silent":
            return
        if command.digest == "refused":
            self._answers.append(Failed(command.request_id, "conflict", "no room for this pin", 409))
            return
        if isinstance(command, PinAdapter):
            self._pins[command.digest] = None
        elif isinstance(command, UnpinAdapter):
            self._pins.pop(command.digest, None)
        self._answers.append(AdapterDone(command.request_id, num_bytes_freed=7))

    def has_work(self) -> bool:
        """Say whether a sequence runs or an answer waits."""
        return bool(self._sequences or self._answers)

    def step(self) -> list[Event]:
        """Give each sequence one token."""
        time.sleep(STEP_S)
        self._num_steps += 1
        events, self._answers = self._answers, []
        for request_id, sequence in list(self._sequences.items()):
            events += self._advance(request_id, sequence)
        return events

    def stats(self) -> Stats:
        """Return the heartbeat: one block per sequence, one pin per sequence with an adapter."""
        digests = [s.submit.adapter_digest for s in self._sequences.values() if s.submit.adapter_digest is not None]
        return Stats(
            step_index=self._num_steps,
            num_running=len(self._sequences),
            num_waiting=0,
            num_kv_blocks=64,
            num_kv_blocks_in_use=len(self._sequences),
            block_size=16,
            num_adapter_pins=len(digests),
            adapters=[AdapterState(digest, "device", digests.count(digest), 100, 8) for digest in self._adapters],
            num_preemptions_total=0,
            num_prompt_tokens_total=0,
            num_generated_tokens_total=self._num_tokens,
            num_prefix_hit_tokens_total=0,
            num_adapter_loads_total=len(self._adapters),
            num_adapter_evictions_total=0,
            num_steps_total=self._num_steps,
            operator_pins=[PinState(digest) for digest in self._pins],
        )

    def _advance(self, request_id: str, sequence: FakeSequence) -> list[Event]:
        behaviour = sequence.submit.prompt_token_ids[0]
        if behaviour == CRASH:
            raise RuntimeError("a planted fault in the step")
        if behaviour == EXIT:
            os._exit(3)
        if behaviour == HANG:
            time.sleep(3600)
        if behaviour == REFUSE:
            del self._sequences[request_id]
            return [Failed(request_id, "adapter_not_loaded", "adapter 'x' could not be loaded", 503)]
        if sequence.num_done == sequence.submit.sampling.max_tokens - 1 and _is_held():
            return []
        events: list[Event] = [] if sequence.num_done else [Started(request_id, 0, 0.0, 0.0)]
        events.append(Tokens(request_id, [sequence.num_done]))
        sequence.num_done += 1
        self._num_tokens += 1
        if sequence.num_done == sequence.submit.sampling.max_tokens:
            del self._sequences[request_id]
            events.append(Finished(request_id, FinishReason.LENGTH))
        return events


def build_fake(config: EngineConfig) -> BuiltEngine:
    """Start as the model folder's name says."""
    start = config.model_dir.name
    if start == "refused":
        raise StartError("architecture 'Mystery' is not supported;\n supported: Llama")
    if start == "broken":
        raise ValueError("no such tensor")
    if start == "dies":
        os._exit(9)
    if start == "sleeps":
        time.sleep(3600)
    while _is_held():
        time.sleep(STEP_S)
    ready = Ready("sha256:fake", 4096, 64, 16, "float32", "cpu", [0], 256, 4)
    return BuiltEngine(FakeEngine(), ready, close=_note_end)


def _is_held() -> bool:
    return Path(os.environ.get(HOLD, "")).is_file()


def _note_end() -> None:
    if note := os.environ.get(END_NOTE):
        Path(note).touch()


if __name__ == "__main__":
    raise SystemExit(run_worker(sys.argv[2], sys.stdin.buffer.read(), build_fake))
