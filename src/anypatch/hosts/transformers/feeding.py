"""What to feed a model for the proof: images, clips, or the flattened patches that its processor would make."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anypatch.core.geometry import Size, show
from anypatch.core.twins import Subject
from anypatch.hosts.base import Example
from anypatch.hosts.timm.feeding import example_at
from anypatch.hosts.transformers.config import FRAMES, STRIDE, channels, first_of, sizes
from anypatch.hosts.transformers.facts import row
from anypatch.hosts.transformers.model import Vision

GRID = 4  # patches on a side, for models that take any size

GRIDS = ("image_grid_thw", "grid_thw", "image_grid_hw", "spatial_shapes", "target_sizes", "image_position_ids",
         "pixel_position_ids")  # fmt: skip
INDEXED = "flattened_patches"  # patches behind their row and their column
MASKS = ("pixel_attention_mask", "pixel_mask", "aspect_ratio_ids", "aspect_ratio_mask")
WORDS = ("input_ids", "attention_mask", "decoder_input_ids", "bbox")
POOLS = ("window_kernel_size", "merge_kernel_size")
KNOWN = {"pixel_values", "pixel_values_videos", "pixel_values_images", "image_sizes", "image_merge_sizes",
         "merge_sizes", "hidden_states", "bool_masked_pos", INDEXED, *GRIDS, *MASKS, *WORDS}  # fmt: skip
# Classes that return pixels, by how transformers names its tasks.
PAINTERS = re.compile(r"ForPreTraining|ForMaskedImage|ForDepth|ForImageMatting|ForSeman|ForDense")


def example(subject: Subject) -> Example:
    """What to feed a model, or the part of one that holds it."""
    if not subject.path:
        return _whole(subject)
    vision: Vision = subject.about
    inner = _whole(replace(subject, model=vision.model, path=""))
    path = next(p for p, m in subject.model.named_modules() if m is vision.model)
    return Example(inner.shape, lambda m, x: inner.call(m.get_submodule(path), x), inner.unit)


def _whole(subject: Subject) -> Example:
    vision: Vision = subject.about
    geometry, config, count = subject.geometry, vision.first, channels(vision.first)
    video = len(geometry.patch_size) == 3
    image = geometry.image_size or tuple(p if video and i == 0 else GRID * p for i, p in enumerate(geometry.patch_size))
    towers = vision.towers(subject.model)
    if towers:
        inner = example_at(towers[0], geometry)
        if not vision.parts[0].path or any(unit > 1 for unit in inner.unit):  # the wrapper alone, or behind a backbone
            return Example(inner.shape, lambda m, x: inner.call(vision.towers(m)[0], x), inner.unit)
        count = inner.shape[1]
    if hasattr(config, STRIDE):
        return Example((2, *image), lambda m, x: m(x.transpose(1, 2)))
    names = set(_parameters(_entry(vision, subject.model)))
    if packed(vision, subject.model):
        order = next(iter(subject.facts.orders.values()), "c t h w" if video else "c h w")
        image = _in_whole_blocks(image, geometry.patch_size, _merge(vision) * _pooled(vision))
        return Example((1, count, *image), partial(_patches, vision, geometry.patch_size, order))
    if video:
        return Example((1, count, *image), lambda m, x: _video(vision, m, x.transpose(1, 2)))
    return _of_images(subject, names, count, image)


def packed(vision: Vision, model: nn.Module) -> bool:
    """Whether a model takes the flattened patches of images of any size, and the grid of each with them."""
    return bool({INDEXED, *GRIDS} & set(_parameters(_entry(vision, model)))) or row(vision.first).bare


def _of_images(subject: Subject, names: set[str], count: int, image: Size) -> Example:
    vision: Vision = subject.about
    frames = first_of(vision.first, FRAMES)
    clip = partial(_video, vision)
    images = partial(_images, vision, math.prod(subject.geometry.grid or ()))
    if row(vision.config).towers_alone:
        return Example((1, count, *image), partial(_towers, vision))
    if row(vision.first).prompted:
        return Example((1, count, image[0] // 2, image[1]), _prompted)
    if "pixel_values_videos" in names and "pixel_values" not in names:
        return Example((1, 2, count, *image), clip)
    if frames is not None and row(vision.first).frames_as_batch:
        return Example((getattr(vision.first, frames), count, *image), images)
    if frames is not None:
        return Example((1, getattr(vision.first, frames), count, *image), clip)
    return Example((2, count, *image), images)


def _entry(vision: Vision, model: nn.Module) -> Any:
    """What to call with pixels: the method for image features, the vision tower, or the whole model."""
    inner = [getattr(model, name, None) for name in ("model", "vlm", "thinker")]
    for owner in (*inner, model):  # the inner model's method has the full signature
        method = getattr(owner, "get_image_features", None)
        if method is not None and _feasible(method):
            return method
    if "input_ids" in _parameters(model.forward) or not _feasible(model.forward):
        for module in model.modules():
            other = module is model or getattr(module, "config", None) is not vision.first
            if other or not _feasible(module.forward):
                continue
            if any(n.startswith("pixel_values") for n in _parameters(module.forward)):
                return module.forward
    return model.forward


def _called(entry: Any) -> Any:
    """A module in the place of its ``forward``, so that its hooks are run."""
    owner = getattr(entry, "__self__", None)
    return owner if isinstance(owner, nn.Module) and entry == owner.forward else entry


def _parameters(function: Any) -> dict[str, Any]:
    signature = inspect.signature(inspect.unwrap(function))
    return {n: p for n, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and n != "self"}


def _feasible(function: Any) -> bool:
    """Whether every argument that the function insists on is one that can be made up."""
    parameters = _parameters(function)
    required = {n for n, p in parameters.items() if p.default is p.empty}
    return bool(parameters) and required <= KNOWN


def _images(vision: Vision, tokens: int, model: nn.Module, pixels: Tensor) -> Any:
    """Images of shape (batch, channels, height, width)."""
    entry = _entry(vision, model)
    names = _parameters(entry)
    name = next((n for n in names if n.startswith("pixel_values")), next(iter(names)))
    given = _words(names, len(pixels))
    if "bool_masked_pos" in names and names["bool_masked_pos"].default is inspect.Parameter.empty:
        given["bool_masked_pos"] = (torch.arange(tokens) % 2 == 0)[None].expand(len(pixels), -1)
    if "image_sizes" in names:
        pixels, sides = _with_sizes(vision, entry, pixels)
        given |= sides
    if row(vision.config).tiles:
        pixels = pixels[:, None]
    if "pixel_attention_mask" in names:
        pixels = pixels[:, None]  # images per sample
        mask = pixels.shape[:2] if "tile_fine_mask" in names else (*pixels.shape[:2], *pixels.shape[-2:])
        given["pixel_attention_mask"] = torch.ones(mask, dtype=torch.bool)
    if "aspect_ratio_ids" in names:  # one image of one tile per sample
        count, tiles = len(pixels), vision.first.max_num_tiles
        pixels = pixels[:, None, None].expand(-1, 1, tiles, -1, -1, -1)
        given["aspect_ratio_ids"] = torch.ones(count, 1, dtype=torch.long)
        given["aspect_ratio_mask"] = torch.ones(count, 1, tiles, dtype=torch.long)
    return _without_loss(_called(entry)(**{name: pixels}, **given, **_hidden_states(model)))


def _with_sizes(vision: Vision, entry: Any, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Images for a function that takes their sizes; cut into tiles, the whole before them, where it wants tiles."""
    sides = torch.tensor([pixels.shape[-2:]], device=None if pixels.is_meta else pixels.device)  # they are numbers
    tiles = getattr(inspect.getmodule(inspect.unwrap(entry)), "image_size_to_num_patches", None)
    if tiles is not None:
        number = tiles(sides[0].tolist(), vision.config.image_grid_pinpoints, pixels.shape[-1])
        return pixels[:1].expand(number, -1, -1, -1)[None], {"image_sizes": sides}
    insists = _parameters(entry)["image_sizes"].default is inspect.Parameter.empty
    if insists or row(vision.first).needs_sizes:
        return pixels, {"image_sizes": sides.expand(len(pixels), -1)}
    return pixels, {}


