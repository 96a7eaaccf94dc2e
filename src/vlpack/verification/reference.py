"""The reference of a verification: the model in transformers, its weights streamed module by module if memory is small.

Nothing is approximated: modules and attention are transformers'. This module only decides where parameters are: they
are loaded when a module is called and, if the model is streamed, unloaded afterwards.
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
from vlpack.verification.hybrid import watched

Array = npt.NDArray[Any]
GetParameter = Callable[[str, tuple[int, ...]], Array]
"""Gives a parameter's values, by its name and shape."""


def require() -> None:
    """Check that the libraries of the reference (accelerate, torch, transformers) are installed and can be imported.

    Raises:
        VerifyError: a library is missing, or cannot be imported.
    """
    missing = [name for name in ("accelerate", "torch", "transformers") if find_spec(name) is None]
    if missing:
        raise VerifyError(
            f"Verifying needs {', '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed.",
            "Install the extra: pip install 'vlpack[verify]', or pip install '.[verify]' in a copy of the repository.",
        )
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        from_transformers(name)


def from_transformers(name: str) -> Any:
    """A class of transformers by its name; transformers imports its dependencies only now.

    Raises:
        VerifyError: transformers has no such class, or cannot import it.
    """
    try:
        import transformers

        return getattr(transformers, name)
    except AttributeError:
        raise VerifyError(f"The installed transformers has no {name}.", "Install a newer version.") from None
    except (
        Exception
    ) as error:  # libraries of mismatched builds raise different errors: ImportError, RuntimeError, OSError
        raise VerifyError(
            f"transformers is installed, but {name} cannot be imported: {str(error).strip().splitlines()[-1][:200]}",
            "Libraries of mismatched builds cause this (torch and torchvision, for instance). Install them together in "
            "a new environment: pip install 'vlpack[verify]'.",
        ) from None


@dataclass
class Trace:
    """The reference's intermediate and final results for a case; arrays are float32 unless noted.

    Args:
        positions: position ids, int64 ``[3, B, S]`` or ``[B, S]``.
        blocks: input of each vision block, ``[N, H]``.
        features: merged image features, ``[tokens, H]``.
        levels: DeepStack's features, ``[tokens, H]`` for each level.
        embeds: embeddings with the image features in place, ``[S, H]``.
        layers: input of each decoder layer after the first, and of the final norm, ``[S, H]``.
        inner: the stages inside of decoder layers, ``[S, C]`` (`vlpack.verification.hybrid`).
        result: logits ``[S, V]``; the vector ``[H]`` of an embedding model; the probabilities of yes and no of a
            reranker.
    """

    positions: Array
    result: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    blocks: list[Array] = field(default_factory=list)
    features: Array | None = None
    levels: list[Array] = field(default_factory=list)
    embeds: Array | None = None
    layers: list[Array] = field(default_factory=list)
    inner: dict[str, Array] = field(default_factory=dict)


def in_prompt_order(trace: Trace, prompt: Prompt) -> Trace:
    """The trace with the vision results in the order of the prompt; transformers puts all images before all videos."""
    if not prompt.videos or prompt.is_video.all():
        return trace
    order = np.argsort(prompt.is_video, kind="stable")  # the reference's order: images, then videos

    def restore(array: Array, sizes: Array) -> Array:
        pieces = np.split(array, np.cumsum(sizes[order])[:-1])
        return np.concatenate([pieces[place] for place in np.argsort(order)])

    assert trace.features is not None, "a prompt with videos has features"
    tokens = prompt.num_image_tokens
    trace.blocks = [restore(block, prompt.grids.prod(axis=1)) for block in trace.blocks]
    trace.features, trace.levels = restore(trace.features, tokens), [restore(level, tokens) for level in trace.levels]
    return trace


