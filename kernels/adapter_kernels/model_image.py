"""What an adapter does outside the linear layers of the decoder, as typed views into its image."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelTensors:
    """The tensors of one adapter's model ops."""