def _words(names: dict[str, Any], count: int) -> dict[str, Any]:
    """A few words for each image, where the function takes words."""
    given: dict[str, Any] = {}
    if "input_ids" in names:
        given["input_ids"] = torch.arange(2, 8).expand(count, -1)
        given["attention_mask"] = torch.ones(count, 6, dtype=torch.long)
        if "bbox" in names:
            given["bbox"] = torch.arange(4).expand(count, 6, 4)
    if "decoder_input_ids" in names:
        given["decoder_input_ids"] = torch.arange(2, 8).expand(count, -1)
    return given


def _towers(vision: Vision, model: nn.Module, pixels: Tensor) -> Any:
    configs = [part.config for part in vision.parts if part.path]
    towers = [m for m in model.modules() if any(getattr(m, "config", None) is c for c in configs)]
    return [m(pixels) for m in towers if m is not model and "pixel_values" in _parameters(m.forward)]


def _prompted(model: nn.Module, pixels: Tensor) -> Any:
    outputs = model(pixels, prompt_pixel_values=pixels.roll(1, 1), prompt_masks=pixels / 2, output_hidden_states=True)
    return _without_loss(outputs)


def _patches(vision: Vision, patch: Size, order: str, model: nn.Module, pixels: Tensor) -> Any:
    """Flattened patches, with a description of their grid, as the model's own processor makes them."""
    entry = _entry(vision, model)
    names = list(_parameters(entry))
    known = row(vision.first)
    height, width = (side // p for side, p in zip(pixels.shape[-2:], patch[-2:], strict=True))
    merge = _merge(vision)
    if known.whole_blocks:
        patch, height, width = tuple(merge * p for p in patch), height // merge, width // merge
    flat = patchify(pixels[0], patch, order, 1 if known.row_major else merge)
    at = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1)
    name = next((n for n in names if n.startswith("pixel_values")), names[0])
    if known.whole_blocks:
        flat = flat.unflatten(1, (*patch, -1))
    elif INDEXED in names:
        flat = torch.cat([at.reshape(-1, 2).flip(1).to(flat) + 1, flat], 1)[None]
    elif "target_sizes" in names:  # patches side by side
        flat = flat.unflatten(1, (-1, *patch)).permute(1, 2, 0, 3).flatten(2)[None]
    elif known.as_images:
        flat = flat.unflatten(1, (-1, *patch[-2:]))
    elif set(names) & {"spatial_shapes", "image_position_ids", "pixel_position_ids"} or known.bare:
        flat = flat[None]
    values = _grid_values(height, width, merge, at)
    return _without_loss(_called(entry)(**{name: flat}, **{n: values[n] for n in names if n in values}))


