"""The interface of every architecture: its graphs, and the facts that the runtime's configuration needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, Any

from onnxscript import nn

from vlpack.architectures.hparams import TextFacts, VisionFacts
from vlpack.architectures.ports import GraphOptions, Part, decoder_part, embedding_part, vision_part
from vlpack.layers.deepstack import SideChannel
from vlpack.layers.embedding import ImageEmbedding
from vlpack.quantize.policy import OFFERED, PrecisionFacts
from vlpack.tasks import GENERATE

if TYPE_CHECKING:
    from vlpack.architectures.text import TextDecoder
    from vlpack.checkpoint.safetensors import TensorInfo


class Architecture(ABC):
    """A model whose config has been read; each family is a subclass (docs/adding-an-architecture.md)."""

    models: str
    """Names of the published models, for people."""
    needs: str = ""
    """Requirements or limits of these models that others do not have, for people."""
    providers: tuple[str, ...] = tuple(OFFERED)
    """Execution providers that have all the operators that the model needs."""
    genai_type: str
    """``model.type`` in the genai_config.json of a package with vision, embedding and decoder graphs."""
    genai_text_type: str
    """``model.type`` in the genai_config.json of a package whose decoder embeds token ids itself."""
    normalize_flag: str = ""
    """The attribute of the image processor's Normalize step that makes it write this family's patch layout."""
    tasks: tuple[str, ...] = (GENERATE,)
    """Tasks that the family's models can be built for."""
    task: str = GENERATE
    """Task that this model is built for; `architecture_of` sets it."""
    yes_no_ids: tuple[int, int] | None = None
    """Token ids of yes and no if the model is a reranker; `architecture_of` sets them."""
    renamed: Mapping[str, str] = {}
    """Maps prefixes of tensor names in older checkpoints to today's prefixes."""
    ignored: Mapping[str, str] = {}
    """Maps patterns of tensor names that a package has no use for to what they are, as a note for the user says it."""
    decoder: TextDecoder
    vision: VisionFacts | None = None
    """Sizes and token ids of the vision part; None for a text model."""
    deepstack_levels: int = 0
    """Number of features from inside the vision encoder that are added after the decoder's first layers (DeepStack)."""

    @abstractmethod
    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read and check a config.json.

        Raises:
            CheckpointError: a value is missing or not supported.
        """

    def observe(self, tensors: Mapping[str, TensorInfo]) -> None:  # noqa: B027 (most need not)
        """Read facts from the checkpoint's tensors that its config does not contain; the default reads nothing.

        Raises:
            CheckpointError: the tensors have a layout that is not supported.
        """

    @property
    def precision_facts(self) -> PrecisionFacts:
        """The facts about the model that a precision policy depends on."""
        text = self.text
        width = gcd(text.hidden_size, text.num_attention_heads * text.head_size)
        if text.delta_net is not None:
            width = gcd(width, text.delta_net.value_width)
        return PrecisionFacts(
            text.num_hidden_layers,
            scores=self.yes_no_ids is not None,
            width=width,
            gates=text.delta_net is not None,
        )

    def vision_model(self, options: GraphOptions) -> nn.Module:
        """The vision encoder: ``pixel_values``, ``image_grid_thw`` → ``image_features``."""
        raise NotImplementedError(f"{type(self).__name__} sets `vision` and does not define `vision_model`")

    @classmethod
    def sees(cls) -> bool:
        """Whether the family has a vision encoder."""
        return cls.vision_model is not Architecture.vision_model

    @property
    def text(self) -> TextFacts:
        """The decoder's sizes."""
        return self.decoder.facts

    @property
    def deepstack(self) -> SideChannel:
        """The channel that carries DeepStack's levels from the vision encoder to the decoder, if there are any."""
        return SideChannel(self.deepstack_levels, self.text.hidden_size)

    @property
    def tied(self) -> bool:
        """Whether the head and the embedding share one weight."""
        return self.decoder.tied

    def untie(self) -> None:
        """Unties the head from the embedding: its weight becomes a separate one, whatever the configuration says."""
        self.decoder = replace(self.decoder, tied=False)

    def parts(self, options: GraphOptions) -> list[Part]:
        """The graphs of the complete package, the decoder first."""
        if self.vision is None:
            return [self.text_part(options)]
        tokens = [self.vision.image_token_id, self.vision.video_token_id]
        embedding = ImageEmbedding(self.decoder.embed_tokens(), tokens, self.deepstack, options.dtype)
        return [
            self.decoder_part(options),
            vision_part(self.vision_model(options), self.vision.pixels, self.deepstack, options),
            embedding_part(embedding, self.deepstack, options),
        ]

    def decoder_part(self, options: GraphOptions) -> Part:
        """The decoder graph that takes ``inputs_embeds`` and DeepStack's channel."""
        if self.task != GENERATE:
            return self.decoder.pooled_part("decoder", options, self.deepstack, self.yes_no_ids)
        module = self.decoder.causal_lm(options, self.deepstack)
        return decoder_part("decoder", module, self.text, options, self.deepstack, self.decoder.position_axes)

    def text_part(self, options: GraphOptions) -> Part:
        """The decoder graph that takes ``input_ids`` and embeds them itself."""
        if self.task != GENERATE:
            return self.decoder.pooled_part("text", options, None, self.yes_no_ids)
        module = self.decoder.causal_lm(options, None)
        return decoder_part("text", module, self.text, options, None, self.decoder.position_axes)
