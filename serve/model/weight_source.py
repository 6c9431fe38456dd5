"""Where a decoder's tensors come from: the files of a model folder, or random numbers of the same shapes.

Owns the order of rows in fused sites and the device and dtype that tensors are made in; what is built from them is
the loaders' business. Invariant: each call makes one new tensor, in its final place, and keeps none.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adapter_kernels.delta import FUSED_SITES
from serve.model.checkpoint import Checkpoint
from serve.model.families import NormKind
from serve.model.spec import ModelSpec
from serve.model.weight_names import WeightNames


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """A fused site's base weights, members one below the other: weight [O, D], bias [O] or None."""

    weight: Tensor
    bias: Tensor | None


class WeightSource(Protocol):
    """The tensors of one spec, in one dtype, on one device."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def embedding(self) -> Tensor:
        """Make the token table [V, D]."""
        ...

    def lm_head(self) -> Tensor | None:
        """Make the head's weight [V, D]; None: the token table serves for it."""
        ...

    def final_norm(self) -> Tensor:
        """Make the weight [D] of the norm after the last layer."""
        ...

    def norm(self, layer: int, path: str, width: int) -> Tensor:
        """Make the weight [width] of one of a layer's norms."""
        ...

    def site(self, layer: int, site: str) -> SiteWeights:
        """Make the base weights of a fused site."""
        ...


@dataclass(frozen=True, slots=True)
class CheckpointWeights:
    """`WeightSource` over the files of a model folder; nothing is read before it is asked for."""

    spec: ModelSpec
    checkpoint: Checkpoint
    names: WeightNames
    dtype: torch.dtype
    device: torch.device

    def embedding(self) -> Tensor:
        return self._tensor([self.names.embedding])

    def lm_head(self) -> Tensor | None:
        return None if self.names.lm_head is None else self._tensor([self.names.lm_head])

    def final_norm(self) -> Tensor:
        return self._tensor([self.names.final_norm])

    def norm(self, layer: int, path: str, width: int) -> Tensor:
        # the names were checked against their shapes before anything was read
        return self._tensor([self.names.layer(layer, path)])

    def site(self, layer: int, site: str) -> SiteWeights:
        weight = self._tensor(self.names.site(layer, site, "weight"))
        bias_names = self.names.site(layer, site, "bias")
        return SiteWeights(weight, self._tensor(bias_names) if bias_names else None)

    def _tensor(self, names: list[str]) -> Tensor:
        """Read tensors side by side along dim 0 into one new one."""
        shapes = [self.checkpoint.tensors[name].shape for name in names]
        rows = sum(shape[0] for shape in shapes)
        fused = torch.empty((rows, *shapes[0][1:]), dtype=self.dtype, device=self.device)
        begin = 0
        for name, shape in zip(names, shapes, strict=True):
            self.checkpoint.read_into(name, fused[begin : begin + shape[0]])
            begin += shape[0]
        return fused


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """`WeightSource` without files: weights of healthy size, for benchmarks on shapes whose weights are not at hand."""

    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def embedding(self) -> Tensor:
        dims = self.spec.dims
        return self._random((dims.vocab_size, dims.hidden_size), 1.0)

    def lm_head(self) -> Tensor | None:
        dims = self.spec.dims
        if dims.tie_word_embeddings:
            return None
        return self._random((dims.vocab_size, dims.hidden_size), 1.0 / math.sqrt(dims.hidden_size))

    def final_norm(self) -> Tensor:
        return self._ones(self.spec.dims.hidden_size)

    def norm(self, layer: int, path: str, width: int) -> Tensor:
        return self._ones(width)

    def site(self, layer: int, site: str) -> SiteWeights:
        shapes = [self.spec.dims.site_shape(member) for member in FUSED_SITES[site]]
        rows, width = sum(out for out, _ in shapes), shapes[0][1]
        weight = self._random((rows, width), 1.0 / math.sqrt(width))
        return SiteWeights(weight, self._random((rows,), 0.1) if self.spec.has_bias(site) else None)

    def _random(self, shape: tuple[int, ...], std: float) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0.0, std, generator=self.generator)

    def _ones(self, width: int) -> Tensor:
        fill = 0.0 if self.spec.norm_kind is NormKind.UNIT_OFFSET else 1.0
        return torch.full((width,), fill, dtype=self.dtype, device=self.device)