def _merge(vision: Vision) -> int:
    """How many patches beside one another become one token, on each axis."""
    return getattr(vision.first, "spatial_merge_size", None) or 1


def _pooled(vision: Vision) -> int:
    """The same of layers that merge without a say in the order of the patches."""
    kernels = [vars(config).get(name) for config in (vision.first, vision.config) for name in POOLS]
    return math.prod(kernel[-1] if isinstance(kernel, (list, tuple)) else kernel or 1 for kernel in kernels)


def _in_whole_blocks(image: Size, patch: Size, merge: int) -> Size:
    """The image that a processor makes of one of a size: patches are merged later, so it cuts none of their blocks. The
    size in the configuration is that of a table."""
    sides = (-(-side // (p * merge)) * p * merge for side, p in zip(image[-2:], patch[-2:], strict=True))
    return (*image[:-2], *sides)


def _grid_values(height: int, width: int, merge: int, at: Tensor) -> dict[str, Tensor]:
    """The grid of patches in the words of all the processors that describe one."""
    grid = torch.tensor([[1, height, width]])
    ones = torch.ones(1, height * width, dtype=torch.long)
    return {
        "image_grid_thw": grid,
        "grid_thw": grid,
        "image_grid_hw": grid[:, 1:],
        "spatial_shapes": grid[:, 1:],
        "target_sizes": grid[:, 1:],
        "image_merge_sizes": torch.tensor([merge]),
        "merge_sizes": torch.tensor([merge]),
        "pixel_attention_mask": ones,
        "attention_mask": ones,
        "decoder_input_ids": torch.arange(2, 8)[None],
        "image_position_ids": at.reshape(1, -1, 2),
        "pixel_position_ids": at.reshape(1, -1, 2),
    }


def patchify(image: Tensor, patch: Size, order: str, blocks: int = 1) -> Tensor:
    """Cut ``(channels, [time,] height, width)`` into flattened patches, ``(patches, values)``.

    Args:
        image: one image or clip.
        patch: its (time,) height and width.
        order: axes of a patch, slowest first.
        blocks: patches come grouped in squares of this side.
    """
    if len(patch) == 2:
        image, patch, order = image.unsqueeze(1), (1, *patch), "t " + order
    if image.ndim == 3:
        raise ValueError(f"an image of shape {tuple(image.shape)} has no time axis for patch {show(patch)}")
    channels = image.shape[0]
    t, h, w = (side // p for side, p in zip(image.shape[1:], patch, strict=True))
    cut = image.reshape(channels, t, patch[0], h // blocks, blocks, patch[1], w // blocks, blocks, patch[2])
    axes = {"c": 0, "t": 2, "h": 5, "w": 8}
    moved = cut.permute(1, 3, 6, 4, 7, *[axes[name] for name in order.split()])
    return moved.reshape(t * h * w, -1)


def _video(vision: Vision, model: nn.Module, pixels: Tensor) -> Any:
    """A clip of shape (batch, frames, channels, height, width)."""
    entry = _entry(vision, model)
    if "bool_masked_pos" not in _parameters(entry) or "ForPreTraining" not in type(model).__name__:
        name = next((n for n in _parameters(entry) if n.startswith("pixel_values")), "pixel_values")
        return _called(entry)(**{name: pixels})
    patch, image = sizes(vision.config)
    assert image is not None
    tokens = math.prod(i // p for i, p in zip(image, patch, strict=True))
    masked = torch.arange(tokens, device=pixels.device) % 2 == 0
    return _without_loss(model(pixels, bool_masked_pos=masked[None], output_hidden_states=True))


def _hidden_states(model: nn.Module) -> dict[str, bool]:
    """For models that return pixels, whose number follows the patch: ask for the tokens too."""
    return {"output_hidden_states": True} if PAINTERS.search(type(model).__name__) else {}


def _without_loss(outputs: Any) -> Any:
    """A loss over pixels is no function of the tokens alone."""
    return {k: v for k, v in outputs.items() if k != "loss"} if isinstance(outputs, dict) else outputs
