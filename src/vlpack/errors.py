"""The errors that vlpack shows to people: what is wrong, where, and what to do."""

from __future__ import annotations


class VlpackError(Exception):
    """A mistake that the user can mend; the command line prints it as one sentence and exits with 2.

    Args:
        message: what is wrong and where (file, tensor, option), as a sentence.
        hint: what to do about it, as a sentence; printed on a line of its own.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


class CheckpointError(VlpackError):
    """The checkpoint is missing, damaged, unsafe or of an unsupported kind."""


class OptionError(VlpackError):
    """An option is unknown, contradictory or not offered for this combination."""


class PackageError(VlpackError):
    """A built package is incomplete, damaged or not loadable by this runtime."""


class InputError(VlpackError):
    """An image, prompt or message cannot be used."""


class VerifyError(VlpackError):
    """A verification that cannot be done."""


class VlpackWarning(UserWarning):
    """Something that works, and not as well as it could; the text says what to do."""
