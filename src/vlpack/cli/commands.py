"""Command classes whose help and errors avoid the names of Python's types."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from vlpack.errors import OptionError


def _without_types(params: list[Any]) -> list[Any]:
    """Parameters whose help omits types that say nothing: ``bool`` of a flag, ``list[str]`` of named arguments."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
        elif param.param_type_name == "argument" and param.nargs != 1:
            param.display_type_rich = lambda ctx: ""
    return params


class Command(TyperCommand):
    """A command such as ``vlpack build``."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's options and arguments, including those of all commands."""
        return _without_types(super().get_params(ctx))


class ImageCommand(Command):
    """A command that takes images. If several are given after one ``--image``, its error says how to give them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the arguments and returns those that are left.

        Raises:
            OptionError: there are surplus arguments, and the command was given images or videos.
        """
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # a class of typer or of click, depending on typer's version
            message = str(getattr(error, "message", ""))
            if "unexpected extra argument" in message and {"--image", "--video"} & set(given):
                from vlpack.cli.image_arguments import REPEAT

                raise OptionError(f"{message}.", REPEAT) from None
            raise


class Group(TyperGroup):
    """The command ``vlpack``, with all commands below it."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options of ``vlpack`` itself."""
        return _without_types(super().get_params(ctx))
