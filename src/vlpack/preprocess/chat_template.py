"""Finds a checkpoint's chat template and renders it as transformers does, with bounds on memory and time.

The reference is transformers/utils/chat_template_utils.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlpack.errors import CheckpointError, InputError
from vlpack.preprocess.known_templates import is_known
from vlpack.preprocess.settings_folder import SettingsFolder
from vlpack.preprocess.template_process import TemplateProcess
from vlpack.preprocess.template_sandbox import BrokenTemplateError, RefusedTemplateError, StoppedTemplateError, Template

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

OPEN, CLOSE = "<think>", "</think>"
"""The tags around the reasoning of a thinking model, in its answers and in the templates of such models."""


MAX_MESSAGE_CHARACTERS = 12 * 2**20
"""Maximum characters of a conversation. The limit for a rendered prompt is higher, so that a long text is reported as
too long and not as a template that grows without end."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: jinja source text.
        special_tokens: variables such as bos_token and eos_token that the template may use.
        where: name of the template's file, for error messages.
        isolated: whether to render in a separate process whose memory and time are bounded. None isolates all
            templates but the reviewed ones in `vlpack.preprocess.known_templates`; rendering in this process is faster.

    Raises:
        CheckpointError: the text is not a template.
    """

    _template: Template | TemplateProcess

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        where: str = "chat template",
        *,
        isolated: bool | None = None,
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self.where = where
        if isolated is None:
            isolated = not is_known(source)
        try:
            self._template = TemplateProcess(source) if isolated else Template(source)
        except (BrokenTemplateError, StoppedTemplateError) as error:
            raise CheckpointError(f"{where} is not a usable jinja template: {error}.") from error

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str] | SettingsFolder) -> ChatTemplate:
        """Reads chat_template.jinja, else chat_template.json, else `chat_template` of tokenizer_config.json.

        Where the file has several named templates, the one named "default" is used.

        Raises:
            CheckpointError: there is no template, or it cannot be used.
        """
        root = SettingsFolder.of(folder)
        name = "tokenizer_config.json"
        config = root.json(name) if root.has(name) else {}
        candidates: list[tuple[Path, Any]] = [(root / name, config.get("chat_template"))]
        if root.has(name := "chat_template.jinja"):
            candidates.insert(0, (root / name, root.text(name)))
        elif root.has(name := "chat_template.json"):
            candidates.insert(0, (root / name, root.json(name).get("chat_template")))
        for file, template in candidates:
            if template is not None:
                return cls(_default_template(template, file), _special_tokens(config), str(file))
        raise CheckpointError(
            f"{folder} has no chat template: no chat_template.jinja, chat_template.json, or 'chat_template' in "
            "tokenizer_config.json.",
            hint="Copy chat_template.jinja from the model's page on the Hugging Face Hub.",
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: dictionaries with `role` and `content`. Values that are not plain JSON become inert placeholders;
                keys whose value is None are dropped.
            add_generation_prompt: whether to end with the header of the assistant's answer.
            tools: JSON schemas of the functions that the model may call.
            **variables: other variables that the template understands, such as enable_thinking.

        Raises:
            InputError: the messages are longer than `MAX_MESSAGE_CHARACTERS`, or the template refuses them (by calling
                raise_exception) or fails on them.
            CheckpointError: the template exceeds the bounds of `vlpack.preprocess.template_sandbox`.
        """
        values = {
            **self.special_tokens,
            "documents": None,
            **variables,
            "messages": [_plain_message(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        plain = _plain(values)
        if (length := _characters(plain["messages"])) > MAX_MESSAGE_CHARACTERS:
            raise InputError(
                f"The messages have {length} characters; more than {MAX_MESSAGE_CHARACTERS} are not accepted.",
                "No supported model has a context for so much text: shorten the messages.",
            )
        try:
            return self._template.render(plain)
        except (StoppedTemplateError, BrokenTemplateError) as error:
            raise CheckpointError(
                f"{self.where} was stopped: {error}.",
                hint="A chat template is a program from the checkpoint's author; check where it comes from.",
            ) from error
        except RefusedTemplateError as error:
            raise InputError(f"{self.where} cannot render these messages: {error}.") from error


def _default_template(template: object, file: Path) -> str:
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default", named)
    elif isinstance(template, dict):
        template = template.get("default", template)
    if not isinstance(template, str):
        raise CheckpointError(f"The 'chat_template' in {file} is neither a text nor a set with one named 'default'.")
    return template


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):  # a serialized AddedToken
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in message.items() if value is not None}
    # Three keys for reasoning are in use; like transformers, give the template the first two.
    reasoning = next((plain[key] for key in _REASONING_KEYS if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _characters(value: Any) -> int:
    """Total number of characters of all texts in a plain JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _plain(value: Any) -> Any:
    """A copy made of plain JSON types only: a template must not reach methods of images, arrays or other objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"
