"""Tests of the host libraries that have to fail on adapted models, with the reason: a size that the test writes out."""

from __future__ import annotations

import re

# (library, pattern over the mode, over the test's name and over its last line, the reason); "" matches everything. Each
# was found by reading the test. A row is as narrow as its reason: another message of the same test is a fault.
Row = tuple[str, str, str, str, str]
SWIN = (
    "the test writes out image sizes, and the windows and grids that a patch of 4 has there; a model that timm builds "
    "at the other patch or image has the windows and grids of the adapted one"
)
ROWS: tuple[Row, ...] = (
    (
        "timm",
        "^(grid|size)$",
        r"",
        r"Input (image )?(height|width) \(.*\) doesn't match model \(",
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
        "^image$",
        r"test_naflex_rope_aug_configuration",
        r"^RuntimeError: shape '\[2, 3, 2, 32, 4, 32\]' is invalid for input of size 69120",
        "the test feeds 80 x 144 pixels, which are no multiple of a patch of 32",
    ),
    (
        "timm",
        "^image$",
        r"test_vit_classifier_encoder_hooks\[gemma4_vit_167m-soft\]",
        r"Image size \(64, 96\) must be divisible by",
        "the test feeds 64 x 96 pixels, which are no multiple of the two patches of 32 that are pooled",
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
        "^(grid|image)$",
        r"test_naflexvit_load_pretrained_big_vision_npz",
        r"^assert False",
        "the test loads a file of the original patch, which timm resizes, and asks for the same numbers",
    ),
    ("timm", "^grid$", r"test_swin_family_set_input_size_window_ratios", r"^assert \(4, 5\) == \(8, 10\)", SWIN),
    ("timm", "^image$", r"test_swin_family_set_input_size_window_ratios", r"^assert \(4, 5\) == \(8, 10\)", SWIN),
    ("timm", "^size$", r"test_swin_family_set_input_size_window_ratios", r"^assert \(\[\(\(8, 10\)", SWIN),
    ("timm", "^grid$", r"test_swin_family_resize_odd_stage_sizes", r"size mismatch for .*position_bias_table", SWIN),
    ("timm", "^image$", r"test_swin_family_resize_odd_stage_sizes", r"^assert \(29, 31\) == \(58, 62\)", SWIN),
    ("timm", "^(grid|size)$", r"test_swin_family_set_input_size_invalid", r"^assert \(\d+, \d+\) == \(", SWIN),
    ("timm", "^grid$", r"test_swin_family_script_after_resize", r"^assert \(128, 192\) == \(64, 96\)", SWIN),
    ("timm", "^image$", r"test_swin_family_set_input_size_stage_windows", r"^assert \(\[\(\(4, 4\)", SWIN),
    ("timm", "^image$", r"test_swin_family_set_input_size\[swinv2_cr", r"^assert not True", SWIN),
    (
        "transformers",
        "",
        r"test_can_init_all_missing_weights",
        r"not properly handled in `_init_weights\(\)`.*(`weight` in module `(Conv|Linear)|[Ee]mbeddings|table)",
        "the test draws a model's weights twice from one seed and asks for the same numbers to the last bit; where a "
        "model is adapted in between, those of its patches and positions are no longer what was drawn, and what one "
        "module draws after a table of another size is another number",
    ),
)


def explanation(library: str, mode: str, test: str, message: str, rows: tuple[Row, ...] | None = None) -> str | None:
    """Why a test has to fail, or ``None`` where nothing explains it."""
    for host, way, name, line, reason in ROWS if rows is None else rows:
        if host == library and re.search(way, mode) and re.search(name, test) and re.search(line, message):
            return reason
    return None
