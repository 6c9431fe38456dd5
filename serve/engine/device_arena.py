"""Adapters in device memory: loads off the step loop, extents in one arena, tables changed in place.

Owns the bytes of the arena and the thread that fills them; decides nothing (tiers, budgets, pins are the pure
engine's). Every method belongs to the step's thread, with the stream current on which the steps run: drops, moves and
table writes take their place between the steps there. Invariants: a slot's tables name an adapter only after all of its
bytes arrived; bytes that a submitted step may read are written again only behind that step; a failed load leaves no
bytes and no table row; nothing is allocated on the device after the start.
"""

import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from adapter_kernels.gpu.acting_sites import ActingSites
from adapter_kernels.gpu.copies import Copies
from adapter_kernels.gpu.image_layout import StoredImage, lay_out
from adapter_kernels.gpu.image_upload import ImageUpload, UploadCancelled
from adapter_kernels.gpu.placed_adapter import PlacedAdapter
from adapter_kernels.gpu.table_writer import TableWriter
from adapter_kernels.gpu.tables import DeviceTables
from adapter_kernels.image import ImageError
from adapters_store.errors import StoreError
from adapters_store.store import OpenAdapter
from serve.engine.arena_room import ArenaRoom, Load, Place
from serve.engine.cpu_threads import leave_core
from serve.engine.extents import Move
from serve.engine.model_rows import refuse_model_ops
from serve.engine.plan import LoadResult
from serve.engine.site_rows import site_rows

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# moved between two steps while a load waits for room: 0.03 ms at 4 TB/s, twice that where the bytes overlap
MOVE_BYTES_PER_POLL = 64 << 20
# most adapters act at one of a few sets of sites; strange ones must not pile up
_MAX_SITE_SETS = 256


@dataclass(slots=True, eq=False)
class _Resident:
    """An adapter that steps may use."""

    slot: int
    adapter: PlacedAdapter
    begin: int
    sites: ActingSites


@dataclass(slots=True)
class _Moving:
    """The one adapter under way to a lower place, and how many of its bytes are there."""

    resident: _Resident
    move: Move
    num_moved: int = 0


