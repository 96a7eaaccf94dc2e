"""What sentence-transformers' files beside a checkpoint say: its task, how it pools or scores, and its prompts.

``modules.json`` lists the steps after the transformer, each with a folder for its settings: ``Pooling`` and
``Normalize`` make an embedding model, ``LogitScore`` a reranker. ``config_sentence_transformers.json`` has prompts.
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
_GENERATE = f"Build it with {option('task', 'generate')} to have the model without these steps."


class SentenceFiles:
    """The files of one checkpoint, read and checked; most checkpoints have none.

    Attributes:
        task: ``embedding`` or ``reranker``; None where there is no modules.json.

    Raises:
        CheckpointError: a file is damaged, or asks for steps that vlpack would not compute.
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
            # the settings of one published model are missing: its tokens are then the usual ones
            self._score = self._settings(modules[1][1]) or {}
        else:
            raise CheckpointError(
                f"{self._folder / MODULES}: the steps {', '.join(kinds)} are not supported.",
                f"Supported: Transformer, Pooling, Normalize; or Transformer, LogitScore. {_GENERATE}",
            )

    def _settings(self, path: str) -> dict[str, Any] | None:
        """``config.json`` of a step's folder."""
        check_plain_name(path, str(self._folder / MODULES))
        target = locate(self._folder, f"{path}/config.json")
        return None if target is None else read_json(self._folder / path / "config.json", target)

    def _check_pooling(self, path: str) -> None:
        pooling = self._settings(path)
        if pooling is None:
            raise CheckpointError(
                f"{self._folder} lacks {path}/config.json, which says how the model pools.",
                f"Download the checkpoint with its subfolders, or give {option('task', 'generate')}.",
            )
        # version 5 names one mode (or several), older ones have a flag for each
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
        """The checkpoint's score is that of the tokens ``yes`` against ``no``.

        Raises:
            CheckpointError: it names others.
        """
        named = {"true_token_id": yes, "false_token_id": no}
        for name, token_id in named.items():
            if name in self._score and self._score[name] != token_id:
                raise CheckpointError(
                    f"{self._folder / MODULES}: the score has {name} {self._score[name]}; vlpack's is of the tokens "
                    f"yes ({yes}) and no ({no}).",
                    _GENERATE,
                )

    def prompts(self) -> tuple[dict[str, str], str | None]:
        """Named prompts, and the name of the one that is used where none is chosen."""
        config = self._checkpoint.json("config_sentence_transformers.json") or {}
        prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
        where = self._folder / "config_sentence_transformers.json"
        if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
            raise CheckpointError(f"{where}: 'prompts' must be an object of texts.")
        if default is not None and default not in prompts:
            raise CheckpointError(f"{where}: default_prompt_name is {default!r}, which is none of its prompts.")
        return dict(prompts), default


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Class and folder of every step; the file is a list, which the reader of JSON objects does not take."""
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
