"""Opening ``data=`` and ``images=``: a folder of classes, a Hugging Face dataset, or plain images."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from anypatch.errors import DataError
from anypatch.files.paths import place
from anypatch.measure.folders import class_folder, existing, image_files, images_under
from anypatch.measure.huggingface import by_name, from_disk, hugging_face
from anypatch.measure.images import Data


def labelled(source: Any, limit: int | None = None) -> Data:
    """Open ``--data``: an ImageFolder, a Hugging Face dataset (name, directory or object), or plain images.

    Raises:
        DataError: nothing there, no images, one class only, or splits whose classes differ.
    """
    data = _open(source)
    if data.train is not None:
        _require_classes(data)
        data = replace(data, train=data.train.limited(limit))
    return replace(data, test=data.test.limited(limit))


def unlabelled(folder: str | Path, limit: int | None = None) -> Data:
    """Open ``--images``: every image under a folder, labels ignored.

    Raises:
        DataError: no such folder, or no images in it.
    """
    root = existing(folder)
    return Data(image_files(str(folder), root, images_under(root)).limited(limit))


def _open(source: Any) -> Data:
    if not isinstance(source, (str, Path)):
        return hugging_face(source, str(getattr(source, "builder_name", None) or "dataset"))
    path = place(source)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return hugging_face(from_disk(path), str(source))
        return class_folder(str(source), path)
    if path.exists():
        raise DataError(f"data must be a folder or a Hugging Face dataset's name; {source} is a file")
    if re.fullmatch(r"(hf:)?\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", str(source)):
        return hugging_face(by_name(str(source)), str(source))
    raise DataError(f"{source}: no such folder")


def _require_classes(data: Data) -> None:
    assert data.train is not None
    assert data.train.labels is not None
    present = sorted(set(data.train.labels))
    if len(present) < 2:
        only = data.train.classes[present[0]] if present else "none"
        raise DataError(
            f"{data.train.name}: one class only ({only}); accuracy needs at least two. For fidelity alone, give "
            "the folder as images instead of data"
        )
