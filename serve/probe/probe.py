"""The probe of one upload: prompts, the engine's answers, the reference process, the verdict.

Owns the order of these and the reference process' limits. Called by the store in an upload's thread; the engine is
asked in the event loop. Invariant: it returns a proof or raises; after a failure the engine is told to forget the
adapter, and every file it wrote lies in the upload's staging folder.
"""

import asyncio
import json
import os
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from adapters_store.base import SITES
from adapters_store.blobs import OpenAdapter
from adapters_store.convert.options import ConvertOptions
from adapters_store.converter import run_child
from adapters_store.errors import ConversionFailed, ProbeFailed, ProbeNotFinite
from adapters_store.formats import is_model_part
from adapters_store.proof import NotProbed, Proof, Proving, Staged
from adapters_store.strict_json import Json
from serve.errors import EngineLoading
from serve.messages import Ready
from serve.probe.change import SiteChange
from serve.probe.measure import Measured, OtherToken
from serve.probe.observed import OBSERVED_NAME, Observed
from serve.probe.prompts import MAX_OWN_TOKENS, Prompt, Wishes, choose_prompts
from serve.probe.served import Carrier, ProbedEngine, ask
from serve.probe.verdict import check_agreement, check_effect, proof_of

_REFERENCE_MODULE = "serve.probe.reference"

_MIN_MEMORY_BYTES = 3 << 30
# of the largest linear layer: as float32, once more in float64, a tuner's own terms, and the reader's copy
_LAYER_COPIES = 8
_START_SECONDS = 60
_RETRY_AFTER_S = 5
_MIN_BYTES_PER_SECOND = 10 << 20

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class EngineProbe:
    """A `Probe` on a running engine; `loop` is the one that the engine's gateway lives in."""

    engine: ProbedEngine
    loop: asyncio.AbstractEventLoop

    def __call__(self, staged: Staged) -> Proof:
        """Prove one adapter; blocks, never in the event loop.

        Raises:
            ProbeNotFinite, AdapterWithoutEffect, ProbeDisagrees: the adapter must not be served.
            ProbeFailed: it could not be judged. ServeError: the engine is not there, or refuses it.
        """
        try:
            return self._prove(staged)
        except BaseException:
            self.loop.call_soon_threadsafe(self.engine.unload_adapter, staged.digest)
            raise

    def _prove(self, staged: Staged) -> Proof:
        ready, observed = self._run(self._observe(staged))
        check_effect(observed)
        measured, change = _measure(staged, observed)
        check_agreement(measured, observed.dtype)
        return proof_of(measured, observed, ready.device, change)

    def _run(self, work: Coroutine[object, object, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _observe(self, staged: Staged) -> tuple[Ready, Observed]:
        ready, manifest = _need(self.engine), staged.manifest
        prompts = await asyncio.to_thread(_prompts, staged, ready)
        adapter = Carrier(staged.digest, manifest.num_virtual_tokens, manifest.activation)
        observed = Observed(
            prompts=prompts,
            base=await ask(self.engine, Carrier(), prompts),
            adapter=await ask(self.engine, adapter, prompts),
            dtype=ready.dtype,
            max_model_len=ready.max_model_len,
        )
        return ready, observed


def proving_on(engine: ProbedEngine, *, is_on: bool) -> Proving:
    """Return the probe of a server's adapters, or why there is none; called in the event loop.

    Raises:
        EngineLoading: the engine is not there.
    """
    if not is_on:
        return NotProbed("the server runs with --probe off")
    _need(engine)
    return EngineProbe(engine, asyncio.get_running_loop())


def _need(engine: ProbedEngine) -> Ready:
    ready = engine.ready
    if ready is None or not engine.is_ready:
        raise EngineLoading(
            "the engine is starting, and an adapter is run on it before it is published; send the upload again",
            retry_after_s=_RETRY_AFTER_S,
        )
    return ready


def _prompts(staged: Staged, ready: Ready) -> tuple[Prompt, ...]:
    manifest = staged.manifest
    wishes = Wishes(
        vocab_size=min(manifest.base.vocab_size, ready.vocab_size),
        max_tokens=ready.max_model_len - manifest.num_virtual_tokens - 1,
        invocation=manifest.activation,
        trained=_trained_tokens(staged.open_image()) if manifest.model_ops.token_rows else (),
    )
    if wishes.max_tokens <= len(wishes.invocation):
        raise ProbeFailed(
            f"contexts of {ready.max_model_len} tokens leave no room for the adapter's own "
            f"{manifest.num_virtual_tokens + len(wishes.invocation)} and a prompt (--max-model-len)"
        )
    return choose_prompts(wishes)


def _trained_tokens(image: OpenAdapter) -> tuple[int, ...]:
    """Return tokens whose rows the adapter replaces, as many as prompts have room for."""
    found: set[int] = set()
    for rows in image.model.token_rows:
        raw = image.data[rows.idx_offset : rows.idx_offset + 4 * rows.count]
        found.update(int(token) for token in np.frombuffer(raw, dtype="<i4")[:MAX_OWN_TOKENS])
    return tuple(sorted(found))[:MAX_OWN_TOKENS]


def _measure(staged: Staged, observed: Observed) -> tuple[Measured, SiteChange | None]:
    """Have the reference process compare; raises ProbeFailed, ProbeNotFinite."""
    options = staged.options
    if options.base_dir is None:
        raise ProbeFailed("the base's weights are not at hand, and the source's own formula needs them")
    observed.write(staged.folder / OBSERVED_NAME)
    seconds = _START_SECONDS + _num_bytes(staged.source) // _MIN_BYTES_PER_SECOND
    seconds += _num_bytes(Path(options.base_dir)) // _MIN_BYTES_PER_SECOND
    arguments = [str(staged.source), str(staged.folder), options.to_json(), str(_memory(options)), str(seconds)]
    try:
        outcome = json.loads(run_child(_REFERENCE_MODULE, arguments, staged.folder, seconds))
        if "refused" in outcome:
            raise ProbeFailed(f"the source's own formula cannot be computed: {outcome['refused']}")
        if not outcome["is_finite"]:
            raise ProbeNotFinite("by its own formula in float32 the adapter gives numbers that are not finite")
        change = outcome["largest_change"]
        return _measured(outcome["measured"]), None if change is None else SiteChange(**change)
    except (ConversionFailed, ValueError, KeyError, TypeError) as error:
        raise ProbeFailed(
            "the reference process of the probe ended without an answer; nothing was stored, see the server's log"
        ) from error


def _measured(value: dict[str, Json]) -> Measured:
    other = value.pop("first_differing_token")
    token = OtherToken(**other) if isinstance(other, dict) else None  # type: ignore[arg-type]
    return Measured(first_differing_token=token, **value)  # type: ignore[arg-type]


def _memory(options: ConvertOptions) -> int:
    shapes = [options.base.site_shape(site) for site in SITES]
    largest = 4 * max(num_out * num_in for num_out, num_in in shapes)
    return _MIN_MEMORY_BYTES + _LAYER_COPIES * largest


def _num_bytes(folder: Path) -> int:
    """Return the size of the tensors' files."""
    return sum(
        entry.stat().st_size
        for entry in os.scandir(folder)
        if is_model_part(entry.name) or entry.name.endswith(".safetensors")
    )
