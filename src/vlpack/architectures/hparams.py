"""The sizes and token ids of a model, read from config.json and checked."""

from __future__ import annotations

from dataclasses import dataclass

from vlpack.checkpoint.config import Section
from vlpack.errors import CheckpointError
from vlpack.layers.delta_net import DeltaNetSizes
from vlpack.layers.vision import patch_size, pixels_of, temporal_patch_size


@dataclass(frozen=True)
class TextFacts:
    """The decoder's sizes, with the names that genai_config.json has for them.

    ``linear_layers`` are the layers with linear attention, whose sizes are ``delta_net``; the others have a key/value
    cache.
    """

    hidden_size: int
    head_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    vocab_size: int
    context_length: int
    linear_layers: tuple[int, ...] = ()
    delta_net: DeltaNetSizes | None = None

    @classmethod
    def read(cls, config: Section) -> TextFacts:
        """Read the sizes from the text part of a config.json.

        Raises:
            CheckpointError: a size is missing, out of range or inconsistent with another.
        """
        heads = config.integer("num_attention_heads", high=1 << 12)
        kv_heads = config.integer("num_key_value_heads", heads, high=1 << 12)
        hidden_size = config.integer("hidden_size", high=1 << 20)
        head_size = config.integer("head_dim", hidden_size // heads, high=1 << 12)
        if heads % kv_heads:
            raise CheckpointError(
                f"{config.where}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})."
            )
        if head_size % 8:
            raise CheckpointError(f"{config.where}: head_dim is {head_size}; the runtime needs a multiple of 8.")
        return cls(
            hidden_size=hidden_size,
            head_size=head_size,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            num_hidden_layers=config.integer("num_hidden_layers", high=1 << 12),
            vocab_size=config.integer("vocab_size", high=1 << 24),
            context_length=config.integer("max_position_embeddings", 32768),
        )


@dataclass(frozen=True)
class VisionFacts:
    """The facts that image processing needs: patch sizes, and the ids of the tokens around and for an image."""

    depth: int
    pixels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    tokens_per_second: float
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @classmethod
    def read(cls, root: Section, vision: Section) -> VisionFacts:
        """Reads the facts from a config.json and its vision part; missing token ids are those of Qwen's models."""
        return cls(
            depth=vision.integer("depth", high=1024),
            pixels=pixels_of(vision),
            patch_size=patch_size(vision),
            temporal_patch_size=temporal_patch_size(vision),
            spatial_merge_size=vision.integer("spatial_merge_size", 2, high=16),
            tokens_per_second=vision.number("tokens_per_second", 2.0),
            image_token_id=root.integer("image_token_id", 151655, low=0),
            video_token_id=root.integer("video_token_id", 151656, low=0),
            vision_start_token_id=root.integer("vision_start_token_id", 151652, low=0),
            vision_end_token_id=root.integer("vision_end_token_id", 151653, low=0),
        )


def output_width(vision: Section, name: str, text: TextFacts) -> int:
    """The width of the vision encoder's features, which must equal the decoder's hidden_size.

    Raises:
        CheckpointError: the two differ.
    """
    width = vision.integer(name, text.hidden_size)
    if width != text.hidden_size:
        raise CheckpointError(
            f"{vision.where}: '{name}' is {width} and the decoder's hidden_size {text.hidden_size}; they must be equal."
        )
    return width
