"""Chat templates that were read by vlpack's authors and do nothing odd: they need no process of their own.

Hashes are of the text without the white space around it.
"""

from __future__ import annotations

import hashlib

KNOWN = frozenset(
    {
        "fe2842ba36a1e08679f42ff3ec9f0ec9019cb0cc321ac6bc9ff0cde3712fea86",  # the checkpoint that ships with vlpack
    }
)


def is_known(source: str) -> bool:
    """Whether a template is one of the known ones."""
    return hashlib.sha256(source.strip().encode("utf-8", "surrogatepass")).hexdigest() in KNOWN
