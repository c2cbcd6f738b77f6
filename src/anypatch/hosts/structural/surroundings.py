"""What stands around or inside a library's model and is not the library's: how it follows the geometry.

A module of the user's that holds the model, a second stem beside the first, a head that brings tokens back to pixels,
a replaced layer: each is followed by the same names and shapes as in hand-made models, or refused by name. What has no
name and no shape that tells (a number inside a function's code) cannot be seen here: ``rehearsing.py`` looks whether
the model would still run.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size as TorchSize
from torch import Tensor, nn

from anypatch.core.account import Context, Doubt, Extra
from anypatch.core.diff import AttributeEdit, BufferEdit, Edit, Owners, ParameterEdit
from anypatch.core.geometry import Size, show
from anypatch.core.roles import Case, changed_axes
from anypatch.errors import UnsupportedModelError
from anypatch.hosts.structural.following import TELLING, counts
from anypatch.hosts.structural.holdings import holdings, tensors_of
from anypatch.hosts.structural.layers import LENGTHS, block_of, enlarges, layer_before, lengths_after, padding_of
from anypatch.hosts.structural.neighbours import OF_IMAGES, reads_text, widths_of
from anypatch.hosts.structural.stems import PIXEL_CHANNELS
from anypatch.hosts.structural.tables import CONVOLUTIONS, POSITION, ROTARY, enumerates, explain, resampled, table_shape
from anypatch.hosts.structural.values import Values, numbers_tokens

POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.LPPool2d)
ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
BLOCKS = (nn.PixelShuffle, nn.PixelUnshuffle, nn.Fold, nn.Unfold)
EXAMPLE = re.compile(r"^_?example_input(s|_array)?$")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def follow_surroundings(root: nn.Module, extras: list[Extra], context: Context) -> list[Edit]:
    """Edits for everything that the twins do not speak for.

    Raises:
        UnsupportedModelError: something has the old patch, grid or number of tokens and cannot follow.
        GeometryError: something follows, but not to these sizes.
    """
    rule = Surroundings(context)
    edits: list[Edit] = []
    for extra in extras:
        edits += rule.attributes(extra)
        edits += rule.layer(extra, extras)
        rule.produced |= widths_of(extra.module)
    for extra in extras:
        edits += rule.tensors(extra)
    rule.require_no_cascade(extras)
    rule.require_no_hook(root)
    return edits


class Surroundings:
    """The rule at one change of geometry."""

    def __init__(self, context: Context) -> None:
        twins = context.twins
        self.context, self.old, self.new = context, twins.before, twins.after
        self.patch: Size = twins.before.patch_size[-2:]
        self.patch_changes = twins.before.patch_size != twins.after.patch_size
        self.grid_changes = None not in (self.old.grid, self.new.grid) and self.old.grid != self.new.grid
        self.image_changes = None not in (self.old.image_size, self.new.image_size) and (
            self.old.image_size != self.new.image_size
        )
        self.telling = self.patch_changes and min(self.patch) >= TELLING
        self.tokens = {count for count in counts(self.old) if count > TELLING} if self.old.grid else set()
        self.counts = self.tokens if self.grid_changes else set()
        self.stem = _stem(twins.old, twins.new, self.old.patch_size)
        self.values = Values(self.old, self.new)
        self.produced: set[int] = set()  # widths that the user's own layers return, of those that were looked at

    # -- plain values ------------------------------------------------------------------------------------------

    def attributes(self, extra: Extra) -> Iterator[Edit]:
        of_torch = type(extra.module).__module__.startswith("torch.nn.")  # followed as layers, but for what people set
        for name in sorted(extra.names):
            value = vars(extra.module).get(name)
            if isinstance(value, (Tensor, nn.Module)) or (of_torch and not callable(value)) or name in LENGTHS:
                continue
            full = f"{extra.path}.{name}" if extra.path else name
            after = self.values.followed(name, value, full, extra.module)
            if after is not None:
                yield AttributeEdit(extra.path, name, None, value, after)
            self._require_no_tensors(extra, name, value)

    def _require_no_tensors(self, extra: Extra, name: str, value: Any) -> None:
        """Tensors in collections, closures and records, and orders of the tokens, are not followed there."""
        for where, leaf, item in holdings(name, value):
            full = f"{extra.path}.{where}" if extra.path else where
            if isinstance(item, Tensor):
                self._require_independent(full, leaf, item)
            elif numbers_tokens(leaf, item, self.counts):
                raise _refusal(full, f"is an order of the tokens ({len(item)})")

    def require_no_hook(self, root: nn.Module) -> None:
        for path, module in root.named_modules():
            for kind in HOOKS:
                for hook in getattr(module, kind).values():
                    if type(hook).__module__.startswith("torch.nn.utils."):
                        continue  # computes a weight from others, which are the module's
                    full = f"a hook of {path or type(module).__name__}"
                    self.values.followed("hook", hook, full, {})
                    for where, leaf, item in tensors_of(hook):
                        self._require_independent(f"{full}{where}", leaf, item)

    # -- layers ------------------------------------------------------------------------------------------------

    def layer(self, extra: Extra, extras: list[Extra]) -> Iterator[Edit]:
        module, path = extra.module, extra.path
        if isinstance(module, CONVOLUTIONS) and extra.whole:
            yield from self._convolution(path, module)
        elif isinstance(module, nn.ConvTranspose2d) and extra.whole:
            yield from self._transposed(path, module)
        elif isinstance(module, nn.Upsample):
            yield from self._upsample(path, module)
        elif isinstance(module, ADAPTIVE):
            yield from self._adaptive(path, module)
        elif isinstance(module, POOLS) and extra.whole:
            yield from self._pool(path, module)
        elif isinstance(module, BLOCKS) and extra.whole:
            yield from self._blocks(path, module, extras)
        elif all(name in vars(module) for name in LENGTHS):
            after = lengths_after(module, lambda name, value: self.values.number(name, value, f"{path}.{name}"))
            yield from (AttributeEdit(path, name, None, vars(module)[name], value) for name, value in after.items())
        elif isinstance(module, nn.Linear) and "weight" in extra.names:
            self._require_independent_linear(path, module)

    def _convolution(self, path: str, conv: Any) -> Iterator[Edit]:
        kernel, stride, patch = tuple(conv.kernel_size), tuple(conv.stride), self.old.patch_size
        if set(kernel) == {1} and conv.in_channels in self.counts - self.context.widths:
            self._doubt(path, conv, "weight", conv.in_channels, f"mixes a fixed number of tokens ({conv.in_channels})")
        if self.grid_changes and kernel == self.old.grid and max(kernel) > TELLING:
            self._refuse(path, conv, f"has a kernel as large as the grid ({show(kernel)})")
        if not self.patch_changes or not self._reads_pixels(conv):
            return
        if kernel == patch == stride and conv.groups == 1 and not any(padding_of(conv)):
            yield from self._projection(path, conv, self.new.patch_size)
        elif stride == patch or kernel == patch:
            self._refuse(path, conv, f"has the patch as its kernel or stride ({show(kernel)}, {show(stride)})")

    def _reads_pixels(self, conv: Any) -> bool:
        """Whether a convolution that has the patch as its stride sees the image, not a map of tokens."""
        if conv.in_channels <= PIXEL_CHANNELS:
            return True
        reads_tokens = self.stem is not None and conv.in_channels == self.stem[0]
        same = self.stem is not None and conv.in_channels == self.stem[1]
        return same or (min(self.patch) >= 2 * TELLING and not reads_tokens)

    def _projection(self, path: str, conv: Any, size: Size) -> Iterator[Edit]:
        with torch.device("meta"):
            new = type(conv)(conv.in_channels, conv.out_channels, size, size, bias=False)
        yield self._parameter(path, "weight", ((conv, new),), tuple(conv.weight.shape), tuple(new.weight.shape))
        yield AttributeEdit(path, "kernel_size", None, conv.kernel_size, size)
        yield AttributeEdit(path, "stride", None, conv.stride, size)

    def _transposed(self, path: str, conv: Any) -> Iterator[Edit]:
        if self.telling and conv.stride == self.patch:
            if conv.kernel_size != conv.stride or conv.groups != 1 or any(padding_of(conv)):
                self._refuse(path, conv, f"paints patches that overlap (kernel {show(conv.kernel_size)})")
            yield from self._projection(path, conv, self.new.patch_size[-2:])

    def _upsample(self, path: str, module: nn.Upsample) -> Iterator[Edit]:
        size = module.size if module.size is None or isinstance(module.size, tuple) else (module.size,) * 2
        for old, new in ((self.old.image_size, self.new.image_size), (self.old.grid, self.new.grid)):
            if size is not None and old is not None and new is not None and size == old[-2:] != new[-2:]:
                yield AttributeEdit(path, "size", None, module.size, new[-2:])
                return
        factor = module.scale_factor
        if not self.telling or factor is None:
            return
        factors = tuple(factor) if isinstance(factor, tuple) else (factor,) * 2
        if factors == tuple(map(float, self.patch)):
            h, w = map(float, self.new.patch_size[-2:])
            after = h if h == w and not isinstance(factor, tuple) else (h, w)
            yield AttributeEdit(path, "scale_factor", None, factor, after)

    def _adaptive(self, path: str, pool: Any) -> Iterator[Edit]:
        """A pooling to the image's size; one to the grid's may feed a layer that stays, and stays."""
        size = pool.output_size if isinstance(pool.output_size, (tuple, list)) else (pool.output_size,) * 2
        old, new = self.old.image_size, self.new.image_size
        if old is not None and new is not None and tuple(size) == old[-2:] != new[-2:] and min(old[-2:]) > TELLING:
            yield AttributeEdit(path, "output_size", None, pool.output_size, new[-2:])

    def _pool(self, path: str, pool: Any) -> Iterator[Edit]:
        kernel, stride = (v if isinstance(v, tuple) else (v, v) for v in (pool.kernel_size, pool.stride))
        if self.telling and kernel == stride == self.patch:
            if self.old.grid is not None and kernel == self.old.grid[-2:] and self.grid_changes:
                self._refuse(path, pool, f"has both the patch and the grid as its kernel ({show(kernel)})")
            yield AttributeEdit(path, "kernel_size", None, pool.kernel_size, self.new.patch_size[-2:])
            yield AttributeEdit(path, "stride", None, pool.stride, self.new.patch_size[-2:])
        elif self.grid_changes and max(kernel) > TELLING and self.old.grid is not None and kernel == self.old.grid[-2:]:
            assert self.new.grid is not None
            yield AttributeEdit(path, "kernel_size", None, pool.kernel_size, self.new.grid[-2:])
            if stride == kernel:
                yield AttributeEdit(path, "stride", None, pool.stride, self.new.grid[-2:])

    def _blocks(self, path: str, module: nn.Module, extras: list[Extra]) -> Iterator[Edit]:
        """Layers that rearrange pixels and patches: a shuffle after the layer that predicts its values is followed."""
        size = block_of(module)
        if isinstance(module, nn.Fold) and self.image_changes and size != self.patch:
            self._refuse(path, module, "puts windows together into an image of a fixed size")
        if not self.telling or size != self.patch:
            return
        before = layer_before(path, extras)
        new = self.new.patch_size[-2:]
        if isinstance(module, nn.PixelShuffle) and before is not None and new[0] == new[1]:
            where, layer = before
            pixels = math.prod(size)
            if isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1} and layer.out_channels % pixels == 0:
                rows = layer.out_channels // pixels * math.prod(new)
                yield from self._pixel_head(where, layer, rows)
                yield AttributeEdit(path, "upscale_factor", None, module.upscale_factor, new[0])
                return
        self._refuse(path, module, "takes patches apart or puts them together, in an order that cannot be told")

    def _pixel_head(self, path: str, layer: nn.Conv2d, rows: int) -> Iterator[Edit]:
        with torch.device("meta"):
            new = nn.Conv2d(layer.in_channels, rows, 1)
        sides = self.patch[0], self.new.patch_size[-1]
        owners = (layer, new), (nn.Sequential(nn.PixelShuffle(sides[0])), nn.Sequential(nn.PixelShuffle(sides[1])))
        yield self._parameter(path, "weight", owners, tuple(layer.weight.shape), tuple(new.weight.shape))
        if layer.bias is not None:
            yield self._parameter(path, "bias", owners, (layer.out_channels,), (rows,))
        yield AttributeEdit(path, "out_channels", None, layer.out_channels, rows)

    def _require_independent_linear(self, path: str, layer: nn.Linear) -> None:
        size, widths = layer.in_features, self.context.widths | self.produced
        if size in self.counts - widths:
            self._doubt(path, layer, "weight", size, f"mixes a fixed number of tokens ({size})")
        width = size if self.stem is None else self.stem[0]
        if size % width == 0 and layer.out_features != width:
            widths = widths | {size}  # features of several kinds or layers side by side
        all_tokens = size % width == 0 and size // width in self.tokens and size not in self.produced
        if all_tokens and self.grid_changes:
            why = f"reads all {size // width} tokens of {width} values at once"
            self._doubt(path, layer, "weight", size, why)
        if self.telling and not all_tokens and size in self._pixels() - widths:
            self._refuse(path, layer, f"reads flattened patches ({size} values), in an order that cannot be told")

    def _pixels(self) -> set[int]:
        channels = {1, 3, *(() if self.stem is None or len(self.stem) < 3 else (self.stem[1],))}
        return {c * math.prod(self.patch) for c in channels}

    # -- tensors -----------------------------------------------------------------------------------------------

    def tensors(self, extra: Extra) -> Iterator[Edit]:
        module = extra.module
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, nn.ConvTranspose2d, nn.MultiheadAttention)):
            return
        for name in sorted(extra.names):
            tensor = {**vars(module), **module._buffers, **module._parameters}.get(name)
            if not isinstance(tensor, Tensor):
                continue
            full = f"{extra.path}.{name}" if extra.path else name
            table, size = self._table(extra, name, tensor), self.values.number(name, tensor, full)
            if self._is_example(name, tensor):
                sides = (self.new.image_size or ())[-2:]
                yield self._value_edit(extra, name, tensor, F.interpolate(tensor.detach(), sides, mode="bilinear"))
            elif table is not None:
                yield table
            elif size is not None:
                yield self._value_edit(extra, name, tensor, size)
            elif not isinstance(module, NORMS) or tensor.ndim > 1 or tensor.shape[:1].numel() in self.counts:
                self._require_independent(full, name, tensor, module)

    def _is_example(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is what Lightning shows a model for its summary and its graph: an image of the present size.

        Its values mean nothing; it follows as the image does.
        """
        old = self.old.image_size
        named = EXAMPLE.search(name) is not None and tensor.ndim == 4 and tensor.is_floating_point()
        return named and self.image_changes and old is not None and tuple(tensor.shape[-2:]) == old[-2:]

    def _table(self, extra: Extra, name: str, tensor: Tensor) -> Edit | None:
        if not self.grid_changes:
            return None
        assert self.old.grid is not None
        assert self.new.grid is not None
        length = enumerates(tensor, self.old)
        if length is not None and length > TELLING:
            after = torch.arange(length + math.prod(self.new.grid) - math.prod(self.old.grid)).to(tensor)
            after = after.expand(*tensor.shape[:-1], -1)
            return self._value_edit(extra, name, tensor, after)
        shown = extra.path.rpartition(".")[2] if isinstance(extra.module, nn.Embedding) else name
        if not POSITION.search(shown) or ROTARY.search(name) or not tensor.is_floating_point():
            return None
        table = explain(extra.path, name, tensor, self.old)
        if table is None or tensor.ndim < 2:
            return None
        if len(table.axes) == 1 and table.prefix not in (-1, 0, 1, self.old.prefix_tokens):
            return None  # that many more than the grid are positions of something else, such as words
        if reads_text(extra.module) and not OF_IMAGES.search(f"{extra.path}.{name}"):
            return None
        if name in extra.module._parameters:
            shape = table_shape(table, tuple(tensor.shape), self.new)
            return self._parameter(extra.path, name, ((extra.module, extra.module),), tuple(tensor.shape), shape)
        return self._value_edit(extra, name, tensor, resampled(table, tensor.detach(), self.old, self.new))

    def _value_edit(self, extra: Extra, name: str, tensor: Tensor, after: Tensor) -> Edit:
        if name in extra.module._buffers:
            persistent = name not in extra.module._non_persistent_buffers_set
            return BufferEdit(extra.path, name, None, tensor, after, persistent, None)
        return AttributeEdit(extra.path, name, None, tensor, after)

    def _require_independent(self, full: str, name: str, tensor: Tensor, owner: nn.Module | None = None) -> None:
        shape, widths = tuple(tensor.shape), self.context.widths | self.produced
        if self.values.holds_size(tensor):
            raise _refusal(full, f"holds the size of the grid or the image ({tensor.tolist()})")
        if self.values.is_axis(name, tensor):
            raise _refusal(full, f"has one value for each row or column ({shape})")
        pairs = []
        if self.grid_changes and self.old.grid is not None:
            pairs.append(("the grid", self.old.grid[-2:]))
        if self.image_changes and self.old.image_size is not None:
            pairs.append(("the image", self.old.image_size[-2:]))
        if self.telling:
            pairs.append(("the patch", self.patch))
        for what, sides in pairs:
            if min(sides) >= TELLING and any(shape[i : i + 2] == sides for i in range(len(shape) - 1)):
                raise _refusal(full, f"has the size of {what} ({shape})")
        for size in set(shape) - widths:
            if self.telling and size in self._pixels() and size not in self.counts:
                raise _refusal(full, f"has the number of values in a patch ({shape})")
        width = None if self.stem is None else self.stem[0]
        rows = {pair[0] for pair in itertools.pairwise(shape) if pair[1] == width}
        for size in self.counts & (rows | set(shape) - widths):
            error = _refusal(full, f"has the number of tokens ({shape})")
            if owner is None:
                raise error
            self.context.doubts.append(Doubt(owner, name, size, error))

    # -- helpers -----------------------------------------------------------------------------------------------

    def _parameter(self, path: str, name: str, owners: Owners, a: Size, b: Size) -> ParameterEdit:
        twins, context = self.context.twins, self.context
        full = f"{path}.{name}" if path else name
        axes = changed_axes(a, b)
        sizes = TorchSize(a), TorchSize(b)
        case = Case(full, *sizes, axes, owners, self.old, self.new, twins.facts, context.method, context.sampling)
        return ParameterEdit(path, name, None, case)

    def _doubt(self, path: str, module: nn.Module, name: str, size: int, why: str) -> None:
        self.context.doubts.append(Doubt(module, name, size, _refusal(f"{path} ({type(module).__name__})", why)))

    def _refuse(self, path: str, module: nn.Module, why: str) -> None:
        raise _refusal(f"{path} ({type(module).__name__})", why)

    def require_no_cascade(self, extras: Iterable[Extra]) -> None:
        """Several upsampling layers that together make up the patch: which of them should grow cannot be told."""
        if not self.telling:
            return
        chains: dict[str, list[tuple[str, float]]] = {}
        for extra in extras:
            factor = enlarges(extra.module) if extra.whole else 1.0
            if factor > 1.0 and factor != self.patch[0]:
                chains.setdefault(extra.path.split(".")[0], []).append((extra.path, factor))
        for name, steps in chains.items():
            if len(steps) > 1 and math.prod(factor for _, factor in steps) == self.patch[0]:
                shown = " x ".join(f"{factor:g}" for _, factor in steps)
                raise _refusal(name, f"upsamples tokens to pixels in {len(steps)} layers ({shown})")


def _refusal(full: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{full} {why}, and the library that made the model does not speak for it: anypatch cannot tell how it "
        f"follows. Adapt the model inside on its own, and change this by hand"
    )


def _stem(old: nn.Module, new: nn.Module, patch: Size) -> Size | None:
    """The shape of the weight of the first layer of the twins whose weight follows the patch, or that has it as its
    stride."""
    after = dict(new.named_modules())
    layers = [(path, m) for path, m in old.named_modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    for path, module in layers:
        twin = after.get(path)
        if type(twin) is type(module) and _shape(module) != _shape(twin):
            return _shape(module)
    found = [_shape(m) for _, m in layers if isinstance(m, CONVOLUTIONS) and tuple(m.stride) == patch]
    return found[0] if found else None


def _shape(layer: Any) -> Size:
    """Of a weight, which may be computed from other tensors whenever it is read."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size
