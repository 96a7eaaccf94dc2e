"""Whether a package is the model that it was made from, stage by stage against live transformers."""

from __future__ import annotations

from vlpack.verification.run import verify

__all__ = ["verify"]
