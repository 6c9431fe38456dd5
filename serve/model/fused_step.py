"""What all layers of one step share on the GPU: the device's inputs, the cache, rotations, buffers, the side stream.

Owns the activations' memory, made once for the largest step; computes nothing. Invariant: a buffer holds one layer's
values at a time: whoever reads one is launched, in stream order, before its next writer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.gpu.launch_config import LaunchConfig, LaunchConfigs
from adapter_kernels.gpu.paged_decode import DecodeWorkspace
from adapter_kernels.gpu.route_forms import block_rows_for
from adapter_kernels.gpu.step import DeviceStep
from adapter_kernels.gpu.streams import SideStream
from serve.model.kv_cache import KvCache
from serve.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class FlatRotation:
    """Cosines and sines of one step, [T, rotary_dim] contiguous; `serve.model.rotary` has the signs."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """Activations between the kernels of a layer."""

    # [T, D]: the input of the next projections, where a norm stands before them
    normed: Tensor
    # [T, H, E] each
    queries: Tensor
    attended: Tensor
    # [T, F]
    activated: Tensor

    @classmethod
    def build(cls, spec: ModelSpec, max_rows: int, dtype: torch.dtype, device: torch.device) -> "StepBuffers":
        """Allocate for steps of up to `max_rows` rows."""
        dims = spec.dims
        heads = (max_rows, dims.num_attention_heads, dims.head_dim)
        return cls(
            normed=torch.empty(max_rows, dims.hidden_size, dtype=dtype, device=device),
            queries=torch.empty(heads, dtype=dtype, device=device),
            attended=torch.empty(heads, dtype=dtype, device=device),
            activated=torch.empty(max_rows, dims.intermediate_size, dtype=dtype, device=device),
        )

    def first(self, num_rows: int) -> "StepBuffers":
        """View the first rows of each buffer."""
        return StepBuffers(
            self.normed[:num_rows], self.queries[:num_rows], self.attended[:num_rows], self.activated[:num_rows]
        )


@dataclass(frozen=True, slots=True)
class FusedStep:
    """One step as the layers see it; `rotations[i]` belongs to `ModelSpec.ropes[i]`."""

    inputs: DeviceStep
    kv: KvCache
    rotations: tuple[FlatRotation, ...]
    buffers: StepBuffers
    decode_workspace: DecodeWorkspace
    side: SideStream
    configs: LaunchConfigs

    def config(self, op: str, width: int) -> LaunchConfig | None:
        """Return the pinned tiles of a launch whose tiles walk along `width`; None: the op's own default."""
        return self.configs.pick(op, width, block_rows_for(self.inputs.num_rows))
