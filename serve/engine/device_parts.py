"""From an `EngineConfig` to an executor on a GPU, or on Triton's interpreter: weights, memory, graphs; once at start.

Owns the order of start-up on a device: weights, a trial of the largest steps that tells what they take, then KV cache
and adapter arena from what is left, then the captures. Invariant: all device memory is taken here; while serving
nothing is allocated but what the trial has shown to fit.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.copies import Copies, CudaCopies, InlineCopies
from adapter_kernels.gpu.launch_config import CONFIG_DIR, LaunchConfigError, LaunchConfigs
from adapter_kernels.gpu.route import RouteBuffers
from adapter_kernels.gpu.shrink import num_splits
from adapter_kernels.gpu.step import Workspace
from adapter_kernels.gpu.streams import CudaSide, InlineSide
from adapter_kernels.gpu.tables import DeviceTables, bridge_columns
from adapters_store.base import SITES
from adapters_store.errors import UnsupportedAdapter
from adapters_store.store import OpenAdapter
from serve.config import EngineConfig
from serve.engine.cuda_graphs import (
    ALL_SITES,
    NO_SITES,
    CudaRecorder,
    DecodeGraphs,
    GraphKey,
    decode_buckets,
    sites_of_mask,
)
from serve.engine.device_arena import DeviceArena
from serve.engine.device_batch import StepBounds, WordBuffers
from serve.engine.device_executor import DeviceAdapters, DeviceExecutor
from serve.engine.device_forward import DeviceForward, StepOutput
from serve.engine.device_memory import DeviceMemory, Shares, Wishes, share_out, usable_bytes
from serve.engine.device_sampler import Outcome
from serve.engine.device_trial import TRIAL_SLOTS, RanklessAdapters, run_trial
from serve.engine.packed_words import Words
from serve.engine.sampling_plan import Grammars
from serve.engine.site_rows import site_rows
from serve.engine.start_facts import MakeGrammars, ModelFacts, StartFacts, no_grammars, read_model_facts
from serve.engine.step_packing import BlockArrays, pack_step
from serve.errors import StartError
from serve.model.fused_decoder import FusedDecoder, load_fused_decoder
from serve.model.kv_cache import KvCache, bytes_per_block

logger = logging.getLogger(__name__)

# the interpreter's KV cache and arena: a share of the host's free memory
_INTERPRETER_SHARE = 0.2
# columns of a bridge's row: ranks, logits of a gate and outputs that slices change must fit
_MIN_BRIDGE_COLUMNS = 512


@dataclass(frozen=True, slots=True)
class DeviceParts:
    """A started executor and what its start learnt."""

    executor: DeviceExecutor
    facts: StartFacts


def load_device_parts(
    config: EngineConfig,
    device_name: str,
    open_image: Callable[[str], OpenAdapter],
    make_grammars: MakeGrammars = no_grammars,
) -> DeviceParts:
    """Load the model onto the device.

    Args:
        device_name: "cuda" or "interpreter"; for the latter TRITON_INTERPRET=1 was set before triton was imported.
    Raises:
        StartError: one line that names what is wrong and the way out.
    """
    model = read_model_facts(config, device_name)
    start = _Start.begin(config, model, device_name)
    shares = start.shares()
    executor = start.finish(shares, open_image, make_grammars(model))
    facts = StartFacts(model, device_name, config.block_size, shares.num_kv_blocks, shares.arena_bytes)
    logger.info("%s: %d KV blocks, %d MiB for adapters", device_name, shares.num_kv_blocks, shares.arena_bytes >> 20)
    return DeviceParts(executor, facts)


@dataclass(frozen=True, slots=True)
class _Start:
    """What exists before memory is shared out."""

    config: EngineConfig
    model: ModelFacts
    device: torch.device
    bounds: StepBounds
    decoder: FusedDecoder
    buffers: WordBuffers
    outcome: Outcome
    workspace: Workspace

    @classmethod
    def begin(cls, config: EngineConfig, model: ModelFacts, device_name: str) -> "_Start":
        """Load the weights and make what every step shares."""
        is_cuda = device_name == "cuda"
        device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")
        configs = _pinned_tiles(torch.cuda.get_device_name(device) if is_cuda else None)
        bounds = StepBounds(model.max_step_tokens, model.max_num_seqs, -(-model.max_model_len // config.block_size))
        decoder = load_fused_decoder(
            config.model_dir,
            model.spec,
            model.dtype,
            device,
            max_model_len=model.max_model_len,
            max_step_tokens=model.max_step_tokens,
            max_decodes=bounds.max_decodes,
            side=CudaSide(device) if is_cuda else InlineSide(),
            configs=configs,
        )
        return cls(
            config=config,
            model=model,
            device=device,
            bounds=bounds,
            decoder=decoder,
            buffers=WordBuffers(bounds, device),
            outcome=Outcome.build(model.max_num_seqs, device),
            workspace=_workspace(config, model, bounds, device),
        )

    def shares(self) -> Shares:
        """Share out what is left of the memory."""
        config, block_bytes = self.config, bytes_per_block(self.model.spec, self.config.block_size, self.model.dtype)
        wishes = Wishes(
            num_kv_blocks=config.num_kv_blocks,
            max_useful_blocks=self.model.max_num_seqs * self.bounds.max_blocks_per_seq,
            block_bytes=block_bytes,
            adapter_bytes=config.adapter_device_bytes,
        )
        if self.device.type == "cuda":
            return share_out(usable_bytes(self._measure(), config.gpu_memory_utilization), wishes)
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return share_out(int(free_bytes * _INTERPRETER_SHARE), wishes)

    def finish(
        self, shares: Shares, open_image: Callable[[str], OpenAdapter], grammars: Grammars | None
    ) -> DeviceExecutor:
        """Allocate the shares, capture the graphs, and put the executor on top."""
        forward = self._forward(shares.num_kv_blocks, shares.arena_bytes)
        is_cuda = self.device.type == "cuda"
        copies: Copies = CudaCopies(self.device) if is_cuda else InlineCopies()
        spec = self.model.spec
        shapes = {site: spec.dims.site_shape(site) for site in SITES}
        servable = partial(_open_servable, open_image, self.config)
        arena = DeviceArena(forward.tables, shapes, spec.dims.num_hidden_layers, self.model.dtype, servable, copies)
        graphs = None
        if is_cuda:
            prepare = partial(prepare_capture, forward, self.buffers, self.config.block_size)
            graphs = DecodeGraphs(CudaRecorder(), prepare)
            for bucket in reversed(decode_buckets(self.bounds.max_decodes)):
                for mask in (ALL_SITES, NO_SITES):
                    graphs.capture(GraphKey(bucket, mask))
        return self._executor(forward, arena, graphs, grammars)

    def _measure(self) -> DeviceMemory:
        """Run the largest steps on a cache of one block, and see what they take."""
        adapters = RanklessAdapters(self.model.spec.dims.num_hidden_layers, tuple(FUSED_SITES), SITES)
        executor = self._executor(self._forward(1, 0), adapters, None, None)
        run_trial(executor, self.bounds, self.model.max_model_len)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        # the second time nothing is compiled any more, and only what a step takes is seen
        run_trial(executor, self.bounds, self.model.max_model_len)
        torch.cuda.synchronize()
        step_bytes = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
        return DeviceMemory(total_bytes, total_bytes - free_bytes, step_bytes)

    def _forward(self, num_blocks: int, arena_bytes: int) -> DeviceForward:
        spec, dtype = self.model.spec, self.model.dtype
        arena = torch.empty(max(arena_bytes, 128) // dtype.itemsize, dtype=dtype, device=self.device)
        num_slots = max(self.config.num_adapter_slots, len(TRIAL_SLOTS))
        slots = torch.zeros(self.bounds.max_step_tokens, dtype=torch.int32, device=self.device)
        return DeviceForward(
            decoder=self.decoder,
            kv=KvCache.build(spec, num_blocks, self.config.block_size, dtype, self.device),
            tables=DeviceTables.build(spec.dims.num_hidden_layers, num_slots, arena),
            route=RouteBuffers.build(slots, self.model.max_num_seqs + 1),
            workspace=self.workspace,
            outcome=self.outcome,
        )

    def _executor(
        self,
        forward: DeviceForward,
        adapters: DeviceAdapters,
        graphs: DecodeGraphs | None,
        grammars: Grammars | None,
    ) -> DeviceExecutor:
        return DeviceExecutor(
            forward,
            self.buffers,
            adapters,
            buckets=decode_buckets(self.bounds.max_decodes),
            block_size=self.config.block_size,
            graphs=graphs,
            grammars=grammars,
        )


def prepare_capture(
    forward: DeviceForward, buffers: WordBuffers, block_size: int, key: GraphKey
) -> Callable[[], StepOutput]:
    """Send a step of padding and return the pass over it: every later step of the bucket lies in the same words."""
    words = Words()
    packed = pack_step([], (key.bucket,), {}, BlockArrays(), block_size, words, forward.max_pairs)
    sent = buffers.send(words, Words())
    sites = sites_of_mask(key.mask, forward.decoder.spec.dims.num_hidden_layers)
    return partial(forward.run, packed, sent.step, sites)


def _bridge_capacity(config: EngineConfig) -> int:
    """Return how many columns a bridge has per row and member: a power of two."""
    return max(_MIN_BRIDGE_COLUMNS, 1 << (config.max_adapter_rank - 1).bit_length())


def _open_servable(open_image: Callable[[str], OpenAdapter], config: EngineConfig, digest: str) -> OpenAdapter:
    """Open an image that the workspace has room for: a store may hold adapters from before `--max-rank` was lowered."""
    adapter = open_image(digest)
    rank = max((entry.rank for entry in adapter.entries), default=0)
    if rank > config.max_adapter_rank:
        raise UnsupportedAdapter(
            f"the adapter has rank {rank}; this server accepts up to {config.max_adapter_rank} (--max-rank)"
        )
    columns, capacity = max(map(bridge_columns, site_rows(adapter)), default=0), _bridge_capacity(config)
    if columns > capacity:
        raise UnsupportedAdapter(
            f"the adapter needs {columns} coefficients per row at one site (ranks, experts and changed outputs); this "
            f"server's device has {capacity}; raise --max-rank to {columns} or serve with --device cpu"
        )
    return adapter


def _pinned_tiles(gpu_name: str | None) -> LaunchConfigs:
    try:
        return LaunchConfigs.for_device(gpu_name)
    except LaunchConfigError as error:
        raise StartError(f"pinned tiles: {error}; correct the file or remove it from {CONFIG_DIR}") from error


def _workspace(config: EngineConfig, model: ModelFacts, bounds: StepBounds, device: torch.device) -> Workspace:
    dims = model.spec.dims
    widths = [dims.site_shape(site)[1] for site in SITES]
    return Workspace.build(
        # a composition is spread out whole, also where steps are shorter
        max_rows=max(model.max_step_tokens, bounds.max_pairs),
        max_splits=max(num_splits(width) for width in widths),
        max_members=max(len(members) for members in FUSED_SITES.values()),
        rank_capacity=_bridge_capacity(config),
        hidden_size=dims.hidden_size,
        max_pairs=bounds.max_pairs,
        max_in_width=max(widths),
        dtype=model.dtype,
        device=device,
    )