class Reference:
    """A checkpoint's model in transformers, in fp32 with eager attention.

    Args:
        folder: the checkpoint's folder.
        prefix: prefix of the decoder's modules, such as ``model.language_model``.
        parameters: gives a parameter's values by its name.
        streamed: whether parameters are unloaded after each use, so that memory for the largest module is enough.
        head: computes the result of an embedding model or reranker from the last token's hidden state ``[H]``; None
            for a model that generates.
        second_stage: computes the logits of a head with two stages from those of its first stage ``[S, V]`` and the
            head's inputs ``[S, H]``; None for a head with one stage.

    Raises:
        VerifyError: transformers does not know the model, or is not installed.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        parameters: GetParameter,
        *,
        streamed: bool,
        head: Callable[[Array], Array] | None = None,
        second_stage: Callable[[Array, Array], Array] | None = None,
    ) -> None:
        require()
        import accelerate
        import torch
        import transformers

        self.prefix, self.parameters, self.streamed = prefix, parameters, streamed
        self.head, self.second_stage = head, second_stage
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
            model_class = from_transformers(config.architectures[0])
            config._attn_implementation = "eager"
            with accelerate.init_empty_weights(include_buffers=False):
                self.model = model_class(config)
                if head is not None and not hasattr(self.model, "model"):  # without a head, so names lack the prefix
                    self.model = torch.nn.ModuleDict({"model": self.model})
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise VerifyError(f"transformers cannot read {folder}: {str(error).splitlines()[0]}") from None
        self.model = self.model.float().eval()
        for name, module in self.model.named_modules():
            if module._parameters:
                # the module around a convolution of linear attention uses its weight without calling it
                owner = self.model.get_submodule(name.rpartition(".")[0]) if name.endswith(".conv1d") else module
                owner.register_forward_pre_hook(_load_parameters(name, parameters, module))
                if streamed:
                    owner.register_forward_hook(_unload_parameters(module))

    @property
    def sees(self) -> bool:
        """Whether the model has a vision encoder."""
        return hasattr(getattr(self.model, "model", None), "visual")

    def positions(self, arrays: Mapping[str, Array]) -> Array:
        """The position ids that transformers' model makes, ``[3, 1, S]`` or ``[1, S]``."""
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
        """Run one forward pass and return its intermediate and final results.

        In the trace, images come before videos, whatever their order in the prompt.

        Args:
            arrays: ``input_ids [1, S]`` and, for images, the other arrays of
                `vlpack.preprocess.Prompt.transformers_arrays`.
        """
        import torch

        trace = Trace(self.positions(arrays))
        arguments: dict[str, Any] = {name: torch.tensor(array) for name, array in arrays.items() if self.sees}
        arguments |= {"input_ids": torch.tensor(arrays["input_ids"]), "use_cache": False}
        arguments["position_ids"] = torch.tensor(trace.positions)
        layers = self.model.get_submodule(self.prefix).layers
        with watched(layers, trace.inner), self._watched(trace, arrays.get("image_grid_thw")), torch.no_grad():
            if self.head is None:
                trace.result = self._logits(arguments)
            else:
                trace.result = self.head(self.model.model(**arguments).last_hidden_state[0, -1].numpy())
        return trace

    def _logits(self, arguments: Mapping[str, Any]) -> Array:
        if self.second_stage is None:
            return np.asarray(self.model(**arguments).logits[0].numpy())
        states: list[Array] = []
        hook = self.model.lm_head.register_forward_pre_hook(_keep_input(states.append))
        try:
            logits = self.model(**arguments).logits[0].numpy()
        finally:
            hook.remove()
        return self.second_stage(logits, states[0][0])

    @contextmanager
    def _watched(self, trace: Trace, grid: Array | None) -> Iterator[None]:
        decoder = self.model.get_submodule(self.prefix)
        hooks = [decoder.layers[0].register_forward_pre_hook(_keep_input(lambda x: setattr(trace, "embeds", x[0])))]
        for module in [*decoder.layers[1:], decoder.norm]:
            hooks.append(module.register_forward_pre_hook(_keep_input(lambda x: trace.layers.append(x[0]))))
        visual = self.model.model.visual if self.sees else None
        # one item per call of the vision encoder: images are one call, videos another
        blocks: list[list[Array]] = [[] for _ in visual.blocks] if visual else []
        outputs: list[list[Array]] = []
        if visual:
            for kept, block in zip(blocks, visual.blocks, strict=True):
                hooks.append(block.register_forward_pre_hook(_keep_input(kept.append)))

            def see_features(module: Any, inputs: Any, output: Any) -> None:
                deepstack = getattr(output, "deepstack_features", None) or []
                outputs.append([output.pooler_output.numpy(), *(level.numpy() for level in deepstack)])

            hooks.append(visual.register_forward_hook(see_features))
        try:
            yield
            if outputs:
                trace.blocks = [np.concatenate(calls) for calls in blocks]
                trace.features, *trace.levels = (np.concatenate(calls) for calls in zip(*outputs, strict=True))
            self._undo_window_order(trace, grid)
        finally:
            for hook in hooks:
                hook.remove()

    def _undo_window_order(self, trace: Trace, grid: Array | None) -> None:
        """Put patches back into the image's order, if the vision encoder sorts them by window."""
        visual: Any = getattr(getattr(self.model, "model", None), "visual", None)
        if grid is None or not hasattr(visual, "window_size"):
            return
        import torch

        if hasattr(visual, "get_window_index"):  # first versions of transformers 5
            index, _ = visual.get_window_index(torch.tensor(grid))
        else:
            from transformers.vision_utils import get_vision_window_index

            sizes = (visual.spatial_merge_size, visual.window_size, visual.patch_size)
            index, _ = get_vision_window_index(torch.tensor(grid), *sizes)
        order, group = np.argsort(np.asarray(index)), visual.spatial_merge_unit
        for number, block in enumerate(trace.blocks):
            groups = block.reshape(len(order), group, -1)
            trace.blocks[number] = groups[order].reshape(block.shape)


def _keep_input(keep: Callable[[Array], None]) -> Any:
    return lambda module, inputs: keep(inputs[0].numpy().copy())


def _load_parameters(name: str, parameters: GetParameter, module: Any) -> Any:
    import torch

    def hook(caller: Any, inputs: Any) -> None:
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = parameters(f"{name}.{own}" if name else own, tuple(parameter.shape))
                module._parameters[own] = torch.nn.Parameter(torch.from_numpy(values), requires_grad=False)

    return hook


def _unload_parameters(module: Any) -> Any:
    def hook(caller: Any, inputs: Any, output: Any) -> None:
        for own, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[own] = parameter.to("meta")

    return hook
