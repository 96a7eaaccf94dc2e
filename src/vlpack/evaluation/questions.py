"""The scores of ``vlpack eval``: answers about images by a package, by the reference, and without DeepStack."""

from __future__ import annotations

import json
import os
import re
import shutil
import string
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlpack.checkpoint.gguf import gguf_in
from vlpack.checkpoint.hub import resolve
from vlpack.errors import OptionError, VerifyError, option
from vlpack.jsonl import read_jsonl
from vlpack.layers.deepstack import CHANNEL
from vlpack.package.manifest import read_manifest
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling
from vlpack.verification.reference import require

METRICS = ("exact", "choice", "anls")
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Question:
    """A question with the paths of its images and the accepted answers.

    With ``choices``, the accepted answers are the letters of the right choices.
    """

    question: str
    images: tuple[str, ...]
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The prompt's text; choices get letters, and the model is asked to answer with one of these."""
        if not self.choices:
            return self.question
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return f"{self.question}\n{listed}\nAnswer with the letter of the right choice only."


@dataclass(frozen=True)
class Score:
    """The score of one model on all questions.

    Args:
        name: name of the model.
        mean: mean score, 0 to 1.
        low: lower end of the 95% confidence interval.
        high: upper end of the 95% confidence interval.
        values: score of each question.
        answers: answer to each question.
    """

    name: str
    mean: float
    low: float
    high: float
    values: list[float]
    answers: list[str]


@dataclass(frozen=True)
class Comparison:
    """The mean advantage of the first model over the second on the same questions, with a 95% confidence interval."""

    first: str
    second: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metric: name of the metric.
        questions: number of questions.
        scores: the scores, the package's first.
        comparisons: the package's advantage over each other model.
        asked: the questions, in the order of each score's answers.
    """

    metric: str
    questions: int
    scores: list[Score]
    comparisons: list[Comparison]
    asked: list[Question] = field(default_factory=list)

    def wrong(self) -> list[tuple[Question, str, float]]:
        """The questions that the package answered wrong, with its answers and their values; the worst first."""
        first = self.scores[0]
        found = zip(self.asked, first.answers, first.values, strict=True)
        return sorted((one for one in found if one[2] < 1), key=lambda one: one[2])


Answerer = Callable[[Question], str]


def evaluate(
    package: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    metric: str | None = None,
    reference: str | os.PathLike[str] | None = None,
    without_deepstack: bool = False,
    limit: int | None = None,
    max_tokens: int = 32,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Ask every question of a JSONL file with greedy decoding, and score the answers.

    Args:
        package: the package's folder.
        data: the file; each line is an object with ``question``, ``image`` or ``images`` (paths relative to the file's
            folder), ``answer`` (a string or a list of accepted ones) and perhaps ``choices``.
        metric: ``exact`` (equal except for case, spaces and punctuation), ``choice`` (the right letter or text) or
            ``anls`` (Biten et al. 2019, arXiv:1905.13648: 1 - edit distance / length, or 0 if that is less than one
            half); by default ``choice`` if all questions have choices, and otherwise ``exact``.
        reference: folder or Hub id of a checkpoint that is asked the same questions in transformers.
        without_deepstack: whether to ask the package once more with DeepStack's features set to zero.
        limit: number of questions to ask, from the first one on; None for all.
        max_tokens: largest number of tokens of an answer.
        threads: number of threads of the runtime.
        progress: called with the model's name, the number of questions asked so far, and their total number.

    Raises:
        VlpackError: the data or an option is not usable.
    """
    questions = read_questions(Path(data))[:limit]
    metric = metric or ("choice" if all(question.choices for question in questions) else "exact")
    if metric not in METRICS:
        raise OptionError(f"Unknown metric '{metric}'.", f"Choose one of {', '.join(METRICS)}.")
    if metric == "choice" and not all(question.choices for question in questions):
        raise OptionError(
            "The metric choice needs choices with every question, and some questions have none.",
            f"Add choices, or give {option('metric', 'exact')}.",
        )
    checkpoint = None
    if reference is not None:  # reports anything missing before the questions are asked
        require()
        checkpoint = resolve(reference).folder
        if gguf_in(checkpoint):
            raise OptionError(
                f"{option('reference')} is in GGUF, and only checkpoints in safetensors can be asked.",
                "Give the folder or Hub id of the model's checkpoint in safetensors.",
            )
    folder = Path(package).expanduser()
    model = Model(folder, threads=threads)

    def ask_with(model: Model) -> Answerer:
        return lambda question: (
            model.generate(
                question.prompt, question.images, max_tokens=max_tokens, sampling=Sampling(temperature=0)
            ).text
        )

    def run(name: str, answer: Answerer) -> Score:
        answers = []
        for number, question in enumerate(questions, 1):
            answers.append(answer(question))
            if progress:
                progress(name, number, len(questions))
        values = [score(metric, question, text) for question, text in zip(questions, answers, strict=True)]
        return Score(name, *interval(values), values, answers)

    scores = [run("package", ask_with(model))]
    if checkpoint is not None:
        scores.append(run("reference", _reference(checkpoint, model, max_tokens)))
    del model
    if without_deepstack:
        with _without_deepstack(folder) as copy:
            scores.append(run("without DeepStack", ask_with(Model(copy, threads=threads))))
    first = scores[0]
    comparisons = [
        Comparison(first.name, other.name, *_bootstrap(np.subtract(first.values, other.values))) for other in scores[1:]
    ]
    return Evaluation(metric, len(questions), scores, comparisons, list(questions))


