"""The reference: transformers' own model, whose weights come and go layer by layer where they do not fit.

Nothing of the model is approximated: modules, attention and caches are transformers'; only where a module's parameters
live is decided here. They are put in when the module is called and, where the model is streamed, taken out after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.errors import VerifyError
from vlpack.preprocess import Prompt

Array = npt.NDArray[Any]
GetParameter = Callable[[str, tuple[int, ...]], Array]


def require() -> None:
    """The libraries that the reference is made of are there.

    Raises:
        VerifyError: one is not.
    """
    missing = [name for name in ("accelerate", "torch", "transformers") if find_spec(name) is None]
    if missing:
        raise VerifyError(
            f"Verifying needs {', '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed.",
            "pip install 'vlpack[verify]', or in a copy of the repository pip install '.[verify]'.",
        )
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        from_transformers(name)


def from_transformers(name: str) -> Any:
    """A class of transformers, which imports what the class needs when it is asked for.

    Raises:
        VerifyError: transformers has no such class, or cannot import it.
    """
    try:
        import transformers

        return getattr(transformers, name)
    except AttributeError:
        raise VerifyError(f"This transformers has no {name}.", "Install a newer one.") from None
    except (
        Exception
    ) as error:  # a library of another build raises whatever it likes: ImportError, RuntimeError, OSError
        raise VerifyError(
            f"transformers is installed, but {name} cannot be imported: {str(error).strip().splitlines()[-1][:200]}",
            "Libraries of different builds (torch and torchvision, for instance) do this. Install them together in a "
            "new environment: pip install 'vlpack[verify]'.",
        ) from None


@dataclass
class Trace:
    """What the reference made of a case; arrays are float32.

    Args:
        positions: int64 ``[3, B, S]`` or ``[B, S]``.
        blocks: input of each vision block, ``[N, H]``.
        features: merged, ``[tokens, H]``.
        levels: of DeepStack, ``[tokens, H]`` each.
        embeds: with the features in place, ``[S, H]``.
        layers: input of each decoder layer after the first, and of the final norm, ``[S, H]``.
        result: logits ``[S, V]``; of an embedding model its vector ``[H]``, of a reranker the probabilities of yes and
            no.
    """

    positions: Array
    result: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    blocks: list[Array] = field(default_factory=list)
    features: Array | None = None
    levels: list[Array] = field(default_factory=list)
    embeds: Array | None = None
    layers: list[Array] = field(default_factory=list)


def in_prompt_order(trace: Trace, prompt: Prompt) -> Trace:
    """The trace with what is of images and of videos as they stand in the prompt, not images first."""
    if not prompt.videos or prompt.is_video.all():
        return trace
    order = np.argsort(prompt.is_video, kind="stable")  # of the reference: images, then videos

    def restore(array: Array, sizes: Array) -> Array:
        pieces = np.split(array, np.cumsum(sizes[order])[:-1])
        return np.concatenate([pieces[place] for place in np.argsort(order)])

    assert trace.features is not None, "a prompt with videos has features"
    tokens = prompt.num_image_tokens
    trace.blocks = [restore(block, prompt.grids.prod(axis=1)) for block in trace.blocks]
    trace.features, trace.levels = restore(trace.features, tokens), [restore(level, tokens) for level in trace.levels]
    return trace


class Reference:
    """A checkpoint in transformers, fp32, eager attention.

    Args:
        folder: the checkpoint.
        prefix: of the decoder's modules, such as ``model.language_model``.
        parameters: gives a parameter's values by its name.
        streamed: take parameters out again after each use: as much memory as the largest module needs.
        head: what an embedding model or reranker makes of the last token's state ``[H]``; None where logits are wanted.

    Raises:
        VerifyError: transformers does not know the model, or is not there.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        parameters: GetParameter,
        *,
        streamed: bool,
        head: Callable[[Array], Array] | None = None,
    ) -> None:
        require()
        import accelerate
        import torch
        import transformers

        self.prefix, self.parameters, self.streamed, self.head = prefix, parameters, streamed, head
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
            model_class = from_transformers(config.architectures[0])
            config._attn_implementation = "eager"
            with accelerate.init_empty_weights(include_buffers=False):
                self.model = model_class(config)
                if head is not None and not hasattr(self.model, "model"):  # saved without a head: as if within one
                    self.model = torch.nn.ModuleDict({"model": self.model})
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise VerifyError(f"transformers cannot read {folder}: {str(error).splitlines()[0]}") from None
        self.model = self.model.float().eval()
        for name, module in self.model.named_modules():
            if module._parameters:
                module.register_forward_pre_hook(_bring(name, parameters))
                if streamed:
                    module.register_forward_hook(_take)

    @property
    def sees(self) -> bool:
        """Whether it has a vision encoder."""
        return hasattr(getattr(self.model, "model", None), "visual")

    def positions(self, arrays: Mapping[str, Array]) -> Array:
        """Position ids as the model makes them, ``[3, 1, S]`` or ``[1, S]``."""
        import torch

        length = arrays["input_ids"].shape[1]
        if not self.sees:
            return np.arange(length, dtype=np.int64)[None]
        grids = {name: torch.tensor(arrays[name]) for name in ("image_grid_thw", "video_grid_thw") if name in arrays}
        if not grids:
            return np.tile(np.arange(length, dtype=np.int64), (3, 1, 1))
        tokens, kinds = (torch.tensor(arrays[name]) for name in ("input_ids", "mm_token_type_ids"))
        positions, _ = self.model.model.get_rope_index(tokens, kinds.int(), **grids)
        return np.asarray(positions.numpy())

    def __call__(self, arrays: Mapping[str, Array]) -> Trace:
        """One forward pass, and everything on its way.

        Args:
            arrays: ``input_ids [1, S]`` and whatever else `vlpack.preprocess.Prompt.transformers_arrays` has. Images
                come before videos in the trace, whatever their order in the prompt.
        """
        import torch

        trace = Trace(self.positions(arrays))
        arguments: dict[str, Any] = {name: torch.tensor(array) for name, array in arrays.items() if self.sees}
        arguments |= {"input_ids": torch.tensor(arrays["input_ids"]), "use_cache": False}
        arguments["position_ids"] = torch.tensor(trace.positions)
        with self._watched(trace, arrays.get("image_grid_thw")), torch.no_grad():
            if self.head is None:
                trace.result = self.model(**arguments).logits[0].numpy()
            else:
                trace.result = self.head(self.model.model(**arguments).last_hidden_state[0, -1].numpy())
        return trace

    @contextmanager
    def _watched(self, trace: Trace, grid: Array | None) -> Iterator[None]:
        decoder = self.model.get_submodule(self.prefix)
        hooks = [decoder.layers[0].register_forward_pre_hook(_see(lambda x: setattr(trace, "embeds", x[0])))]
        for module in [*decoder.layers[1:], decoder.norm]:
            hooks.append(module.register_forward_pre_hook(_see(lambda x: trace.layers.append(x[0]))))
        visual = self.model.model.visual if self.sees else None
        # of each call: images are one, videos another
        blocks: list[list[Array]] = [[] for _ in visual.blocks] if visual else []
        outputs: list[list[Array]] = []
        if visual:
            for kept, block in zip(blocks, visual.blocks, strict=True):
                hooks.append(block.register_forward_pre_hook(_see(kept.append)))

            def see_features(module: Any, inputs: Any, output: Any) -> None:
                deepstack = getattr(output, "deepstack_features", None) or []
                outputs.append([output.pooler_output.numpy(), *(level.numpy() for level in deepstack)])

            hooks.append(visual.register_forward_hook(see_features))
        try:
            yield
            if outputs:
                trace.blocks = [np.concatenate(calls) for calls in blocks]
                trace.features, *trace.levels = (np.concatenate(calls) for calls in zip(*outputs, strict=True))
            self._straighten(trace, grid)
        finally:
            for hook in hooks:
                hook.remove()

    def _straighten(self, trace: Trace, grid: Array | None) -> None:
        """Where the encoder keeps the patches window by window, put them back into the image's order."""
        visual: Any = getattr(getattr(self.model, "model", None), "visual", None)
        if grid is None or not hasattr(visual, "window_size"):
            return
        import torch

        if hasattr(visual, "get_window_index"):  # of transformers 5's first versions
            index, _ = visual.get_window_index(torch.tensor(grid))
        else:
            from transformers.vision_utils import get_vision_window_index

            sizes = (visual.spatial_merge_size, visual.window_size, visual.patch_size)
            index, _ = get_vision_window_index(torch.tensor(grid), *sizes)
        order, group = np.argsort(np.asarray(index)), visual.spatial_merge_unit
        for number, block in enumerate(trace.blocks):
            groups = block.reshape(len(order), group, -1)
            trace.blocks[number] = groups[order].reshape(block.shape)


def _see(keep: Callable[[Array], None]) -> Any:
    return lambda module, inputs: keep(inputs[0].numpy().copy())


def _bring(name: str, parameters: GetParameter) -> Any:
    import torch

    def hook(module: Any, inputs: Any) -> None:
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = parameters(f"{name}.{own}" if name else own, tuple(parameter.shape))
                module._parameters[own] = torch.nn.Parameter(torch.from_numpy(values), requires_grad=False)

    return hook


def _take(module: Any, inputs: Any, output: Any) -> None:
    for own, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[own] = parameter.to("meta")
