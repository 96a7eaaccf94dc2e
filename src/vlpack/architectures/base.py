"""What every architecture answers: its graphs, and the facts that the runtime's configuration needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
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
    """A model family with its config read. See docs/adding-an-architecture.md."""

    models: str
    """The published models, for people."""
    needs: str = ""
    """What they need beyond what every model does, likewise."""
    providers: tuple[str, ...] = tuple(OFFERED)
    """Execution providers that have the operators."""
    genai_type: str
    """``model.type`` in genai_config.json of the complete package."""
    genai_text_type: str
    """… and of the decoder that embeds by itself."""
    normalize_flag: str = ""
    """The attribute of the image processor's Normalize step that makes it write this family's patch layout."""
    tasks: tuple[str, ...] = (GENERATE,)
    """What its models can be for."""
    task: str = GENERATE
    """What this one is for; `architecture_of` sets it."""
    answers: tuple[int, int] | None = None
    """A reranker's ids of the tokens yes and no, likewise."""
    renamed: Mapping[str, str] = {}
    """Prefix of older checkpoints → today's, for tensors that were once named otherwise."""
    decoder: TextDecoder
    vision: VisionFacts | None = None
    """None for a text model."""
    deepstack_levels: int = 0
    """How many features from the depth of the vision encoder go to the decoder's first layers."""

    @abstractmethod
    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read and check a config.json.

        Raises:
            CheckpointError: a value is missing or not supported.
        """

    def observe(self, tensors: Mapping[str, TensorInfo]) -> None:  # noqa: B027 (most need not)
        """Take from the checkpoint's tensors what its config does not say; by default there is nothing.

        Raises:
            CheckpointError: what they say is not supported.
        """

    @property
    def precision_facts(self) -> PrecisionFacts:
        """What a precision policy must know."""
        return PrecisionFacts(self.text.num_hidden_layers, scores=self.answers is not None)

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
        """DeepStack's way from the vision encoder to the decoder; without levels there is none."""
        return SideChannel(self.deepstack_levels, self.text.hidden_size)

    @property
    def tied(self) -> bool:
        """The head's weight is the embedding's."""
        return self.decoder.tied

    def untie(self) -> None:
        """The head has a weight of its own from now on, whatever the config says."""
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
        """The decoder that takes ``inputs_embeds`` and DeepStack's channel."""
        if self.task != GENERATE:
            return self.decoder.pooled_part("decoder", options, self.deepstack, self.answers)
        module = self.decoder.causal_lm(options, self.deepstack)
        return decoder_part("decoder", module, self.text, options, self.deepstack, self.decoder.position_axes)

    def text_part(self, options: GraphOptions) -> Part:
        """The decoder that takes ``input_ids`` and embeds them itself."""
        if self.task != GENERATE:
            return self.decoder.pooled_part("text", options, None, self.answers)
        module = self.decoder.causal_lm(options, None)
        return decoder_part("text", module, self.text, options, None, self.decoder.position_axes)
