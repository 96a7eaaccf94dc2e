"""The embedding graph of a vision-language package: token embeddings, with image features at the image tokens."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.layers import ops
from vlpack.layers.deepstack import SideChannel
from vlpack.layers.linear import Embedding


class ImageEmbedding(nn.Module):
    """Token embeddings in which image tokens are replaced by image features.

    ``input_ids [B, S]`` and ``image_features [F, W]`` become ``inputs_embeds [B, S, H]`` and DeepStack's channel. The
    features go, in order, to the tokens whose id is in ``image_token_ids``; F is 0 for text and in decoding. The
    channel is zero at all other tokens. Source: ``masked_scatter`` in transformers' ``Qwen3VLModel.forward``.
    """

    def __init__(
        self, embed_tokens: Embedding, image_token_ids: list[int], deepstack: SideChannel, dtype: ir.DataType
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.image_token_ids, self.deepstack, self.dtype = image_token_ids, deepstack, dtype

    def forward(self, op: OpBuilder, input_ids: ir.Value, image_features: ir.Value) -> list[ir.Value]:
        embeds = ops.cast(op, self.embed_tokens(op, input_ids), self.dtype)  # [B, S, H]
        is_image = op.Equal(input_ids, self.image_token_ids[0])
        for token_id in self.image_token_ids[1:]:
            is_image = op.Or(is_image, op.Equal(input_ids, token_id))
        # without features, the model generated such a token itself, and it is embedded like any other
        is_image = op.And(is_image, op.Greater(op.Size(image_features), 0))
        # row 0 is zeros, for text; the k-th image token takes row k. A token without a feature is out of range, which
        # the runtime reports; a clamp would silently repeat a feature.
        zeros = np.zeros([1, self.deepstack.feature_width], self.dtype.numpy())
        rows = op.Concat(ops.constant(op, zeros, zeros.dtype), image_features, axis=0)  # [1 + F, W]
        flat = op.Cast(op.Reshape(is_image, [-1]), to=ops.INT64)
        index = op.Reshape(op.Mul(op.CumSum(flat, 0), flat), op.Shape(input_ids))
        features, channel = self.deepstack.split(op, op.Gather(rows, index, axis=0))
        embeds = op.Where(op.Unsqueeze(is_image, [-1]), features, embeds)
        return [embeds] if channel is None else [embeds, channel]
