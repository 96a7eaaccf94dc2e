"""Chat templates that vlpack's authors have reviewed and found harmless: they need no separate process.

They are listed by the SHA-256 of their text without surrounding white space.
"""

from __future__ import annotations

import hashlib

KNOWN = frozenset(
    {
        "fe2842ba36a1e08679f42ff3ec9f0ec9019cb0cc321ac6bc9ff0cde3712fea86",  # the checkpoint that ships with vlpack
    }
)


def is_known(source: str) -> bool:
    """Whether a template's source text is one of the reviewed templates."""
    return hashlib.sha256(source.strip().encode("utf-8", "surrogatepass")).hexdigest() in KNOWN
