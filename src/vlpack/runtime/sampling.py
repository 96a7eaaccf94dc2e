"""Settings for how the next token of an answer is chosen."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vlpack.errors import OptionError, option


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of an answer. None stands for the package's own generation settings.

    Args:
        temperature: randomness of the choice; 0 always takes the most likely token.
        top_k: number of most likely tokens to choose from.
        top_p: share of the probability, from 0 to 1, that the most likely tokens to choose from have together.
        repetition_penalty: factor above 1 that makes tokens that have occurred less likely.
        seed: seed of the random numbers; the same seed gives the same answer.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def search_options(self) -> dict[str, Any]:
        """The settings as search options of onnxruntime-genai.

        Raises:
            OptionError: a value is out of range, or top_k or top_p is given with temperature 0.
        """
        check_number("temperature", self.temperature, 0, 100)
        check_number("top_k", self.top_k, 1, 2**31 - 1, whole=True)
        check_number("top_p", self.top_p, 1e-9, 1)
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        check_number("seed", self.seed, 0, 2**31 - 1, whole=True)
        options: dict[str, Any] = {}
        if self.temperature == 0:
            if self.top_k is not None or self.top_p is not None:
                raise OptionError(
                    f"{option('top_k')} and {option('top_p')} have no effect with {option('temperature', 0)}, which "
                    "always takes the most likely token.",
                    "Leave them out, or give a higher temperature.",
                )
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
    """The sampling settings of a call, which takes either a `Sampling` or single settings.

    Args:
        sampling: settings given as a whole, or None.
        single: settings that were given one by one.

    Raises:
        OptionError: both are given.
    """
    if single == Sampling():
        return sampling
    if sampling is not None:
        names = [field.name for field in fields(single) if getattr(single, field.name) is not None]
        raise OptionError(f"sampling and {', '.join(names)} are both given.", "Put all settings into one of them.")
    return single


def check_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    """Raises an OptionError if an option is not None and not a number from ``low`` to ``high``.

    Args:
        name: name of the option as a keyword argument.
        value: value of the option.
        low: smallest allowed value.
        high: largest allowed value.
        whole: whether the value must be an integer.
    """
    if value is None:
        return
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise OptionError(f"{option(name)} is {value!r}; it must be {kind} from {low:.10g} to {high:.10g}.")
