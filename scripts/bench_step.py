"""One step of the model without server or scheduler: a lone prompt, and decodes over the base, 8 and 32 adapters.

Run as a child process of `bench_cpu`, or alone. Kinds of steps are measured in turns, so that a slow moment of the
machine meets all of them. The byte floor of a decode step over adapters is the base's own step plus the time that the
adapters' bytes take at the bandwidth that the same process measures. Prints JSON. Not a test: nothing here fails.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from adapter_kernels.attention_plan import AttentionPlan
from adapter_kernels.cpu import CpuDelta
from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.native_cpu import cpu_kernels
from adapter_kernels.profile import Profile, SiteProfile
from adapter_kernels.route import Placement, build_route
from adapter_kernels.slab import CAPACITY, Slab
from scripts.bench_model import RANK
from serve.engine.cpu_memory import bound_kernel_cache
from serve.engine.cpu_threads import start_threads
from serve.model.decoder import Decoder
from serve.model.kv_cache import KvCache
from serve.model.spec import read_spec
from serve.model.weights import load_decoder

_BLOCK_SIZE = 16
# far more than the last cache holds, so that it comes from memory
_STREAM_BYTES = 512 << 20
Step = Callable[[], object]


class Model:
    """The base as the engine runs it, and random adapters of rank `RANK` on all sites."""

    def __init__(self, base: Path, num_threads: int, num_adapters: int, max_tokens: int) -> None:
        spec = read_spec(base)
        bound_kernel_cache()
        start_threads(num_threads)
        cpu = torch.device("cpu")
        self.decoder: Decoder = load_decoder(base, spec, torch.bfloat16, cpu, max_model_len=1024)
        self.kv = KvCache.build(spec, max_tokens // _BLOCK_SIZE + 1, _BLOCK_SIZE, torch.bfloat16, cpu)
        sites = [site for members in FUSED_SITES.values() for site in members]
        profile = Profile(
            tuple(SiteProfile(layer, site, (RANK,)) for layer in range(spec.dims.num_hidden_layers) for site in sites)
        )
        shapes = {site: spec.dims.site_shape(site) for site in sites}
        slabs = [Slab(profile, shapes, torch.bfloat16) for _ in range(-(-num_adapters // CAPACITY))]
        self.adapters = [Placement(i // CAPACITY, slabs[i // CAPACITY], i % CAPACITY) for i in range(num_adapters)]
        for place in self.adapters:
            for _, _, tensor in place.slab.tensors():
                tensor[place.position].normal_(std=0.01)
        self.bytes_per_adapter = slabs[0].bytes_per_position

    def step(self, starts: Sequence[int], lengths: Sequence[int], places: Sequence[Placement | None]) -> Step:
        """Prepare a step of sequences as the engine orders them; calling it runs the model to the next tokens."""
        sizes = [-(-(start + length) // _BLOCK_SIZE) for start, length in zip(starts, lengths, strict=True)]
        begins = [sum(sizes[:i]) for i in range(len(sizes))]
        tables = [list(range(begin, begin + size)) for begin, size in zip(begins, sizes, strict=True)]
        plan = AttentionPlan.build([*starts], [*lengths], tables, _BLOCK_SIZE)
        ids = torch.arange(sum(lengths))
        last = torch.tensor(lengths).cumsum(0) - 1
        has_adapters = any(place is not None for place in places)

        def run() -> object:
            with torch.inference_mode():
                route = build_route([*places], [*lengths]) if has_adapters else None
                delta = None if route is None else CpuDelta(route, kernels=cpu_kernels())
                hidden = self.decoder.hidden(ids, plan, self.kv, delta)
                return self.decoder.logits(hidden.index_select(0, last)).max(dim=1)

        return run


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, all of them once per round after one round to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            samples[name].append(time.perf_counter() - begin)
    return {name: found[1:] for name, found in samples.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--context", type=int, default=160)
    parser.add_argument("--decodes", type=int, default=32)
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    model = Model(args.base, args.threads, max(args.adapters), (args.context + _BLOCK_SIZE) * args.decodes)
    stream = torch.ones(_STREAM_BYTES // 4)
    contexts, ones = [args.context] * args.decodes, [1] * args.decodes
    steps: dict[str, Step] = {
        "prompt": model.step([0], [args.prompt], [None]),
        "base": model.step(contexts, ones, [None] * args.decodes),
        "read": lambda: stream.sum(),
    }
    for count in args.adapters:
        # neighbours share an adapter where there are fewer than rows
        places = sorted(i % count for i in range(args.decodes))
        steps[str(count)] = model.step(contexts, ones, [model.adapters[i] for i in places])
    seconds = {name: statistics.median(found) for name, found in in_turns(steps, args.rounds).items()}
    bandwidth = _STREAM_BYTES / seconds["read"]
    floors = {str(n): seconds["base"] + n * model.bytes_per_adapter / bandwidth for n in args.adapters}
    print(
        json.dumps(
            {
                "prompt_s": seconds["prompt"],
                "decode_s": {"0": seconds["base"], **{str(n): seconds[str(n)] for n in args.adapters}},
                "byte_floor_s": floors,
                "of_byte_floor": {n: seconds[n] / floor for n, floor in floors.items()},
                "bandwidth_gb_per_s": bandwidth / 1e9,
                "bytes_per_adapter": model.bytes_per_adapter,
                "has_compiled_kernels": cpu_kernels() is not None,
            }
        )
    )


if __name__ == "__main__":
    main()
