"""The decoder on the GPU: the same weights and families as `Decoder`, run by the launch plan of docs/kernels.md.

Owns the embedding, the rotations of a step, the order of layers and the head, and the way from a model folder to one;
`RandomWeights` makes one without files. Invariant: without adapters in the step no adapter op is launched, and nothing
here waits for the device, so a whole pass can be captured as a CUDA graph.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from adapter_kernels.gpu.add_norm import add_norm
from adapter_kernels.gpu.launch_config import LaunchConfigs
from adapter_kernels.gpu.paged_decode import DecodeWorkspace
from adapter_kernels.gpu.sink_inputs import NormWeights
from adapter_kernels.gpu.step import DeviceStep
from adapter_kernels.gpu.streams import SideStream
from serve.model.checkpoint import Checkpoint
from serve.model.decoder import embedding_scale, finish_logits
from serve.model.fused_layer import FusedLayer
from serve.model.fused_step import FlatRotation, FusedStep, StepBuffers
from serve.model.fused_weights import FusedWeights, read_fused_weights
from serve.model.kv_cache import KvCache
from serve.model.rotary import Rotary
from serve.model.spec import ModelSpec
from serve.model.weight_names import WeightNames
from serve.model.weight_source import CheckpointWeights


class FusedDecoder:
    """The frozen base model; one step at a time, since all steps share the buffers."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: FusedWeights,
        *,
        max_model_len: int | None,
        max_step_tokens: int,
        max_decodes: int,
        side: SideStream,
        configs: LaunchConfigs,
    ) -> None:
        """Wire the layers and make the buffers.

        Args:
            max_model_len: as `serve.model.weights.load_decoder`.
            max_step_tokens: rows of the largest step. max_decodes: of these, sequences that decode.
            side: where the adapters' small kernels run. configs: pinned tiles of this device.
        """
        self.spec = spec
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self._weights = weights
        self._embedding_scale = embedding_scale(spec, self.dtype)
        longest = max_model_len or spec.max_position_embeddings
        self._ropes = tuple(Rotary(rope, longest, self.dtype, self.device) for rope in spec.ropes)
        self._layers = tuple(
            FusedLayer(spec, layer, weights.layers[layer], _next_norm(weights, layer))
            for layer in range(spec.dims.num_hidden_layers)
        )
        self._max_step_tokens = max_step_tokens
        self._buffers = StepBuffers.build(spec, max_step_tokens, self.dtype, self.device)
        self._decode_workspace = DecodeWorkspace.build(
            max_decodes, spec.dims.num_attention_heads, spec.dims.head_dim, self.device
        )
        self._side = side
        self._configs = configs

    def hidden(self, step: DeviceStep, kv: KvCache) -> Tensor:
        """Run the step's tokens through all layers.

        Args:
            step: on the decoder's device, up to the limits in size.
            kv: gets this step's keys and values at `step.slot_mapping`.
        Returns:
            [T, D] after the final norm, in the model's dtype: a view of a buffer, valid until the next call.
        """
        assert step.num_rows <= self._max_step_tokens, f"{step.num_rows} rows in buffers of {self._max_step_tokens}"
        with torch.inference_mode():
            x = functional.embedding(step.token_ids, self._weights.embedding)
            if self._embedding_scale != 1.0:
                x.mul_(self._embedding_scale)
            shared = self._share(step, kv)
            first_norm = self._weights.layers[0].attention_norms.before
            if first_norm is not None:
                add_norm(x, None, before=first_norm, normed=shared.buffers.normed)
            for layer in self._layers:
                layer(x, shared)
            return shared.buffers.normed

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Project hidden states [S, D] onto the vocabulary: [S, V], as `Decoder.logits`.

        Args:
            out: [S, V] in the model's dtype, for the head's product; it is what comes back where nothing follows.
        """
        head = self._weights.lm_head
        with torch.inference_mode():
            product = functional.linear(hidden, head) if out is None else torch.mm(hidden, head.t(), out=out)
            return finish_logits(product, self.spec)

    def _share(self, step: DeviceStep, kv: KvCache) -> FusedStep:
        rotations = (rope.rotation(step.positions) for rope in self._ropes)
        return FusedStep(
            inputs=step,
            kv=kv,
            rotations=tuple(FlatRotation(turn.cos.squeeze(1), turn.sin.squeeze(1)) for turn in rotations),
            buffers=self._buffers.first(step.num_rows),
            decode_workspace=self._decode_workspace,
            side=self._side,
            configs=self._configs,
        )


def load_fused_decoder(
    model_dir: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    max_model_len: int | None,
    max_step_tokens: int,
    max_decodes: int,
    side: SideStream,
    configs: LaunchConfigs,
) -> FusedDecoder:
    """Load the weights of a model folder, tensor by tensor through host memory to the device; see `FusedDecoder`.

    Raises:
        StartError: as `serve.model.weights.load_decoder`.
    """
    checkpoint = Checkpoint.open(model_dir)
    source = CheckpointWeights(spec, checkpoint, WeightNames.find(spec, checkpoint), dtype, device)
    return FusedDecoder(
        spec,
        read_fused_weights(source),
        max_model_len=max_model_len,
        max_step_tokens=max_step_tokens,
        max_decodes=max_decodes,
        side=side,
        configs=configs,
    )


def _next_norm(weights: FusedWeights, layer: int) -> NormWeights | None:
    if layer + 1 < len(weights.layers):
        return weights.layers[layer + 1].attention_norms.before
    return weights.final_norm
