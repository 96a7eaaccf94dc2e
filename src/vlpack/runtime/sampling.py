"""How the next token of an answer is chosen, in the words of users and of the runtime."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vlpack.errors import OptionError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; None leaves it to the package's generation settings.

    Args:
        temperature: 0 takes the likeliest token always.
        top_k: only the k likeliest.
        top_p: only the likeliest whose probabilities sum to p.
        repetition_penalty: above 1 makes tokens that have occurred less likely.
        seed: the same seed gives the same answer.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def search_options(self) -> dict[str, Any]:
        """As the runtime takes them.

        Raises:
            OptionError: a value is out of its range.
        """
        check_number("temperature", self.temperature, 0, 100)
        check_number("top_k", self.top_k, 1, 2**31 - 1, whole=True)
        check_number("top_p", self.top_p, 1e-9, 1)
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        check_number("seed", self.seed, 0, 2**31 - 1, whole=True)
        options: dict[str, Any] = {}
        if self.temperature == 0:
            if self.top_k is not None or self.top_p is not None:
                raise OptionError("With temperature 0 the likeliest token is taken, so top_k and top_p have no effect.")
            options["do_sample"] = False
        elif self.temperature is not None or self.top_k is not None or self.top_p is not None:
            options["do_sample"] = True
        if self.temperature:
            options["temperature"] = self.temperature
        for name in ("top_k", "top_p", "repetition_penalty"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        if self.seed is not None:
            options["random_seed"] = self.seed
        return options


def sampling_of(sampling: Sampling | None, single: Sampling) -> Sampling | None:
    """How tokens are chosen, given as a whole or by ``single`` settings.

    Raises:
        OptionError: both are given.
    """
    if single == Sampling():
        return sampling
    if sampling is not None:
        names = [field.name for field in fields(single) if getattr(single, field.name) is not None]
        raise OptionError(f"sampling and {', '.join(names)} are both given.", "Give the one or the others.")
    return single


def check_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    """Raises an OptionError where ``value`` is given and no number, or none of the range."""
    if value is None:
        return
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise OptionError(f"{name} is {value!r}; it must be {kind} from {low:.10g} to {high:.10g}.")
