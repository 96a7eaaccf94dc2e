"""Turns the cases of a verification into prompts and, if the model generates, into greedy answers of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vlpack.errors import InputError
from vlpack.package.manifest import whole_package
from vlpack.preprocess import Prompt, Tokenizer
from vlpack.preprocess.retrieval_prompts import Input
from vlpack.preprocess.settings_folder import SettingsFolder
from vlpack.runtime.genai_model import RUNTIME
from vlpack.runtime.load import load
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling
from vlpack.tasks import GENERATE, manifest_task
from vlpack.verification.cases import DOCUMENT, Case, built_in

if TYPE_CHECKING:
    from vlpack.runtime.retrieval import Embedder, Reranker
    from vlpack.verification.reference import Trace

Array = npt.NDArray[Any]


@dataclass
class Asked:
    """A case together with its prompt, the package's answer and, until it is compared, the reference's trace.

    Args:
        case: the case.
        prompt: the prompt for both package and reference.
        tokens: the package's greedy answer through the runtime; empty for a package that embeds or scores.
        ids: int64 ``[1, S]``: the prompt and the answer without its last token.
        original: the reference's intermediate results and logits for ``ids``; None before and after the comparison.
    """

    case: Case
    prompt: Prompt
    tokens: list[int]
    ids: Array
    original: Trace | None = None


@dataclass(frozen=True)
class Answers:
    """All results that need the package loaded in its runtime; afterwards the runtime is unloaded.

    Args:
        asked: the cases with their prompts and answers.
        tokenizer: the package's tokenizer.
        task: the package's task.
        stops: ids of the tokens that end an answer; None for a package that does not generate.
        plain: whether prompts are made without the chat template, as for embedding models of text.
        limits: smallest and largest image area, if the package does not take them from preprocessor_config.json.
    """

    asked: list[Asked]
    tokenizer: Tokenizer
    task: str
    stops: frozenset[int] | None = None
    plain: bool = False
    limits: Mapping[str, int] | None = None


def ask(
    folder: Path,
    cases: Sequence[Case] | None,
    *,
    tokens: int,
    threads: int | None,
    visual: Sequence[int],
    progress: Callable[[str], None],
) -> Answers:
    """Load a package, make the prompts of all cases and, if it generates, answer them.

    Args:
        folder: the package's folder.
        cases: the cases; None for the `built_in` ones that fit the package.
        tokens: largest number of tokens of an answer.
        threads: number of threads of the runtime.
        visual: ids of the tokens that stand for images and videos. An answer is cut before the first of them, because
            the reference would take a generated one for an image's.
        progress: called with a description of each step.

    Raises:
        VlpackError: the package cannot be loaded, or a case does not fit it.
    """
    manifest = whole_package(folder)
    sees = "vision.onnx" in manifest["files"]
    generates = manifest_task(folder, manifest) == GENERATE
    # everything runs in the runtime, as it does for users of other languages
    package = load(folder, threads=threads, vision_provider=RUNTIME if generates and sees else None)
    if isinstance(package, Model):
        asked = []
        for case in cases or built_in(sees=sees, videos=package.takes_videos):
            progress(f"asking: {case.name}")
            asked.append(_answer(package, case, tokens, visual))
        eos = package.config["model"]["eos_token_id"]
        stops = frozenset(eos if isinstance(eos, list) else [eos])
        return Answers(asked, package.tokenizer, package.task, stops)
    prompts = _prompts(package, cases or built_in(sees=sees))
    asked = [Asked(case, prompt, [], prompt.input_ids.astype(np.int64)) for case, prompt in prompts]
    image = package.image
    limits = {"shortest_edge": image["min_pixels"], "longest_edge": image["max_pixels"]} if image else None
    plain = package.manifest["encoder"]["form"] == "plain"
    tokenizer = Tokenizer.from_folder(SettingsFolder(folder, manifest["files"]))
    return Answers(asked, tokenizer, package.task, plain=plain, limits=limits)


def _answer(model: Model, case: Case, tokens: int, visual: Sequence[int]) -> Asked:
    if case.document is not None:
        raise InputError(f"{case.name} has a document, but the package is not a reranker.", "Remove the document.")
    prompt = model.prompt(case.prompt, case.images, case.videos, video_options=case.video_options)
    answer = model.generate(prompt, max_tokens=tokens, sampling=Sampling(temperature=0)).tokens
    answer = list(takewhile(lambda token: token not in visual, answer))
    return Asked(case, prompt, answer, np.concatenate([prompt.input_ids[0], answer[:-1]]).astype(np.int64)[None])


def _prompts(package: Embedder | Reranker, cases: Sequence[Case]) -> list[tuple[Case, Prompt]]:
    from vlpack.runtime.retrieval import Reranker

    prompts = []
    for case in cases:
        if case.videos:
            raise InputError(f"{case.name} has a video, which the package does not take.", "Remove the video.")
        if isinstance(package, Reranker):
            prompts.append((case, package.prompt(case.prompt, _input(case.document or DOCUMENT, case))))
        elif case.document is not None:
            raise InputError(f"{case.name} has a document, but the package is not a reranker.", "Remove the document.")
        else:
            prompts.append((case, package.prompt(_input(case.prompt, case))))
    return prompts


def _input(text: str, case: Case) -> Input:
    return {"image": list(case.images), "text": text} if case.images else text
