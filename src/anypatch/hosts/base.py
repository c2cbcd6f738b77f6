"""The host contract: what one folder per host library provides, and the defaults that refuse by name.

A host is a folder and one line in :mod:`anypatch.hosts`. Its verbs are plain functions in the folder's rooms; a verb
is looked for in its own room first and in ``model.py`` after it, so that a small host may be one file:

=========  ============================================  ==========================================================
part       verbs                                         used by
=========  ============================================  ==========================================================
Model      ``recognises``, ``subject``, ``example``      ``adapt``, ``check``, ``inspect``, ``at``; required
Files      ``load``, ``build``, ``names``, ``save``,     ``load``, ``save``, ``convert``
           ``fetches``, ``names_folder``,
           ``candidates``, ``fit``, ``open_folder``,
           ``repository``
Images     ``preprocess``, ``features``, ``classes``,    ``sweep``, ``view``, ``tune``
           ``tokenize``
=========  ============================================  ==========================================================
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from anypatch.core.geometry import Size
from anypatch.core.twins import Subject
from anypatch.errors import UnsupportedModelError

if TYPE_CHECKING:
    from anypatch.hosts.images import Classes, Encode, Features, Preprocess

# Which room of a host's folder a verb is in; ``model.py`` where there is no such room.
FILES = (
    "load", "build", "names", "save", "fetches", "names_folder", "candidates", "fit", "open_folder", "repository",
)  # fmt: skip
ROOMS = {
    "example": "feeding",
    **dict.fromkeys(FILES, "files"),
    **dict.fromkeys(("preprocess", "features", "classes", "tokenize"), "images"),
}
MODEL = "model"


@dataclass(frozen=True)
class Host:
    """One host library, its folder opened only when a verb of it is used.

    Args:
        name: as :attr:`anypatch.Geometry.library` says it.
        prefix: of sources, ``prefix:NAME``; the name if it is empty.
        package: the folder; ``anypatch.hosts.NAME`` if it is empty.
    """

    name: str
    prefix: str = ""
    package: str = ""

    def has(self, verb: str) -> bool:
        """Whether the host's folder has a verb."""
        return self._find(verb) is not None

    @property
    def extra(self) -> str:
        """What to install it with: ``pip install 'anypatch[EXTRA]'``."""
        return self.name.replace("_", "-")

    @property
    def version(self) -> str:
        """Of the library, where it is imported; empty for models that no library made."""
        return str(getattr(sys.modules.get(self.name), "__version__", ""))

    # -- Model -------------------------------------------------------------------------------------------------

    def recognises(self, model: nn.Module) -> bool:
        """Whether ``model`` is this library's, decided without importing the library."""
        return self._verb("recognises")(model)

    def subject(self, model: nn.Module) -> Subject:
        """Describe a live model: its geometry and how to build an empty twin of it.

        Raises:
            UnsupportedModelError: it has no patch embedding; the message names the layer and why.
        """
        return self._verb("subject")(model)

    def example(self, subject: Subject) -> Example:
        """What to feed the model to prove an adaptation."""
        return self._verb("example")(subject)

    # -- Files -------------------------------------------------------------------------------------------------

    def load(self, name: str, **host_kwargs: Any) -> nn.Module:
        """Load a pretrained model by the library's own loader, from its hub or from a directory in its format."""
        return self._verb("load")(name, **host_kwargs)

    def build(self, name: str, **host_kwargs: Any) -> nn.Module:
        """The model that ``load`` gives, with random weights: no weights are downloaded or read."""
        return self._verb("build")(name, **host_kwargs)

    def names(self) -> list[str]:
        """The names that ``load`` takes, where the library has a list of them."""
        return self._verb("names")() if self.has("names") else []

    def save(self, model: nn.Module, folder: Path, final: Path, **extras: Any) -> None:
        """Write the library's own format into an empty directory, which will stand at ``final``, and see that it loads.

        Raises:
            UnsupportedModelError: the library would not build this model from it; the message names what differs.
        """
        self._verb("save")(model, folder, final, **extras)

    def fetches(self, model: nn.Module) -> bool:
        """Whether ``save`` finds values of this model that are offloaded, as the library knows how."""
        return bool(self._verb("fetches")(model)) if self.has("fetches") else False

    def names_folder(self, path: Path) -> str | None:
        """The name that ``load`` takes for a directory in this library's format; ``None`` for any other."""
        return self._verb("names_folder")(path) if self.has("names_folder") else None

    def repository(self, name: str) -> tuple[str, str] | None:
        """The repository on the hub that a name is of, and the file in it that describes the model; of no name that
        the library itself knows, whose description is its own."""
        return self._verb("repository")(name) if self.has("repository") else None

    def candidates(self, checkpoint: Any) -> Iterable[str]:
        """The library's architectures, without the prefix, that hold exactly a file's tensors, the likeliest first."""
        return self._verb("candidates")(checkpoint)

    def fit(self, name: str, checkpoint: Any, **host_kwargs: Any) -> nn.Module:
        """The architecture ``name`` with a file's tensors, at the geometry that they were trained at."""
        return self._verb("fit")(name, checkpoint, **host_kwargs)

    def open_folder(self, path: Path, **options: Any) -> Any:
        """A directory in this library's format as an empty model, with the texts of its configurations at a plan."""
        return self._verb("open_folder")(path, **options)

    # -- Images ------------------------------------------------------------------------------------------------

    def preprocess(self, subject: Subject, source: str | None = None) -> Preprocess:
        """How the library turns an image into the model's input.

        Args:
            subject: the model.
            source: where it was loaded from, which for some libraries is the only place that says.
        """
        return self._verb("preprocess")(subject, source)

    def features(self, subject: Subject, pixels: Tensor) -> Features:
        """What the model says of normalised pixels (n, channels, height, width)."""
        return self._verb("features")(subject, pixels)

    def classes(self, subject: Subject) -> Classes:
        """What the model's own classifier tells apart; no outputs where it has none."""
        return self._verb("classes")(subject)

    def tokenize(self, subject: Subject, texts: Sequence[str], source: str | None = None) -> Encode:
        """Texts as the model's text tower takes them: what gives one vector each, of any copy of the model."""
        return self._verb("tokenize")(subject, texts, source)

    # -- finding a verb ----------------------------------------------------------------------------------------

    def _verb(self, verb: str) -> Callable[..., Any]:
        found = self._find(verb)
        if found is None:
            raise UnsupportedModelError(
                f"{self.name} models have no {verb} in anypatch: the {self.name} host does without "
                f"{ROOMS.get(verb, MODEL)}.{verb}"
            )
        return found

    def _find(self, verb: str) -> Callable[..., Any] | None:
        for room in dict.fromkeys((ROOMS.get(verb, MODEL), MODEL)):
            module = self._room(room)
            if module is not None and hasattr(module, verb):
                return getattr(module, verb)
        return None

    def _room(self, room: str) -> ModuleType | None:
        name = f"{self.package or f'anypatch.hosts.{self.name}'}.{room}"
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # a room that is there and needs something that is not
                raise
            return None


