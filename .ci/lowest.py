"""Prints pip constraints that pin every direct dependency of pyproject.toml to the lowest version it allows."""

import re
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for dependency in project["dependencies"]:
    name, version = re.match(r"([\w.-]+)>=([\w.]+)", dependency).groups()
    print(f"{name}=={version}")
