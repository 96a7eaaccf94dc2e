"""Reads the settings files of sentence-transformers: a model's task, its pooling or scoring step, and its prompts.

``modules.json`` lists the transformer and the steps after it, each with a folder for its settings: ``Pooling`` and
``Normalize`` make an embedding model, ``LogitScore`` a reranker. ``config_sentence_transformers.json`` holds prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlpack.checkpoint.files import check_plain_name, locate, read_json, read_json_list
from vlpack.errors import CheckpointError, option

if TYPE_CHECKING:
    from vlpack.checkpoint.checkpoint import Checkpoint

MODULES = "modules.json"
_SCORES = ("LogitScore", "CausalScoreHead")
_GENERATE = f"Build with {option('task', 'generate')} to get the model without these steps."


class SentenceFiles:
    """The sentence-transformers settings of one checkpoint, read and checked. Most checkpoints have none.

    Attributes:
        task: ``embedding`` or ``reranker``; None without a modules.json.

    Raises:
        CheckpointError: a file is damaged, or asks for steps that vlpack does not compute.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.folder
        self._checkpoint = checkpoint
        self._score: dict[str, Any] = {}
        self.task: str | None = None
        self._read()

    def _read(self) -> None:
        modules = _modules(self._folder)
        kinds = [kind for kind, _ in modules]
        if not modules:
            return
        if kinds == ["Transformer", "Pooling", "Normalize"]:
            self.task = "embedding"
            self._check_pooling(modules[1][1])
        elif len(kinds) == 2 and kinds[0] == "Transformer" and kinds[1] in _SCORES:
            self.task = "reranker"
            # one published model lacks these settings; it uses the usual tokens
            self._score = self._settings(modules[1][1]) or {}
        else:
            raise CheckpointError(
                f"{self._folder / MODULES}: the steps {', '.join(kinds)} are not supported.",
                f"Supported: Transformer, Pooling, Normalize; or Transformer, LogitScore. {_GENERATE}",
            )

    def _settings(self, path: str) -> dict[str, Any] | None:
        """The ``config.json`` of a step's folder; None if there is none."""
        check_plain_name(path, str(self._folder / MODULES))
        target = locate(self._folder, f"{path}/config.json")
        return None if target is None else read_json(self._folder / path / "config.json", target)

    def _check_pooling(self, path: str) -> None:
        pooling = self._settings(path)
        if pooling is None:
            raise CheckpointError(
                f"{self._folder} lacks {path}/config.json, which describes the pooling.",
                f"Download the checkpoint with its subfolders, or build with {option('task', 'generate')}.",
            )
        # version 5 names one mode or a list of modes; older versions have a flag for each mode
        modes = pooling.get("pooling_mode")
        if modes is None:
            prefix = "pooling_mode_"
            modes = [name.removeprefix(prefix) for name, on in pooling.items() if name.startswith(prefix) and on]
        if modes not in ("lasttoken", ["lasttoken"]):
            raise CheckpointError(
                f"{self._folder / path / 'config.json'}: pooling by {modes} is not supported; vlpack pools the last "
                "token.",
                _GENERATE,
            )

    def check_answers(self, yes: int, no: int) -> None:
        """Checks that the reranker's score compares the tokens ``yes`` and ``no``, given by their ids.

        Raises:
            CheckpointError: the checkpoint's score uses other tokens.
        """
        named = {"true_token_id": yes, "false_token_id": no}
        for name, token_id in named.items():
            if name in self._score and self._score[name] != token_id:
                raise CheckpointError(
                    f"{self._folder / MODULES}: the score has {name} {self._score[name]}; vlpack supports only "
                    f"the tokens yes ({yes}) and no ({no}).",
                    _GENERATE,
                )

    def prompts(self) -> tuple[dict[str, str], str | None]:
        """The prompts by name, and the name of the default prompt, or None."""
        config = self._checkpoint.json("config_sentence_transformers.json") or {}
        prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
        where = self._folder / "config_sentence_transformers.json"
        if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
            raise CheckpointError(f"{where}: 'prompts' must be an object whose values are texts.")
        if default is not None and default not in prompts:
            raise CheckpointError(f"{where}: default_prompt_name is {default!r}, which is not one of its prompts.")
        return dict(prompts), default


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Class name and folder of every step in modules.json; an empty list if there is no such file."""
    target = locate(folder, MODULES)
    if target is None:
        return []
    steps = []
    for item in read_json_list(folder / MODULES, target):
        kind, path = (item.get("type"), item.get("path")) if isinstance(item, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise CheckpointError(f"{folder / MODULES}: every step must be an object with a 'type' and a 'path'.")
        steps.append((kind.rpartition(".")[2], path))
    return steps
