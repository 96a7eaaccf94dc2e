"""What an engine has computed, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """What the engine has computed.

    Attributes:
        prompt_tokens: of prompts, computed.
        reused_tokens: of prompts that slots held already.
        answer_tokens: chosen.
        steps: calls of the decoder for the next token of one or more answers.
        chunks: calls of the decoder for parts of prompts.
        idle_rows: rows in those steps that nobody decoded.
        drafted_tokens: guesses of answers' tokens that steps have judged.
        accepted_tokens: of these, those that were right.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    chunks: int = 0
    idle_rows: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
