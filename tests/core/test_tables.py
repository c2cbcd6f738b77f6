"""Position tables against torch's own interpolation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch.testing import assert_close

from anypatch.core.tables import resample_grid, resample_relative, resample_tokens


def test_tokens_agree_with_timm() -> None:
    table = torch.randn(1, 3 + 14 * 14, 24)
    ours = resample_tokens(table, 1, (14, 14), (7, 20), prefix=3)
    theirs = resample_abs_pos_embed(table, [7, 20], [14, 14], num_prefix_tokens=3)
    assert_close(ours, theirs)


def test_tokens_when_only_the_shape_of_the_grid_changes() -> None:
    table = torch.randn(1 + 144, 8)
    ours = resample_tokens(table, 0, (12, 12), (9, 16), prefix=1)
    image = table[1:].reshape(12, 12, 8).permute(2, 0, 1)[None]
    expected = F.interpolate(image, (9, 16), mode="bicubic", antialias=True)[0].permute(1, 2, 0).reshape(144, 8)
    assert_close(ours[1:], expected)
    assert torch.equal(ours[:1], table[:1])
    assert not torch.allclose(ours, table)


def test_suffix_tokens_are_copied() -> None:
    table = torch.randn(1, 1 + 16 + 5, 4)
    ours = resample_tokens(table, 1, (4, 4), (2, 2), prefix=1, suffix=5)
    assert ours.shape == (1, 10, 4)
    assert torch.equal(ours[:, -5:], table[:, -5:])
    assert torch.equal(ours[:, 0], table[:, 0])


def test_maps_in_any_layout() -> None:
    nhwc = torch.randn(1, 6, 8, 5)
    nchw = nhwc.permute(0, 3, 1, 2).contiguous()
    expected = F.interpolate(nchw, (9, 4), mode="bicubic", antialias=True)
    assert_close(resample_grid(nchw, (2, 3), (9, 4)), expected)
    assert_close(resample_grid(nhwc, (1, 2), (9, 4)), expected.permute(0, 2, 3, 1))


def test_time_is_linear_and_space_bicubic() -> None:
    table = torch.randn(1, 4 * 6 * 6, 3)
    ours = resample_tokens(table, 1, (4, 6, 6), (8, 3, 9))
    video = table.reshape(4, 6, 6, 3)
    frames = F.interpolate(video.permute(1, 2, 3, 0).reshape(1, -1, 4), 8, mode="linear").reshape(6, 6, 3, 8)
    frames = F.interpolate(frames.permute(3, 2, 0, 1), (3, 9), mode="bicubic", antialias=True)
    assert_close(ours[0], frames.permute(0, 2, 3, 1).reshape(-1, 3))


def test_single_axis_is_linear() -> None:
    table = torch.randn(27, 16)
    expected = F.interpolate(table.T[None], 13, mode="linear")[0].T
    assert_close(resample_grid(table, (0,), (13,)), expected)


def test_relative_table_keeps_extra_entries_and_the_centre() -> None:
    table = torch.randn(27 * 27 + 3, 4)
    ours = resample_relative(table, 0, (14, 14), (7, 10), extra=3)
    image = table[:-3].reshape(27, 27, 4).permute(2, 0, 1)[None]
    expected = F.interpolate(image, (13, 19), mode="bicubic", antialias=True)[0].permute(1, 2, 0).reshape(-1, 4)
    assert_close(ours[:-3], expected)
    assert torch.equal(ours[-3:], table[-3:])
    ramp = (torch.arange(27.0) - 13).repeat_interleave(27)[:, None]
    centred = resample_relative(ramp, 0, (14, 14), (7, 7)).reshape(13, 13)
    assert_close(centred[6], torch.zeros(13), atol=1e-4, rtol=0)


def test_low_precision_is_computed_in_float32() -> None:
    table = torch.randn(1, 196, 8).to(torch.bfloat16)
    ours = resample_tokens(table, 1, (14, 14), (7, 7))
    assert ours.dtype == torch.bfloat16
    exact = resample_tokens(table.float(), 1, (14, 14), (7, 7))
    assert torch.equal(ours, exact.to(torch.bfloat16))


def test_meta_tensors_keep_their_device() -> None:
    table = torch.empty(1, 197, 8, device="meta")
    assert resample_tokens(table, 1, (14, 14), (7, 7), prefix=1).shape == (1, 50, 8)
