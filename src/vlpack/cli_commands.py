"""Commands whose help and errors speak of what a user gives, and not of Python's types."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from vlpack.errors import OptionError


def _without_types(params: list[Any]) -> list[Any]:
    """Parameters whose help has no type where it says nothing: ``bool`` of a flag, ``list[str]`` of named arguments."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
        elif param.param_type_name == "argument" and param.nargs != 1:
            param.display_type_rich = lambda ctx: ""
    return params


class Command(TyperCommand):
    """A verb."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its options and arguments, those of all commands included."""
        return _without_types(super().get_params(ctx))


class AskingCommand(Command):
    """A verb that takes images: tells somebody who gave several of them behind one ``--image`` how it is done."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments that are left; an OptionError where they are further images."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # of a class of typer's own, or of click's, by version
            message = str(getattr(error, "message", ""))
            if "unexpected extra argument" in message and {"--image", "--video"} & set(given):
                from vlpack.image_arguments import REPEAT

                raise OptionError(f"{message}.", REPEAT) from None
            raise


class Group(TyperGroup):
    """All verbs."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its options, as a command's."""
        return _without_types(super().get_params(ctx))
