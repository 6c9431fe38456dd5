"""The arithmetic of `chorale plan`: what fits into a device's memory, and how long a step takes at least.

Pure. Times are floors: what the device's memory and its multipliers allow, as in docs/kernels.md; nothing here is a
measurement of this server. Invariant: a number that is an assumption is a field of `Workload` or `Device`.
"""

from dataclasses import dataclass

from adapters_store.base import SITES, BaseDims

BF16_BYTES = 2
_ALIGNMENT = 128
# of what the model leaves free, the server's own default for adapters on a GPU
_ADAPTER_SHARE = 0.25
_MAX_SEQUENCES = 256
_MAX_STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Device:
    """What a device can do; rates are those that copies and dense bf16 products reach, not the data sheet's peaks."""

    name: str
    memory_bytes: float
    bytes_per_s: float
    flops_per_s: float
    # from host memory
    link_bytes_per_s: float
    source: str


def _by_data_sheet(name: str, memory_gb: float, peak_tb_s: float, peak_tflops: float, link_gb_s: float) -> Device:
    # what one H200 reached of its data sheet: 4.3 of 4.8 TB/s, 790 of 989 TFLOP/s
    rates = (peak_tb_s * 1e12 * 4.3 / 4.8, peak_tflops * 1e12 * 790 / 989)
    return Device(name, memory_gb * 1e9, *rates, link_gb_s * 1e9, "data sheet, at the shares that an H200 reached")


DEVICES = {
    device.name: device
    for device in (
        Device("h200", 141e9, 4.3e12, 790e12, 50e9, "measured on one H200"),
        _by_data_sheet("h100", 80, 3.35, 989, 50),
        _by_data_sheet("b200", 180, 8.0, 2250, 50),
        _by_data_sheet("a100-80gb", 80, 2.04, 312, 25),
        _by_data_sheet("a100-40gb", 40, 1.56, 312, 25),
        _by_data_sheet("l40s", 48, 0.864, 362, 25),
        _by_data_sheet("l4", 24, 0.3, 121, 25),
        _by_data_sheet("mi300x", 192, 5.3, 1307, 50),
    )
}


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of the server; adapters are drawn evenly, which is the worst case for their bytes."""

    num_adapters: int
    rank: int
    requests_per_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Where the device's bytes go."""

    usable_bytes: float
    weight_bytes: int
    activation_bytes: int
    adapter_bytes: float
    kv_bytes: float
    bytes_per_adapter: int
    adapters_on_device: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step of so many sequences, and what bounds it."""

    num_sequences: float
    distinct_adapters: float
    base_s: float
    adapter_s: float
    kv_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        """How long it takes at least."""
        return max(self.base_s + self.adapter_s + self.kv_s, self.compute_s)


def num_parameters(dims: BaseDims) -> int:
    """Count the base's weights; norms and biases, less than a thousandth, are left out."""
    layer = sum(out * into for out, into in map(dims.site_shape, SITES))
    embeddings = dims.vocab_size * dims.hidden_size * (1 if dims.tie_word_embeddings else 2)
    return dims.num_hidden_layers * layer + embeddings


def streamed_parameters(dims: BaseDims) -> int:
    """Count the weights that a step reads: all, but of the embedding table only a row per token."""
    return num_parameters(dims) - (0 if dims.tie_word_embeddings else dims.vocab_size * dims.hidden_size)


def adapter_image_bytes(dims: BaseDims, rank: int) -> int:
    """Return the bytes of one LoRA over all seven modules in bf16, each tensor aligned."""
    tensors = (size * rank * BF16_BYTES for site in SITES for size in dims.site_shape(site))
    return dims.num_hidden_layers * sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in tensors)


def kv_bytes_per_token(dims: BaseDims) -> int:
    """Return what keys and values of one token take in bf16."""
    return 2 * dims.num_hidden_layers * dims.num_key_value_heads * dims.head_dim * BF16_BYTES


def plan_memory(dims: BaseDims, device: Device, work: Workload, utilization: float) -> Memory | None:
    """Divide the device's memory as the server does; None if the model alone does not fit."""
    usable = device.memory_bytes * utilization
    weights = num_parameters(dims) * BF16_BYTES
    # the widest moment of a step: inputs and both halves of the MLP, and every sequence's logits in fp32
    wide = 2 * dims.hidden_size + 3 * dims.intermediate_size
    activations = _MAX_STEP_TOKENS * wide * BF16_BYTES + _MAX_SEQUENCES * dims.vocab_size * 4
    free = usable - weights - activations
    if free <= 0:
        return None
    one = adapter_image_bytes(dims, work.rank)
    adapters = min(free * _ADAPTER_SHARE, float(one * work.num_adapters))
    kv = free - adapters
    return Memory(
        usable, weights, activations, adapters, kv, one, int(adapters // one), int(kv // kv_bytes_per_token(dims))
    )


def decode_step(dims: BaseDims, device: Device, work: Workload, num_sequences: float) -> Step:
    """Return the floor of a step of so many sequences, each half way through its answer."""
    n = work.num_adapters
    distinct = n * (1.0 - (1.0 - 1.0 / n) ** num_sequences) if n else 0.0
    context = work.prompt_tokens + work.output_tokens / 2
    return Step(
        num_sequences,
        distinct,
        streamed_parameters(dims) * BF16_BYTES / device.bytes_per_s,
        distinct * adapter_image_bytes(dims, work.rank) / device.bytes_per_s,
        num_sequences * context * kv_bytes_per_token(dims) / device.bytes_per_s,
        2 * streamed_parameters(dims) * num_sequences / device.flops_per_s,
    )


def prefill_s(dims: BaseDims, device: Device, work: Workload) -> float:
    """Return the floor of one prompt's products, its adapter's included."""
    layers = sum(out * into for out, into in map(dims.site_shape, SITES)) * dims.num_hidden_layers
    low_rank = sum(sum(dims.site_shape(site)) for site in SITES) * work.rank * dims.num_hidden_layers
    return 2 * work.prompt_tokens * (layers + (low_rank if work.num_adapters else 0)) / device.flops_per_s


def steady_step(dims: BaseDims, device: Device, work: Workload, max_sequences: int) -> Step | None:
    """Return the step at which as many sequences end as come; None if one server cannot keep up.

    Prefills take their share of the time; what is left must carry the decodes.
    """
    left = 1.0 - work.requests_per_s * prefill_s(dims, device, work)
    limit = float(max_sequences)
    if left <= 0.0:
        return None

    def supplied(num_sequences: float) -> float:
        return num_sequences / (work.output_tokens * decode_step(dims, device, work, num_sequences).seconds / left)

    if supplied(limit) < work.requests_per_s:
        return None
    low, high = 1e-6, limit
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if supplied(middle) < work.requests_per_s else (low, middle)
    return decode_step(dims, device, work, max(high, 1.0))


def servers_needed(dims: BaseDims, device: Device, work: Workload, max_sequences: int) -> int | None:
    """Return the fewest servers that keep up when the load is spread evenly; None if not even ten thousand do."""
    for number in range(1, 10_001):
        share = Workload(
            work.num_adapters, work.rank, work.requests_per_s / number, work.prompt_tokens, work.output_tokens
        )
        if steady_step(dims, device, share, max_sequences) is not None:
            return number
    return None