class Example:
    """Inputs that can be enlarged patch by patch, and how to read the outputs.

    Args:
        shape: of the pixels, ``(batch, channels, [time,] height, width)``, for the model's present geometry.
        call: ``call(model, pixels) -> outputs`` (any nesting of tensors).
        unit: pixels per entry of what is fed, where that is a map further in (behind a backbone).
        pixels_alone: whether ``call`` feeds nothing but the pixels, so that it can feed them at any geometry.
    """

    def __init__(
        self,
        shape: Sequence[int],
        call: Callable[[nn.Module, Any], Any],
        unit: Sequence[int] = (1, 1),
        *,
        pixels_alone: bool = False,
    ) -> None:
        self.shape = tuple(shape)
        self.call = call
        self.unit = tuple(unit)
        self.pixels_alone = pixels_alone


def comes_from(model: nn.Module, package: str) -> bool:
    """Whether the model's class is defined in ``package``, also where torch put a subclass in its place."""
    kind = next((kind for kind in type(model).__mro__ if not parametrized(kind)), type(model))
    return kind.__module__.split(".")[0] == package


def parametrized(kind: type) -> bool:
    """Whether torch made a class in the place of another, whose parameters are computed (``parametrize``)."""
    return kind.__module__ == "torch.nn.utils.parametrize" and kind.__name__.startswith("Parametrized")


def plain(size: Size) -> int | Size:
    """A size the way constructors like it: one int where it is square."""
    return size[0] if len(set(size)) == 1 else size


def pair(size: Any) -> Size:
    """A size as (height, width), from the one int or the sequence that a library keeps."""
    return (size, size) if isinstance(size, int) else tuple(int(side) for side in size)


def unknown(library: str, name: str, known: Sequence[str]) -> UnsupportedModelError:
    """The error for a name that a library does not have, with those that are like it."""
    near = difflib.get_close_matches(name, known, n=3)
    return UnsupportedModelError(
        f"{library} knows no model {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


def class_tokens(module: nn.Module) -> int:
    """Tokens that the module's own parameters put before the grid (class, distillation, register tokens)."""
    count = 0
    for name in ("cls_token", "class_token", "dist_token", "distillation_token", "class_embedding"):
        parameter = module._parameters.get(name)
        if parameter is not None:
            count += parameter.shape[-2] if parameter.ndim > 1 else 1
    for name in ("reg_token", "register_tokens", "registers"):
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.ndim > 1:
            count += parameter.shape[-2]
    return count


def ancestors(path: str) -> list[str]:
    """Of a module path, nearest first, down to the whole model (``""``)."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]
