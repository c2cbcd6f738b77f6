"""Help texts that name what an option takes (FOLDER, SIZE), and no type of Python's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:  # mixed into a class of typer's, which has these methods
    _Base = TyperCommand
else:
    _Base = object


class _Plain(_Base):
    """Of typer's commands: an argument says its name once, and a flag, which takes nothing, says nothing of a type."""

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)
        for parameter in found:
            if parameter.param_type_name == "argument" or getattr(parameter, "is_flag", False):
                parameter.display_type_rich = _nothing  # of this object: typer itself is left as it is
        return found

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


class Command(_Plain, TyperCommand):
    """One command."""


class Group(_Plain, TyperGroup):
    """All of them."""


def _nothing(ctx: Any) -> None:
    return None
