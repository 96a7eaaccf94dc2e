"""The counters of an engine: how many tokens it computed, and in how many calls of the decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Counts of what an engine has computed since it was made.

    Attributes:
        prompt_tokens: number of prompt tokens that were computed.
        reused_tokens: number of prompt tokens that were not computed, because slots held them already.
        answer_tokens: number of tokens that were chosen for answers.
        steps: number of decoder calls that computed next tokens of answers.
        chunks: number of decoder calls that processed parts of prompts.
        idle_rows: number of rows that steps computed for slots without a running answer.
        drafted_tokens: number of draft tokens that steps have checked.
        accepted_tokens: number of draft tokens that were accepted.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    chunks: int = 0
    idle_rows: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
