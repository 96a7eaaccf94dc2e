"""What a package's genai_config.json says."""

from __future__ import annotations

from typing import Any


def eos_ids(config: dict[str, Any]) -> set[int]:
    """The tokens that end an answer, by a genai_config.json."""
    eos = config["model"]["eos_token_id"]
    return set(eos) if isinstance(eos, list) else {eos}