class DeviceArena:
    """The adapter slots of one engine on a device."""

    def __init__(
        self,
        tables: DeviceTables,
        shapes: dict[str, tuple[int, int]],
        num_layers: int,
        dtype: torch.dtype,
        open_image: Callable[[str], OpenAdapter],
        copies: Copies,
        *,
        loader: Executor | None = None,
        buffer_bytes: int = 8 << 20,
    ) -> None:
        """Start the loader thread; `tables.arena` is the memory, `tables` is what steps read.

        Args:
            shapes: (out, in) per site. dtype: what the model computes in, the arena's dtype.
            open_image: verified image by digest; called by the loader's thread. loader: replaced by tests.
            buffer_bytes: of each pinned buffer, a multiple of 128.
        """
        assert tables.arena.dtype == dtype, f"an arena of {tables.arena.dtype} for a model in {dtype}"
        self._shapes = shapes
        self._num_layers = num_layers
        self._dtype = dtype
        self._open_image = open_image
        self._copies = copies
        self._bytes = tables.arena.view(torch.uint8)
        self._tables = TableWriter(tables, copies)
        self._upload = ImageUpload(copies, buffer_bytes=buffer_bytes)
        self._room = ArenaRoom(self._bytes.numel())
        self._loads: dict[int, Load] = {}
        self._residents: dict[int, _Resident] = {}
        # equal ones are one object: a step's union then costs as many as are different, and not 2 ms for 256 adapters
        self._site_sets: dict[ActingSites, ActingSites] = {}
        self._moving: _Moving | None = None
        self._ended: SimpleQueue[Load] = SimpleQueue()
        self._finishing: list[Load] = []
        self._is_closing = False
        self._loader = loader or ThreadPoolExecutor(1, "adapter-load", initializer=leave_core)

    @property
    def num_bytes(self) -> int:
        """Bytes of the arena: the budget that adapters may fill together, each counted as its `LoadResult` says."""
        return self._room.num_bytes

    @property
    def num_bytes_free(self) -> int:
        """Bytes of the arena that no adapter holds, in however many pieces."""
        return self._room.num_bytes_free

    @property
    def largest_free_extent(self) -> int:
        """Bytes of the largest adapter that fits without moving others."""
        return self._room.largest_hole

    def start_load(self, digest: str, slot: int) -> None:
        """Queue a load; returns at once."""
        load = self._loads[slot] = Load(digest, slot)
        self._loader.submit(self._job, load, self._bring)

    def poll(self) -> list[LoadResult]:
        """Make loads whose bytes arrived visible to the steps submitted from now on, and return all that ended.

        While a load waits for room, moves about `MOVE_BYTES_PER_POLL` first.
        """
        self.compact_some(MOVE_BYTES_PER_POLL)
        while not self._ended.empty():
            self._finishing.append(self._ended.get())
        loads, self._finishing = self._finishing, []
        return [result for load in loads if (result := self._finish(load)) is not None]

    def drop(self, slot: int) -> None:
        """Free a slot. Steps submitted before still read its bytes; a load under way ends without a result."""
        resident = self._residents.pop(slot, None)
        if resident is None:
            self._room.abandon(self._loads.pop(slot))
            self._serve_line()
            return
        self._tables.clear(slot)
        if self._moving is not None and self._moving.resident is resident:
            self._moving = None
        self._release(resident.begin)

    def sites(self, slot: int) -> ActingSites:
        """Return where and how a loaded slot's adapter acts."""
        return self._residents[slot].sites

    def compact_some(self, max_bytes: int) -> int:
        """Move about `max_bytes`, at least one tensor, if a load waits for room that lies in pieces; return how many.

        An adapter under way is whole between any two steps: its tables name each tensor where it is.
        """
        num_bytes = 0
        # asked first: bytes must not move when the tables cannot follow
        while num_bytes < max_bytes and self._tables.is_ready:
            moving = self._open_move()
            if moving is None:
                break
            num_bytes += self._move_on(moving, max_bytes - num_bytes)
        return num_bytes

    def close(self) -> None:
        """Stop the loader thread after the buffer in flight."""
        self._is_closing = True
        self._loader.shutdown(wait=True, cancel_futures=True)

    def check_invariants(self) -> None:
        """Compare the extents with what slots and loads hold; only while the loader's thread is idle."""
        held = {resident.begin: resident.adapter.num_bytes for resident in self._residents.values()}
        while not self._ended.empty():
            self._finishing.append(self._ended.get())
        for load in (*self._loads.values(), *self._finishing):
            if load.begin is not None:
                held[load.begin] = load.num_bytes
        self._room.check_invariants(held)
        assert not self._residents.keys() & self._loads.keys(), "a slot is loaded and loading"

    @torch.inference_mode()
    def _job(self, load: Load, stage: Callable[[Load], bool]) -> None:
        """Run a stage of a load on the loader's thread; what it raises fails that adapter's requests alone."""
        try:
            has_ended = stage(load)
        except UploadCancelled:
            has_ended = True
        except (StoreError, ImageError) as failure:
            load.error, has_ended = str(failure), True
        # the wall of this job
        except Exception as failure:
            load.error = f"the adapter could not be loaded ({type(failure).__name__}); send the request again"
            has_ended = True
        if has_ended:
            self._ended.put(load)

    def _bring(self, load: Load) -> bool:
        """Open an image and send it where there is room; False when the load waits for room."""
        load.begin_s = time.monotonic()
        adapter = self._open_image(load.digest)
        refuse_model_ops(adapter)
        rows = site_rows(adapter)
        load.rank = adapter.rank
        load.layout = lay_out(StoredImage(adapter.data, _DTYPES[adapter.dtype], rows, self._shapes), self._dtype)
        place = self._room.place(load)
        return self._send(load) if place is Place.EXTENT else place is Place.REFUSAL

    def _send(self, load: Load) -> bool:
        """Send a load's bytes to its extent."""
        assert load.layout is not None and load.begin is not None, "a load is sent before it has an extent"
        extent = self._bytes[load.begin : load.begin + load.num_bytes]
        load.adapter = PlacedAdapter.of(load.layout, extent, self._num_layers)
        load.uploaded = self._upload.upload(
            load.layout, extent, load.after, lambda: load.is_dropped or self._is_closing
        )
        return True

    def _finish(self, load: Load) -> LoadResult | None:
        """End a load whose bytes arrived or that failed; None: not yet, or nobody wants to know."""
        is_good = load.uploaded is not None and not load.is_dropped
        if load.uploaded is not None and not (load.uploaded.is_done() and self._tables.is_ready):
            self._finishing.append(load)
            return None
        if is_good:
            self._publish(load)
        elif load.begin is not None:
            self._release(load.begin)
        if load.is_dropped:
            return None
        del self._loads[load.slot]
        # a load that got no extent says what it needs, when it came so far
        num_bytes = load.num_bytes if is_good or load.begin is None else 0
        rank = load.rank if is_good else 0
        seconds = time.monotonic() - load.begin_s
        return LoadResult(load.digest, load.slot, num_bytes, rank, seconds, load.error, load.is_out_of_room)

    def _publish(self, load: Load) -> None:
        assert load.adapter is not None and load.begin is not None, "a load arrived without a place"
        self._tables.write(load.slot, load.adapter.entries(load.begin))
        if len(self._site_sets) == _MAX_SITE_SETS:
            self._site_sets.clear()
        sites = self._site_sets.setdefault(load.adapter.sites, load.adapter.sites)
        self._residents[load.slot] = _Resident(load.slot, load.adapter, load.begin, sites)

    def _release(self, begin: int) -> None:
        # recorded before the bytes are free: whoever gets them waits for all steps submitted so far
        self._room.release(begin, self._copies.fence())
        self._serve_line()

    def _serve_line(self) -> None:
        for load in self._room.serve_line():
            if load.error is not None:
                self._ended.put(load)
            else:
                self._loader.submit(self._job, load, self._send)

    def _open_move(self) -> _Moving | None:
        """Return the adapter under way, or the next one that a waiting load needs moved."""
        if self._moving is None:
            movable = {resident.begin: resident for resident in self._residents.values()}
            move = self._room.open_move(movable.keys())
            if move is not None:
                resident = movable[move.source]
                resident.begin = move.target
                self._moving = _Moving(resident, move)
        return self._moving

    def _move_on(self, moving: _Moving, max_bytes: int) -> int:
        """Move the next tensors of the adapter under way, let its tables follow, and return how many bytes."""
        move, begin = moving.move, moving.num_moved
        end = moving.resident.adapter.next_cut(begin, max_bytes)
        self._copies.move(self._bytes, move.source + begin, move.target + begin, end - begin)
        entries = moving.resident.adapter.entries_under_way(move.source, move.target, end)
        self._tables.write(moving.resident.slot, entries)
        moving.num_moved = end
        if end == move.num_bytes:
            self._moving = None
            self._room.close_move(self._copies.fence())
            self._serve_line()
        return end - begin