def read_questions(path: Path) -> list[Question]:
    """Read the questions of a JSONL file.

    Raises:
        InputError: a line is not a question, or one of its images does not exist.
    """
    example = '{"image": "a.png", "question": "…", "answer": "…"}, perhaps with "choices": […]'
    return [question for _, question in read_jsonl(path, lambda entry: _question(entry, path.parent), example)]


def _question(entry: Mapping[str, Any], folder: Path) -> Question:
    images = _strings(entry.get("images", entry.get("image", [])))
    answers, choices = _strings(entry["answer"]), _strings(entry.get("choices", []))
    if not answers:
        raise ValueError("it has no answer")
    if not isinstance(entry["question"], str):
        raise TypeError("its question is not a string")
    paths = [folder / image for image in images]
    if missing := next((path for path in paths if not path.is_file()), None):
        raise ValueError(f"there is no image {missing}")
    if choices:
        right = [_letter(answer, choices) for answer in answers]
        if len(choices) > len(LETTERS) or None in right:
            raise ValueError("its answer is none of its choices")
        answers = [letter for letter in right if letter]
    return Question(entry["question"], tuple(map(str, paths)), tuple(answers), tuple(choices))


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in values):
        raise TypeError("images, answers and choices must be strings or lists of strings")
    return [str(item) for item in values]


def score(metric: str, question: Question, answer: str) -> float:
    """The score of an answer, 0 to 1: the best score over all accepted answers."""
    if metric == "choice":
        return float(_letter(answer, question.choices) in question.answers)
    if metric == "exact":
        return float(_plain(answer) in {_plain(accepted) for accepted in question.answers})
    return max(_anls(answer, accepted) for accepted in question.answers)


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s.]|\.(?!\d)", " ", text.casefold()).split())


def _letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer names, either directly or by the text of the choice; None if it names none."""
    for letter, choice in zip(LETTERS, choices, strict=False):
        if _plain(answer) == _plain(choice):
            return letter
    found = re.match(r"\W*(?:the answer is|answer:?)?\W*([A-Z])(?![\w])", answer.strip(), re.IGNORECASE)
    letter = found[1].upper() if found else ""
    return letter if letter and letter in LETTERS[: len(choices)] else None


def _anls(answer: str, accepted: str) -> float:
    one, two = " ".join(answer.casefold().split()), " ".join(accepted.casefold().split())
    similarity = 1 - _edits(one, two) / max(len(one), len(two), 1)
    return similarity if similarity >= 0.5 else 0.0


def _edits(one: str, two: str) -> int:
    """The Levenshtein distance between two texts."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(two, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def interval(values: Any) -> tuple[float, float, float]:
    """The mean of scores and its 95% confidence interval: Wilson's if all are 0 or 1, otherwise a bootstrap's."""
    array = np.asarray(values, np.float64)
    if not np.isin(array, (0.0, 1.0)).all():
        return _bootstrap(array)
    n, mean, z = len(array), float(np.mean(array)), 1.959964
    center, spread = mean + z * z / (2 * n), z * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return mean, float((center - spread) / (1 + z * z / n)), float((center + spread) / (1 + z * z / n))


