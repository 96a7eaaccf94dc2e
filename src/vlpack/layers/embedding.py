"""The embedding graph of a vision-language package: token embeddings, with image features in the images' places."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from vlpack.layers import ops
from vlpack.layers.deepstack import SideChannel
from vlpack.layers.linear import Embedding


class ImageEmbedding(nn.Module):
    """``input_ids [B, S]``, ``image_features [F, W]`` → ``inputs_embeds [B, S, H]`` and DeepStack's channel.

    The features go, in order, to the tokens whose id is one of ``image_token_ids``; F is 0 in text and in decoding.
    The channel is zero in every other row. Source: ``masked_scatter`` in transformers' ``Qwen3VLModel.forward``.
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
        # without features such a token is one that the model has generated itself, and a word like any other
        is_image = op.And(is_image, op.Greater(op.Size(image_features), 0))
        # row 0 is zeros and serves the text; the k-th image token takes row k. One token too many is out of range,
        # which the runtime reports, where a clamp would repeat a feature in silence.
        zeros = np.zeros([1, self.deepstack.feature_width], self.dtype.numpy())
        rows = op.Concat(ops.constant(op, zeros, zeros.dtype), image_features, axis=0)  # [1 + F, W]
        flat = op.Cast(op.Reshape(is_image, [-1]), to=ops.INT64)
        index = op.Reshape(op.Mul(op.CumSum(flat, 0), flat), op.Shape(input_ids))
        features, channel = self.deepstack.split(op, op.Gather(rows, index, axis=0))
        embeds = op.Where(op.Unsqueeze(is_image, [-1]), features, embeds)
        return [embeds] if channel is None else [embeds, channel]
