"""The engine as the API sees it: one protocol with two implementations, the socket client and the tests' fake.

Owns the shape of that door only; the transport lives in `engine_client`. Invariant: every iterator that `generate` or
`follow` returns ends with `Finished` or raises a `ServeError`, and closing it early aborts the sequence in the engine.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

from serve.api.adapter_desk import AdapterDesk
from serve.api.request_stream import Take
from serve.messages import Embed, Finished, Ready, Started, Stats, Submit, Tokens

# what a sequence that was submitted is told of
SequenceEvent = Started | Tokens | Finished


class EngineGateway(Protocol):
    """What the API may ask of the engine process."""

    @property
    def stats(self) -> Stats | None:
        """The last heartbeat; None before the first one."""
        ...

    @property
    def ready(self) -> Ready | None:
        """What the engine learnt at start-up; None while it starts."""
        ...

    @property
    def is_live(self) -> bool:
        """Say whether the engine's heartbeat is recent, or its start is still within its time."""
        ...

    @property
    def is_ready(self) -> bool:
        """Say whether requests are accepted and the engine makes progress."""
        ...

    @property
    def is_draining(self) -> bool:
        """Say whether the server is on its way down and takes no new sequences."""
        ...

    @property
    def desk(self) -> AdapterDesk:
        """The operator's commands on adapters in memory, and what became of them."""
        ...

    def admit(self, num_sequences: int) -> None:
        """Refuse at once what cannot be taken; called before any tokenising.

        Raises:
            QueueFull: as many sequences are in flight as the server lets in.
            EngineLoading: the engine starts, or starts again.
        """
        ...

    def generate(self, submit: Submit) -> AsyncGenerator[SequenceEvent, None]:
        """Submit one sequence when first iterated, and yield its events in order.

        Raises:
            ServeError: the sequence failed, the queue is full, or the engine is gone.
        Notes: closing the generator (`aclose`, cancellation) sends `Abort` when no terminal event was seen.
        """
        ...

    def follow(
        self, submit: Submit, silence_s: float, take: Take | None = None
    ) -> AsyncGenerator[SequenceEvent | None, None]:
        """As `generate`, with None after each `silence_s` without an event, and without the tokens that `take` takes.

        Args:
            take: may be offered tokens while the iterator waits for them, in the order of all events.
        """
        ...

    async def embed(self, embed: Embed) -> list[float]:
        """Run the prompt and return its pooled hidden state.

        Raises:
            ServeError: the request failed, the queue is full, or the engine is gone.
        """
        ...

    def load_adapter(self, digest: str) -> None:
        """Ask the engine to bring an adapter into memory; returns at once."""
        ...

    def unload_adapter(self, digest: str) -> None:
        """Ask the engine to forget an adapter once its last pin is gone; returns at once."""
        ...
