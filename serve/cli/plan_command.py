"""`chorale plan`: does it fit, and how fast can a step be at best; by arithmetic, without a GPU.

Owns the flags and the lines. Invariant: each number is printed with what it comes from, and floors are called floors.
"""

from pathlib import Path
from typing import Annotated

import typer

from adapters_store.base import BaseDims, read_base_dims
from serve.cli import options
from serve.cli.operator_errors import one_line_errors
from serve.cli.planning import (
    DEVICES,
    Device,
    Memory,
    Step,
    Workload,
    plan_memory,
    prefill_s,
    servers_needed,
    steady_step,
)
from serve.errors import StartError

_GB = 1e9
_MAX_SEQUENCES = 256

Model = Annotated[Path, typer.Option(help="Folder with the base's config.json; weights are not needed.")]
Gpu = Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")]
Adapters = Annotated[int, typer.Option(min=0, help="How many adapters there are.")]
Rank = Annotated[int, typer.Option(min=1, help="Their rank, on all seven modules.")]
Qps = Annotated[float, typer.Option(min=0.001, help="Requests a second.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")]
OutputTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer.")]


def plan(
    model: Model,
    gpu: Gpu = "h200",
    adapters: Adapters = 100,
    rank: Rank = 16,
    qps: Qps = 1.0,
    prompt_tokens: PromptTokens = 512,
    output_tokens: OutputTokens = 256,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
) -> None:
    """Say whether a model and its adapters fit a GPU, and what a step takes at least. Needs no GPU."""
    with one_line_errors(exit_status=2):
        if gpu not in DEVICES:
            raise StartError(f"--gpu {ascii(gpu)[:40]}: give one of {', '.join(DEVICES)}")
        dims = _dims(model)
        device, work = DEVICES[gpu], Workload(adapters, rank, qps, prompt_tokens, output_tokens)
        memory = plan_memory(dims, device, work, gpu_memory_utilization)
        if memory is None:
            raise StartError(
                f"--model {model}: its weights do not fit {gpu_memory_utilization:g} of"
                f" {device.memory_bytes / _GB:g} GB (--gpu {gpu}); take a larger GPU or a smaller model"
            )
        for line in [*_memory_lines(device, memory, work), *_speed_lines(dims, device, memory, work)]:
            typer.echo(line)


def _dims(model_dir: Path) -> BaseDims:
    try:
        return read_base_dims(model_dir)
    except OSError as error:
        raise StartError(f"--model {model_dir}: {error.strerror}; give a folder with config.json") from error
    except (KeyError, ValueError) as error:
        raise StartError(f"--model {model_dir}: its config.json lacks or garbles {error}") from error


def _memory_lines(device: Device, memory: Memory, work: Workload) -> list[str]:
    host = memory.bytes_per_adapter * work.num_adapters
    return [
        f"memory of {device.name} ({device.memory_bytes / _GB:g} GB, {memory.usable_bytes / _GB:.1f} of them usable)",
        f"  weights (bf16)        {memory.weight_bytes / _GB:9.2f} GB",
        f"  activations (guess)   {memory.activation_bytes / _GB:9.2f} GB",
        f"  adapters              {memory.adapter_bytes / _GB:9.2f} GB   {memory.adapters_on_device} of"
        f" {work.num_adapters} at {memory.bytes_per_adapter / (1 << 20):.1f} MiB (--adapter-device-bytes)",
        f"  KV cache              {memory.kv_bytes / _GB:9.2f} GB   {memory.kv_tokens} tokens",
        f"  all adapters on the host: {host / _GB:.2f} GB (--adapter-host-bytes)",
        f"  one cold adapter over the link: {memory.bytes_per_adapter / device.link_bytes_per_s * 1e3:.1f} ms",
    ]


def _speed_lines(dims: BaseDims, device: Device, memory: Memory, work: Workload) -> list[str]:
    held = memory.kv_tokens // (work.prompt_tokens + work.output_tokens)
    max_sequences = min(_MAX_SEQUENCES, held)
    prompt = prefill_s(dims, device, work)
    lines = [
        f"floors at {work.requests_per_s:g} requests/s of {work.prompt_tokens} + {work.output_tokens} tokens"
        f" (rates: {device.source}; a real step is slower)",
        f"  sequences at once     {max_sequences:9d}      (KV cache holds {held}, --max-num-seqs {_MAX_SEQUENCES})",
        f"  prefill of a prompt   {prompt * 1e3:9.2f} ms   (products)",
    ]
    if max_sequences < 1:
        return [*lines, "  not one request fits the KV cache: fewer tokens, fewer adapters or a larger GPU"]
    step = steady_step(dims, device, work, max_sequences)
    if step is None:
        number = servers_needed(dims, device, work, max_sequences)
        found = f"at least {number} servers do" if number else "nor do ten thousand servers"
        return [*lines, f"  one server does not keep up; {found}"]
    return [*lines, *_step_lines(step, prompt)]


def _step_lines(step: Step, prompt: float) -> list[str]:
    by_bytes = step.base_s + step.adapter_s + step.kv_s
    bound = "memory" if by_bytes >= step.compute_s else "products"
    return [
        f"  decode step           {step.seconds * 1e3:9.2f} ms   (bound by {bound};"
        f" {step.num_sequences:.1f} sequences)",
        f"    weights             {step.base_s * 1e3:9.2f} ms",
        f"    adapters            {step.adapter_s * 1e3:9.2f} ms   ({step.distinct_adapters:.1f} distinct,"
        f" +{step.adapter_s / step.base_s:.1%} of the weights)",
        f"    keys and values     {step.kv_s * 1e3:9.2f} ms",
        f"  first token           {(prompt + step.seconds) * 1e3:9.2f} ms   (no line, adapter in memory)",
    ]
