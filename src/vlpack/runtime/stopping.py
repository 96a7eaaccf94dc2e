"""Texts at which an answer ends, such as a line's end."""

from __future__ import annotations

from collections.abc import Sequence

from vlpack.errors import OptionError


class StopTexts:
    """Cuts an answer's text, as it comes, before the first of some texts.

    What may be the beginning of one is held back until that is clear.

    Args:
        stops: the texts, or one.

    Raises:
        OptionError: they are no texts, or one is empty.
    """

    def __init__(self, stops: str | Sequence[str] = ()) -> None:
        self._stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(self._stops, (list, tuple)) or not all(isinstance(s, str) and s for s in self._stops):
            raise OptionError(f"stop is {stops!r}; it must be a list of texts that are not empty.", 'stop=["\\n"]')
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is certain now, and whether the answer ends with it."""
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        begun = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        certain = len(text) - max(begun, default=0)
        self._held = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """What was held back, where the answer ends otherwise."""
        text, self._held = self._held, ""
        return text
