"""Checks the description that PyPI would show of the installed vlpack: it exists, and no link in it is relative."""

import re
import sys
from importlib.metadata import metadata

description = metadata("vlpack").get_payload()
relative = re.findall(r"\]\((?!https?://|#)[^)]*\)", str(description))
if "# vlpack" not in str(description) or relative:
    sys.exit(f"The description is missing, or has relative links: {relative}")
print(f"The description has {len(str(description))} characters and no relative links.")
