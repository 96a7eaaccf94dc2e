"""Makes pages of the site from other files: the command-line reference, and files of the repository's root.

mkdocs.yml names this file. The pages exist only while the site is built, so none of them can be out of date.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.models import ArgumentInfo, OptionInfo

ROOT = Path(__file__).parents[1]
COPIES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages of the site by files of the repository."""
ELSEWHERE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)?(?:LICENSE|SECURITY\.md|\.ci/run|\.github/[^)]*|(?:examples|benchmarks|src|tests)/[^)]*)\)"
)
"""Links to files that are not pages of the site; only their text is kept."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages; mkdocs calls this when it has found the others."""
    for name, page in COPIES.items():
        files.append(File.generated(config, page, content=as_page((ROOT / name).read_text(encoding="utf-8"))))
    files.append(File.generated(config, "cli.md", content=command_line_reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces a page's links to files of the repository's root by links of the site; called for every page."""
    for name, page in COPIES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    markdown = re.sub(r"<!-- file: (\S+) -->", lambda mark: as_code(ROOT / mark[1]), markdown)
    return ELSEWHERE.sub(r"\1", markdown)


def as_code(file: Path) -> str:
    """A file of the repository as a Markdown code block."""
    language = {".py": "python", ".c": "c"}[file.suffix]
    return f"```{language}\n{file.read_text(encoding='utf-8')}```"


def as_page(text: str) -> str:
    """The text of a file of the repository's root, with its links changed to links of the site."""
    for name, page in COPIES.items():
        text = text.replace(f"]({name}", f"]({page}")
    return ELSEWHERE.sub(r"\1", text).replace("](docs/", "](")


def command_line_reference() -> str:
    """The reference page of the command that is installed as ``vlpack``."""
    (entry,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "vlpack")
    return reference(importlib.import_module(entry.module).app)


def reference(app: typer.Typer) -> str:
    """Every command with its arguments and options, as Markdown.

    They are read from the signatures of the functions behind the commands, which typer reads too.
    """
    lines = [
        "# Command line",
        "",
        "This page is generated from the program. `vlpack COMMAND --help` prints the same. An option whose value is "
        "marked with … can be given several times.",
    ]
    for command in app.registered_commands:
        function = command.callback
        assert function is not None
        name = command.name or function.__name__
        parameters = [Parameter.read(*item) for item in inspect.signature(function, eval_str=True).parameters.items()]
        words = [f"vlpack {name}", *(parameter.in_usage for parameter in parameters), "[OPTIONS]"]
        lines += ["", f"## vlpack {name}", "", one_line(function.__doc__), ""]
        lines += ["```", " ".join(filter(None, words)), "```", ""]
        lines += ["| argument or option | meaning |", "| --- | --- |"]
        lines += [f"| {parameter.spelling} | {parameter.meaning} |" for parameter in parameters]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Parameter:
    """One argument or option of a command.

    Args:
        name: name of the function's parameter.
        kind: type of its value, or of one value if several can be given.
        many: whether several values can be given.
        info: typer's description of the parameter.
        default: default value; `inspect.Parameter.empty` if the parameter is required.
    """

    name: str
    kind: type
    many: bool
    info: ArgumentInfo | OptionInfo
    default: Any

    @classmethod
    def read(cls, name: str, parameter: inspect.Parameter) -> Parameter:
        """Reads a function's parameter that is annotated with ``Annotated[TYPE, typer.Option(…)]`` or ``Argument``."""
        kind, info = get_args(parameter.annotation)
        (kind,) = {*(get_args(kind) if isinstance(kind, UnionType) else (kind,))} - {NoneType}
        many = get_origin(kind) is list
        return cls(name, get_args(kind)[0] if many else kind, many, info, parameter.default)

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def names(self) -> Sequence[str]:
        """The names of an option; typer keeps the first of the given names in the field for the default."""
        first = self.info.default
        given = [*([first] if isinstance(first, str) else []), *(self.info.param_decls or ())]
        return [name for names in given for name in names.split("/")] or [f"--{self.name.replace('_', '-')}"]

    @property
    def value(self) -> str:
        """The placeholder of the value; empty for a switch."""
        if self.kind is bool:
            return ""
        kinds = {int: "NUMBER", float: "NUMBER", Path: "PATH"}
        text = self.info.metavar or (
            self.name.upper() if isinstance(self.info, ArgumentInfo) else kinds.get(self.kind, "TEXT")
        )
        return text if not self.many or "…" in text else f"{text} …"

    @property
    def in_usage(self) -> str:
        """The form of a parameter in the usage line; empty for optional options."""
        if isinstance(self.info, ArgumentInfo):
            return self.value if self.required else f"[{self.value}]"
        return f"{self.names[0]} {self.value}" if self.required else ""

    @property
    def spelling(self) -> str:
        """The spelling of a parameter on the command line, as Markdown."""
        names = self.names if isinstance(self.info, OptionInfo) else [""]
        shown = (" ".join(filter(None, [name, self.value])) for name in names)
        return "<br>".join(f"`{text}`" for text in shown)

    @property
    def meaning(self) -> str:
        """The help of a parameter as Markdown, with the default if the help does not mention it."""
        text = one_line(self.info.help)
        if self.required:
            text += " Required."
        elif self.kind is not bool and self.default is not None and "default" not in text:
            text += f" (default: {self.default})"
        return text.replace("|", "\\|")


def one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("<", "&lt;")
