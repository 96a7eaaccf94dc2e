"""The documentation agrees with the program: the command-line reference, links, and the description on PyPI."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlpack.cli import app as cli

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and mkdocs make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text)).strip("-")


def test_the_reference_has_every_option_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "docs_hooks", hooks)  # dataclasses look up their module in sys.modules
    spec.loader.exec_module(hooks)
    sections = re.split(r"^## vlpack ", hooks.reference(cli.app), flags=re.MULTILINE)[1:]
    by_command = {section.split("\n", 1)[0]: section for section in sections}
    listed = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "200"}).output
    assert set(by_command) == {name for name in by_command if f" {name} " in listed}
    for name, section in by_command.items():
        shown = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "200"}).output
        options = set(re.findall(r"(?<![\w-])-{1,2}[a-z][\w-]*", re.sub(r"\x1b\[[\d;]*m", "", shown)))
        documented = set(re.findall(r"(?<![\w-])-{1,2}[a-z][\w-]*", section))
        assert options - {"-h", "--help"} <= documented, name
    assert len(by_command) == len(cli.app.registered_commands) >= 11


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """Links in the repository have a target; mkdocs checks those of the site. Some pages are made by its hook."""
    generated = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if path.parent == ROOT / "docs" and path.name in generated:
            path = ROOT / generated[path.name]
        if path == ROOT / "docs" / "cli.md":
            continue
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_the_description_on_pypi_has_no_relative_link() -> None:
    pytest.importorskip("hatchling")
    description = runpy.run_path(str(ROOT / "hatch_build.py"))["description"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = re.compile(r"\]\((?!https?://|#)")
    assert relative.search(readme)
    assert not relative.search(description(readme, None))
    assert "![" not in description(readme, None)
    address = "https://example.org/owner/name/{kind}/0123abc/"
    absolute = description(readme, address)
    assert not relative.search(absolute)
    assert "](https://example.org/owner/name/raw/0123abc/docs/" in absolute
    assert "](https://example.org/owner/name/blob/0123abc/docs/" in absolute


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_the_documentation_names_are_there(page: Path) -> None:
    """Files named in the documentation exist, as paths below src/vlpack or the root, or as names without a folder."""
    package = ROOT / "src" / "vlpack"
    sources = {path.relative_to(package).as_posix() for path in package.rglob("*.*")}
    names = {path.name for folder in (package, ROOT / "tests", ROOT / "benchmarks") for path in folder.rglob("*.*")}
    unknown = []
    for name in re.findall(r"`([\w./-]+\.(?:py|j2|c))`", page.read_text(encoding="utf-8")):
        known = name in sources or name in names or (ROOT / name).is_file()
        if not known and not name.startswith(("modeling_", "configuration_")):  # files of transformers
            unknown.append(name)
    assert not unknown
