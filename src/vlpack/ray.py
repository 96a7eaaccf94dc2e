"""`Predictor`, a class with which Ray Data answers a question about every row of a data set, on any number of machines.

    ds = ray.data.read_parquet("s3://…")
    ds = ds.map_batches(
        vlpack.ray.Predictor, fn_constructor_args=("PACKAGE",), fn_constructor_kwargs={"prompt": "Read the text."},
        concurrency=4, num_cpus=8, batch_size=64,
    )
    ds.write_parquet("s3://…")

Install Ray with ``pip install 'vlpack[ray]'``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.bulk.answering import Answerer, EngineOptions
from vlpack.bulk.cluster import require_ray
from vlpack.bulk.form import Rows
from vlpack.bulk.media import Place
from vlpack.bulk.node_package import node_package
from vlpack.bulk.question import Question
from vlpack.bulk.row import RESULT, Item, Task
from vlpack.checkpoint.hub import is_folder, is_hub_id
from vlpack.preprocess import VideoOptions
from vlpack.preprocess.literal import CONTROL
from vlpack.runtime.sampling import Sampling

Batch = dict[str, Any]
"""A batch of Ray Data: name of a column → array of its values."""

RowFunction = Callable[[dict[str, Any]], dict[str, Any]]
"""A function that takes a row and returns a row."""


class Predictor:
    """A class for ``ray.data.Dataset.map_batches`` that answers a question about every row.

    Rows have the columns that ``vlpack batch`` takes: ``messages``, or ``image``, ``images``, ``video`` and ``prompt``;
    images are bytes, paths, or the arrays of ``ray.data.read_images``. The result has all columns of the row, and
    ``generated_text``, ``finish_reason``, ``prompt_tokens``, ``image_tokens``, ``answer_tokens``, times in seconds, and
    ``error``, which is None unless the row could not be answered.

    Args:
        package: folder of the package on every machine, its URI for pyarrow (``s3://…``, copied once to every
            machine), or a Hub id (built once on every machine).
        prompt: question about the rows that have none of their own.
        template: question with names of columns in braces.
        system: system prompt.
        schema: JSON schema that every answer matches.
        regex: regular expression that every answer matches as a whole.
        choices: texts of which every answer is one.
        max_tokens: largest number of tokens of an answer; None for 512.
        sampling: sampling parameters; None for the package's.
        special_tokens: how special tokens that are written in texts are encoded: as ``control`` tokens, or as plain
            ``text``.
        image_column: column with the image of a row; None for ``image`` or ``images``.
        min_pixels: smallest area of an image in pixels; None for the package's.
        max_pixels: largest area of an image in pixels; None for the package's.
        video_options: sampling of the frames of videos.
        files: folder in which all files that rows name must be; None if rows name no files.
        allow_urls: whether http(s) URLs in rows are downloaded.
        allow_private_urls: whether these URLs may lead to this machine or its network.
        slots: number of rows that are answered at a time.
        context: number of tokens of prompt and answer together; None for what the model and memory allow.
        threads: number of threads; None for the CPUs that Ray has assigned.
        preprocess: function that is applied to every row before it is answered.
        postprocess: function that is applied to every row of the result.

    Raises:
        OptionError: an option is wrong, or Ray is not installed.
        VlpackError: the package cannot be loaded.
    """

    def __init__(
        self,
        package: str | os.PathLike[str],
        *,
        prompt: str | None = None,
        template: str | None = None,
        system: str | None = None,
        schema: Mapping[str, Any] | bool | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        special_tokens: str = CONTROL,
        image_column: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_options: VideoOptions | None = None,
        files: str | None = None,
        allow_urls: bool = False,
        allow_private_urls: bool = False,
        slots: int = 8,
        context: int | None = None,
        threads: int | None = None,
        preprocess: RowFunction | None = None,
        postprocess: RowFunction | None = None,
    ) -> None:
        question = Question(
            prompt=prompt,
            template=template,
            system=system,
            schema=schema,
            regex=regex,
            choices=choices,
            max_tokens=max_tokens,
            sampling=sampling or Sampling(),
            special_tokens=special_tokens,
            image_column=image_column,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            video_options=video_options or VideoOptions(),
        )
        question.check_constraint()
        form = Rows(question, Place(files, allow_urls, allow_private_urls))
        options = EngineOptions(slots, context, threads or assigned_cpus())
        self._answerer = Answerer(package_on_node(package), question, form, options)
        self._before, self._after = preprocess, postprocess

    def __call__(self, batch: Batch) -> Batch:
        """Answers the rows of a batch and returns them with the columns of the answers."""
        rows = rows_of(batch)
        given = rows if self._before is None else [dict(self._before(row)) for row in rows]
        tasks = [Task(place, str(place), Item(row, f"row {place}")) for place, row in enumerate(given)]
        made: list[dict[str, Any]] = [{} for _ in tasks]
        for task, found in self._answerer(tasks):
            answer = {name: found[name] for name in RESULT}
            made[task.place] = {"generated_text": answer.pop("answer"), **answer}
        if self._before is None and self._after is None:  # columns keep their types
            return batch | {name: _column([row[name] for row in made]) for name in (made[0] if made else ())}
        whole = [{**row, **answer} for row, answer in zip(given, made, strict=True)]
        if self._after is not None:
            whole = [dict(self._after(row)) for row in whole]
        names = dict.fromkeys(name for row in whole for name in row)
        return {name: _column([row.get(name) for row in whole]) for name in names}


def rows_of(batch: Batch) -> list[dict[str, Any]]:
    """The rows of a batch as JSON-like data and bytes; arrays of pixels become images in the format PPM."""
    columns = {name: [_plain(value) for value in values] for name, values in batch.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _plain(value: Any) -> Any:
    """A value of a batch as JSON-like data and bytes."""
    if isinstance(value, np.ndarray):
        if value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3:
            return b"P6 %d %d 255\n" % (value.shape[1], value.shape[0]) + np.ascontiguousarray(value).tobytes()
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _column(values: list[Any]) -> npt.NDArray[Any]:
    """A column of a batch, which may have None and values of any type."""
    made = np.empty(len(values), object)
    for place, value in enumerate(values):  # assigning all at once would make lists of equal length a matrix
        made[place] = value
    return made


def assigned_cpus() -> int | None:
    """The number of CPUs that Ray has assigned to this actor, at least 1; None outside of Ray."""
    ray = require_ray()
    if not ray.is_initialized():
        return None
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


def package_on_node(package: str | os.PathLike[str]) -> Path:
    """The folder of a package on this machine; it is copied or built here once, whatever the number of actors.

    Args:
        package: folder, URI for pyarrow, or Hub id. A copy is made again if the package at the URI has changed.

    Raises:
        PackageError: the package cannot be copied, or the copy is not complete.
        VlpackError: the package cannot be built.
    """
    given = os.fspath(package)
    if is_hub_id(given) and not is_folder(given):
        from vlpack.builder import build

        return build(given).folder
    return node_package(given)
