"""Verification: compares a package with the model it was built from, stage by stage, against live transformers."""

from __future__ import annotations

from vlpack.verification.run import verify

__all__ = ["verify"]
