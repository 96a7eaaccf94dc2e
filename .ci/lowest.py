"""Prints pip constraints that pin direct dependencies of pyproject.toml, and of extras, to the lowest version allowed.

Usage: python .ci/lowest.py [EXTRA ...]
"""

import re
import sys
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = [dependency for extra in sys.argv[1:] for dependency in project["optional-dependencies"][extra]]
for dependency in project["dependencies"] + extras:
    name, version = re.match(r"([\w.-]+)>=([\w.]+)", dependency).groups()
    print(f"{name}=={version}")
