"""Tests of the host libraries that have to fail on adapted models, with the reason: a size that the test writes out."""

from __future__ import annotations

import re

# (library, pattern over the mode, over the test's name and over its last line, the reason); "" matches everything. Each
# was found by reading the test. A row is as narrow as its reason: another message of the same test is a fault.
Row = tuple[str, str, str, str, str]
ROWS: tuple[Row, ...] = (
    (
        "timm",
        "^(grid|size)$",
        r"",
        r"Input (height|width) \(.*\) doesn't match model \(",
        "the test feeds an image of a size that it writes out, or looks up under the model's name, and timm's model "
        "asserts the size that it has now",
    ),
    (
        "timm",
        "^(grid|image)$",
        r"test_naflex",
        r"mat1 and mat2 shapes cannot be multiplied \(\d+x768 and ",
        "the test feeds patches of 16 x 16 x 3 numbers, which it writes out",
    ),
    (
        "timm",
        "^(grid|image|size)$",
        r"test_native_checkpoint_file_overrides_custom_load_source",
        r"^AssertionError: (patch_embed|pos_embed)",
        "the test loads the weights of an adapted model into one of the original size and asks for the same numbers; "
        "timm resizes them",
    ),
    (
        "timm",
        "^grid$",
        r"test_swin_family_set_input_size_window_ratios",
        r"^assert \(4, 5\) == \(8, 10\)",
        "the test expects windows of 8 and 10 tokens of 256 x 320 pixels, those of a patch of 4",
    ),
    (
        "timm",
        "^grid$",
        r"test_swin_family_resize_odd_stage_sizes",
        r"size mismatch for layers\.3\..*relative_position_bias_table",
        "the test sets one model to a size in pixels and builds another at it, which then is adapted to another grid",
    ),
    (
        "timm",
        "^(grid|size)$",
        r"test_swin_family_set_input_size_invalid_and_min_windows",
        r"^assert \(\d+, \d+\) == \(\d+, \d+\)",
        "the test expects the image size that it writes out",
    ),
)


def explanation(library: str, mode: str, test: str, message: str, rows: tuple[Row, ...] | None = None) -> str | None:
    """Why a test has to fail, or ``None`` where nothing explains it."""
    for host, way, name, line, reason in ROWS if rows is None else rows:
        if host == library and re.search(way, mode) and re.search(name, test) and re.search(line, message):
            return reason
    return None