def _bootstrap(array: Any) -> tuple[float, float, float]:
    """The mean and its 95% bootstrap interval; the random draws are fixed, so that repeated runs agree."""
    random, n = np.random.default_rng(0), len(array)
    means = [float(array[random.integers(0, n, n)].mean()) for _ in range(2000)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.mean(array)), float(low), float(high)


def _reference(folder: Path, model: Model, max_tokens: int) -> Answerer:
    """An answerer that asks the checkpoint in transformers, with the package's own prompts and pixels."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, config.architectures[0])
        loaded = kind.from_pretrained(folder, dtype=torch.float32).eval()
    except (ImportError, OSError, ValueError, AttributeError, TypeError) as error:  # a format's library may be missing
        raise VerifyError(f"transformers cannot load {folder}: {str(error).splitlines()[0]}") from None
    image_token = model.config["model"].get("image_token_id")

    def answer(question: Question) -> str:
        arrays = model.prompt(question.prompt, question.images).named_arrays()
        ids = torch.tensor(arrays["input_ids"]).long()
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "pixel_values" in arrays:
            arguments |= {name: torch.tensor(arrays[name]) for name in ("pixel_values", "image_grid_thw")}
            arguments["mm_token_type_ids"] = torch.eq(ids, image_token).int()
        out = loaded.generate(**arguments, do_sample=False, max_new_tokens=max_tokens)
        return model.tokenizer.decode(out[0, ids.shape[1] :].tolist())

    return answer


@contextmanager
def _without_deepstack(folder: Path) -> Iterator[Path]:
    """A temporary copy of the package whose embedding graph sets DeepStack's features to zero; weights are not copied.

    Raises:
        OptionError: the package has no DeepStack.
    """
    import onnx_ir as ir

    graph = ir.load(folder / "embedding.onnx") if (folder / "embedding.onnx").is_file() else None
    channel = next((value for value in graph.graph.outputs if value.name == CHANNEL), None) if graph else None
    if graph is None or channel is None:
        raise OptionError(f"{folder} has no DeepStack.", f"Leave out {option('without_deepstack')}.")
    with _folder_beside(folder) as temporary:
        copy = Path(temporary) / "package"
        copy.mkdir()
        for path in folder.iterdir():
            if path.name not in ("vlpack.json", "embedding.onnx"):  # these two are written below
                _link_or_copy(path, copy / path.name)
        zero = ir.tensor(np.zeros(1, channel.dtype.numpy()), name="no_deepstack")  # type: ignore[union-attr]
        factor = ir.Value(name="no_deepstack", const_value=zero, shape=ir.Shape([1]), type=channel.type)
        graph.graph.register_initializer(factor)
        product = ir.Value(name="silenced", shape=channel.shape, type=channel.type)
        channel.name, product.name = "with_deepstack", CHANNEL
        graph.graph.append(ir.node("Mul", [channel, factor], outputs=[product]))
        graph.graph.outputs[list(graph.graph.outputs).index(channel)] = product
        (copy / "embedding.onnx").write_bytes(ir.to_proto(graph).SerializeToString())
        manifest = read_manifest(folder)
        manifest["files"]["embedding.onnx"]["bytes"] = (copy / "embedding.onnx").stat().st_size
        (copy / "vlpack.json").write_text(json.dumps(manifest), encoding="utf-8")
        yield copy


@contextmanager
def _folder_beside(folder: Path) -> Iterator[str]:
    """A temporary folder, if possible on the package's disk so that files can be hard links."""
    try:
        temporary = tempfile.TemporaryDirectory(prefix=".vlpack-eval-", dir=folder.resolve().parent)
    except OSError:
        temporary = tempfile.TemporaryDirectory(prefix="vlpack-eval-")
    with temporary as name:
        yield name


def _link_or_copy(path: Path, place: Path) -> None:
    """Make a hard link, or a copy if the disk has none; symbolic links of a package never lead outside it."""
    try:
        os.link(path.resolve(), place)
    except OSError:
        shutil.copyfile(path, place)
