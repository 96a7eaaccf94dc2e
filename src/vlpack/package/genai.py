"""Reads values of a package's ``genai_config.json``."""

from __future__ import annotations

from typing import Any


def eos_ids(config: dict[str, Any]) -> set[int]:
    """Ids of the tokens that end an answer, from a parsed genai_config.json."""
    eos = config["model"]["eos_token_id"]
    return set(eos) if isinstance(eos, list) else {eos}


def keeps_states(config: dict[str, Any]) -> bool:
    """Whether some layers keep a state instead of keys and values, from a parsed genai_config.json.

    A state cannot be taken back to an earlier token.
    """
    return "past_recurrent_names" in config["model"].get("decoder", {}).get("inputs", {})
