"""DeepStack's route through a package: how the vision encoder's levels reach the first decoder layers.

Qwen3-VL adds features from several depths of its vision encoder to the hidden states after its first decoder layers
(Meng et al. 2024, arXiv:2406.04334). The runtime does not know DeepStack, but it forwards a generic tensor
``per_layer_inputs`` from the embedding graph to the decoder. `SideChannel` is all that the graphs and genai_config.json
know of that route; another route would be another class with the same methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder

CHANNEL = "per_layer_inputs"
"""Name of the tensor that carries DeepStack's levels."""


@dataclass(frozen=True)
class SideChannel:
    """The tensor that carries DeepStack's features: ``levels`` vectors of ``hidden_size`` for every image token.

    With 0 levels there is no such tensor, and the package is an ordinary one.
    """

    levels: int
    hidden_size: int

    @property
    def feature_width(self) -> int:
        """Last dimension of ``image_features``: the embedding followed by the levels."""
        return (1 + self.levels) * self.hidden_size

    @property
    def channel_width(self) -> int:
        """Last dimension of the channel; 0 without levels."""
        return self.levels * self.hidden_size

    def join(self, op: OpBuilder, merged: ir.Value, levels: list[ir.Value]) -> ir.Value:
        """Joins ``merged [N, H]`` and the levels ``[N, H]`` to ``image_features``, in the vision graph.

        The result is ``[N, (1 + levels) · H]``.
        """
        return op.Concat(merged, *levels, axis=-1) if levels else merged

    def split(self, op: OpBuilder, features: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """Splits ``[.., (1 + levels) · H]`` into embeddings ``[.., H]`` and the channel, in the embedding graph."""
        if not self.levels:
            return features, None
        sizes = [self.hidden_size, self.channel_width]
        embeds, channel = op.Split(features, sizes, axis=-1, _outputs=2)
        return embeds, channel

    def levels_of(self, op: OpBuilder, channel: ir.Value | None) -> list[ir.Value]:
        """Splits the channel ``[B, S, levels · H]`` into ``[B, S, H]`` for each of the first layers, in the decoder."""
        if channel is None:
            return []
        if self.levels == 1:
            return [channel]
        return list(op.Split(channel, axis=-1, num_outputs=self.levels, _outputs=self.levels))

    def genai_names(self) -> dict[str, str]:
        """The channel's entry in ``decoder.inputs`` and ``embedding.outputs`` of genai_config.json."""
        return {CHANNEL: CHANNEL} if self.levels else {}
