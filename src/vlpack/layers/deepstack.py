"""DeepStack's way through the package: where the vision encoder puts its levels and where the decoder finds them.

Qwen3-VL adds features from several depths of its vision encoder to the hidden states after its first decoder layers
(Meng et al. 2024, arXiv:2406.04334). The runtime knows nothing of it, but forwards a generic ``per_layer_inputs``
tensor from the embedding graph to the decoder. This object is all that the graphs and genai_config.json know of that
route; another contract would be another class with the same methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder

CHANNEL = "per_layer_inputs"


@dataclass(frozen=True)
class SideChannel:
    """``levels`` features of ``hidden_size`` each beside every image token's embedding.

    Without levels there is no channel, and the package is an ordinary one.
    """

    levels: int
    hidden_size: int

    @property
    def feature_width(self) -> int:
        """Last dimension of ``image_features``: the embedding and then the levels."""
        return (1 + self.levels) * self.hidden_size

    @property
    def channel_width(self) -> int:
        """Last dimension of the channel; 0 where there is none."""
        return self.levels * self.hidden_size

    def join(self, op: OpBuilder, merged: ir.Value, levels: list[ir.Value]) -> ir.Value:
        """Vision: ``merged [N, H]`` and the levels ``[N, H]`` as ``image_features [N, (1 + levels) · H]``."""
        return op.Concat(merged, *levels, axis=-1) if levels else merged

    def split(self, op: OpBuilder, features: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """Embedding: ``[.., (1 + levels) · H]`` as the embeddings ``[.., H]`` and the channel."""
        if not self.levels:
            return features, None
        sizes = [self.hidden_size, self.channel_width]
        embeds, channel = op.Split(features, sizes, axis=-1, _outputs=2)
        return embeds, channel

    def levels_of(self, op: OpBuilder, channel: ir.Value | None) -> list[ir.Value]:
        """Decoder: the channel ``[B, S, levels · H]`` as a ``[B, S, H]`` for each of the first layers."""
        if channel is None:
            return []
        if self.levels == 1:
            return [channel]
        return list(op.Split(channel, axis=-1, num_outputs=self.levels, _outputs=self.levels))

    def genai_names(self) -> dict[str, str]:
        """What genai_config.json's ``decoder.inputs`` and ``embedding.outputs`` say of it."""
        return {CHANNEL: CHANNEL} if self.levels else {}
