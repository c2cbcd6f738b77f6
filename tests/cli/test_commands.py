"""The command line: exit statuses, one-line errors, what is written, what a pipe and a narrow terminal get."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import anypatch as package
from anypatch import cli
from anypatch.cli import output, stderr
from anypatch.cli.options import read_value
from anypatch.errors import AnypatchWarning
from anypatch.files import shards

VIT = ["timm:test_vit", "-o", "pretrained=false"]


class Anypatch:
    """Runs command lines in this process, as `main` does."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str) -> SimpleNamespace:
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "argv", ["anypatch", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = self.capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=captured.out, stderr=captured.err)


@pytest.fixture
def anypatch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Anypatch:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("logging.disable", lambda level: None)
    return Anypatch(capsys, monkeypatch)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns."""
    monkeypatch.setattr(output, "terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")


def test_version(anypatch: Anypatch) -> None:
    assert anypatch("--version").stdout == f"anypatch {package.__version__}\n"
    assert package.__version__ == "0.2.0"


def test_help_and_completion_import_no_torch() -> None:
    """Which takes seconds, and a key pressed meanwhile would end in a traceback."""
    code = "import sys, anypatch.cli; sys.exit(', '.join({'torch', 'numpy', 'timm'} & {*sys.modules}) or 0)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_inspect_says_what_the_model_is(anypatch: Anypatch) -> None:
    result = anypatch("inspect", *VIT)
    assert result.returncode == 0, result.stderr
    for text in ("timm", "VisionTransformer", "16x16", "160x160", "10x10", "patch projection", "absolute positions"):
        assert text in result.stdout


def test_inspect_lists_what_would_change(anypatch: Anypatch) -> None:
    result = anypatch("inspect", *VIT, "--patch-size", "8x32")
    assert result.returncode == 0, result.stderr
    flat = result.stdout.replace("\n", " ")
    for text in ("pos_embed", "(64, 3, 16, 16)", "(64, 3, 8, 32)", "10x10 tokens"):
        assert text in flat


def test_adapt_writes_a_directory_that_timm_loads(anypatch: Anypatch, tmp_path: Path) -> None:
    result = anypatch("adapt", *VIT, "--patch-size", "32", "--keep", "grid", "--output", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "16x16 -> 32x32" in result.stdout.replace("\n", "")
    code = f"""
import sys; sys.modules["anypatch"] = None
import timm, torch
m = timm.create_model("local-dir:{tmp_path / "out"}", pretrained=True).eval()
torch.manual_seed(0)
torch.save(m(torch.randn(1, 3, 320, 320)), "{tmp_path / "y.pt"}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert model.patch_embed.patch_size == (32, 32)
    torch.manual_seed(0)
    assert_close(model(torch.randn(1, 3, 320, 320)), torch.load(tmp_path / "y.pt", weights_only=True))


def test_check_passes_and_says_so(anypatch: Anypatch) -> None:
    result = anypatch("check", *VIT, "--patch-size", "24")
    assert result.returncode == 0, result.stderr
    assert "PASS" in result.stdout


def test_a_check_at_the_own_patch_says_that_nothing_was_resized(anypatch: Anypatch) -> None:
    result = anypatch("check", *VIT, "--patch-size", "16")
    assert result.returncode == 0
    assert "note: patch size 16x16 is the model's own, so nothing was resized" in result.stderr
    assert "note" not in anypatch("check", *VIT, "--patch-size", "16x32").stderr
    assert "note" not in anypatch("check", *VIT, "--patch-size", "16", "--quiet").stderr


def test_a_failed_check_exits_with_one(anypatch: Anypatch, monkeypatch: pytest.MonkeyPatch) -> None:
    from anypatch import proof

    monkeypatch.setattr(proof, "check", lambda model, patch: proof.Check(float("inf"), False, 1, (32, 32)))
    result = anypatch("check", *VIT, "--patch-size", "32")
    assert result.returncode == 1
    assert "FAIL" in result.stdout
    result = anypatch("check", *VIT, "--patch-size", "32", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["error"] is None  # JSON has no infinity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["inspect", *VIT, "--patch-size", "33"],
            "use --image-size 132x132 or 165x165, or --patch-size 32x32 or 40x40",
        ),
        (["inspect", *VIT, "--patch-size", "33"], "; or --image-size nearest, which is 165x165; or --keep grid, "),
        (
            ["inspect", *VIT, "--patch-size", "14x14x14"],
            "--patch-size must be a number of pixels, or HEIGHTxWIDTH, got 14x14x14",
        ),
        (
            ["tune", *VIT, "--patch-size", "32", "--images", "x", "--output", "y", "--steps", "1", "--minutes", "1"],
            "give --minutes or --steps, not both",
        ),
        (["inspect", *VIT, "--patch-size", "big"], "'big'"),
        (["adapt", *VIT, "--patch-size", "16,32", "--output", "x"], "a rectangle is 16x32"),
        (["inspect", "nonsense"], "timm:NAME"),
        (["inspect", "vit_tiny_patch16_224"], "did you mean timm:vit_tiny_patch16_224"),
        (["inspect", "timm:no_such_model", "-o", "pretrained=false"], "no_such_model"),
        (["adapt", *VIT, "--output", "x"], "--patch-size"),
        (["inspect", *VIT, "-o", "pretrained"], "KEY=VALUE"),
        (["inspect", *VIT, "-o", "depht=3"], "depht"),
        (["check", *VIT, "--patch-size", "8"], "smaller"),
        (["check", "timm:resnet18", "-o", "pretrained=false", "--patch-size", "8"], "error:"),
        (["sweep", *VIT, "--patch-size", "16", "--output", "a/b", "--keep", "foo"], "'--keep': 'foo' is not one of"),
        (["inspect", *VIT, "--prefix", "foo"], "--prefix is for checkpoint files: timm:test_vit says itself"),
        (["inspect", "hub:x:y"], "x is no directory here, and a repository is named OWNER/NAME"),
        (
            ["adapt", *VIT, "--patch-size", "9999", "--keep", "grid", "--output", "x"],
            "variable ANYPATCH_MEMORY_LIMIT=BYTES",
        ),
        (["sweep", *VIT, "--patch-size", "8,,16", "--output", "a/b"], "8,14,16x32"),
        (["sweep", *VIT, "--patch-size", "16", "--output", "a/b", "--figure", "a.txt"], "such as .svg"),
        (["sweep", *VIT, "--patch-size", "33", "--output", "a/b"], "does not divide"),
        (["sweep", *VIT, "--patch-size", "16", "--images", "nowhere", "--output", "a/b"], "nowhere"),
        (["view", *VIT, "nowhere.png", "--patch-size", "16", "--output", "a/b.png"], "nowhere.png"),
        (["adapt", "timm:test_vit4", "--patch-size", "8", "--output", "a/b/c"], "pretrained=False"),
        (["sweep", *VIT, "--patch-size", "16", "--device", "quantum", "--output", "a/b"], "'quantum' here: use cpu"),
        (["view", *VIT, "photo.jpg", "--patch-size", "16", "--device", "cuda:99", "--output", "a/b.png"], "photo.jpg"),
        (["convert", "nowhere", "a/b", "--patch-size", "8"], "does not exist"),
        (["convert", "", "a/b", "--patch-size", "8"], "must be a path, got ''"),
        (["convert", "nowhere", "", "--patch-size", "8", "--overwrite"], "must be a path, got ''"),
        (["adapt", *VIT, "--patch-size", "32", "--output", "", "--overwrite"], "must be a path, got ''"),
        (["adapt", *VIT, "--patch-size", "32", "--output", "n" * 300], "longer than any path"),
        (["inspect", "n" * 300], "longer than any path"),
        (
            ["convert", "timm:test_vit", "a/b", "--patch-size", "8"],
            "does not exist: convert takes a file or a directory",
        ),
        (
            ["sweep", *VIT, "--patch-size", "16", "--output", "x", "--limit", "few"],
            "'--limit': must be an integer, got 'few'",
        ),
        (["sweep", *VIT, "--patch-size", "16", "--output", __file__], "is a file: name a folder"),
        (["tune", *VIT, "--patch-size", "32", "--images", "x", "--output", __file__], "is a file: name a folder"),
        (["tune", *VIT, "--patch-size", "32", "--images", "x", "--output", "y", "--steps=1.5"], "got '1.5'"),
        (
            ["sweep", *VIT, "--patch-size", "16", "--output", "x", "--batch-size", "0"],
            "--batch-size must be a whole number of",
        ),
        (["demo", "--output", "/"], "/ is a folder: name a file"),
        (["frobnicate"], "frobnicate"),
        (["adapt", *VIT, "--patch-size", "8"], "--output"),
    ],
)
def test_errors_are_one_line_and_exit_with_two(
    arguments: list[str], message: str, anypatch: Anypatch, tmp_path: Path
) -> None:
    result = anypatch(*arguments)
    assert result.returncode == 2
    # a busy machine may take the ten seconds after which progress is told
    lines = [line for line in result.stderr.strip().splitlines() if not re.search(r", after \d+ s$", line)]
    assert len(lines) == 1, result.stderr
    assert message in lines[0]
    assert result.stderr.count("error:") == 1
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_raises_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["inspect", "nonsense", "--debug"], ["--debug", "inspect", "nonsense"]):
        monkeypatch.setattr(sys, "argv", ["anypatch", *arguments])
        with pytest.raises(package.UnsupportedModelError, match="'nonsense'"):
            cli.main()


# -- what is there already ---------------------------------------------------------------------------------------


def test_nothing_is_replaced_unasked(anypatch: Anypatch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = anypatch("adapt", *VIT, "--patch-size", "32", "--output", "out")
    assert first.returncode == 0, first.stderr
    kept = {p.name: p.read_bytes() for p in out.iterdir()}
    for again in (
        ["adapt", *VIT, "--patch-size", "8", "--output", "out"],
        ["adapt", "out", "--patch-size", "8", "--output", "out"],
        ["adapt", "timm:local-dir:out", "--patch-size", "8", "--output", "out"],
        ["convert", "out", "out", "--patch-size", "8"],
        ["convert", "out/model.safetensors", "out/model.safetensors", "--patch-size", "8"],
    ):
        result = anypatch(*again)
        assert result.returncode == 2
        assert "--overwrite" in result.stderr
        assert {p.name: p.read_bytes() for p in out.iterdir()} == kept
    result = anypatch("adapt", "out", "--patch-size", "8", "--output", "out", "--overwrite")
    assert result.returncode == 0, result.stderr
    assert package.geometry(package.load(out)).patch_size == (8, 8)
    result = anypatch("convert", "out", "out", "--patch-size", "16", "--overwrite")
    assert result.returncode == 0, result.stderr
    assert package.geometry(package.load(out)).patch_size == (16, 16)


def test_an_empty_directory_is_free(anypatch: Anypatch, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert anypatch("adapt", *VIT, "--patch-size", "32", "--output", "out").returncode == 0


def test_formats_are_not_mixed(anypatch: Anypatch, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "dinov2"}')
    for overwrite in ([], ["--overwrite"]):
        result = anypatch("adapt", *VIT, "--patch-size", "32", "--output", "hf", *overwrite)
        assert result.returncode == 2
        assert [p.name for p in (tmp_path / "hf").iterdir()] == ["config.json"]
    assert "transformers" in result.stderr


# -- values of options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("False", False),
        ("false", False),
        ("True", True),
        ("true", True),
        ("None", None),
        ("null", None),
        ("10", 10),
        ("1e-3", 1e-3),
        ("[1, 2]", [1, 2]),
        ("(1, 2)", (1, 2)),
        ('{"a": True}', {"a": True}),
        ("{'a': 1}", {"a": 1}),
        ('"False"', "False"),
        ("openai", "openai"),
        ("__import__('os')", "__import__('os')"),
        ("(" * 5000, "(" * 5000),
        ("", ""),
    ],
)
def test_values_are_read_as_python_and_json_write_them(text: str, value: object) -> None:
    found = read_value(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("timm:vit_tiny_patch16_224", "patch size 15x15 does not divide image size 224x224"),
        ("torchvision:vit_b_32/DEFAULT", "patch size 15x15 does not divide image size 224x224"),
        ("timm:xcit_nano_12_p16_224", "not one linear map per patch"),
    ],
)
def test_sizes_are_looked_at_before_weights_are_downloaded(anypatch: Anypatch, source: str, says: str) -> None:
    """No network here: what is said instead is of the sizes."""
    result = anypatch("adapt", source, "--patch-size", "15", "--output", "out")
    assert result.returncode
    assert says in result.stderr


def test_no_weights_are_loaded_unless_asked(anypatch: Anypatch) -> None:
    """No network here: `timm:vit_tiny_patch16_224` cannot be downloaded."""
    assert "224x224" in anypatch("inspect", "timm:vit_tiny_patch16_224").stdout
    result = anypatch("inspect", "timm:vit_tiny_patch16_224", "--weights")
    assert result.returncode == 2
    assert "without a network" in result.stderr
    result = anypatch("adapt", "open_clip:ViT-B-32", "--patch-size", "16", "--output", "x")
    assert result.returncode == 2
    assert "open_clip:ViT-B-32/TAG: openai" in result.stderr


def test_a_cache_and_none(anypatch: Anypatch) -> None:
    both = ["--cache", "c", "--no-cache"]
    result = anypatch("sweep", "timm:test_vit", "--patch-size", "8", "--data", "d", "--output", "o", *both)
    assert (result.returncode, result.stderr) == (2, "error: give --cache or --no-cache, not both\n")


def test_an_entry_point_without_the_option_is_built_as_it_is(anypatch: Anypatch, tmp_path: Path) -> None:
    (tmp_path / "hubconf.py").write_text(
        "import timm\ndef one():\n    return timm.create_model('test_vit')\n"
        "def two(pretrained=True):\n    assert not pretrained\n    return timm.create_model('test_vit')\n"
    )
    for name in ("one", "two"):
        result = anypatch("inspect", f"hub:{tmp_path}:{name}")
        assert result.returncode == 0, result.stderr
        assert "VisionTransformer" in result.stdout


# -- for programs ------------------------------------------------------------------------------------------------


def test_json(anypatch: Anypatch, tmp_path: Path) -> None:
    found = json.loads(anypatch("inspect", *VIT, "--json").stdout)
    assert found["patch_size"] == [16, 16]
    assert found["grid"] == [10, 10]
    assert found["library"] == "timm"
    assert "changes" not in found
    found = json.loads(anypatch("inspect", *VIT, "--json", "--patch-size", "32").stdout)
    assert found["adapted"]["patch_size"] == [32, 32]
    assert found["adapted"]["grid"] == [5, 5]
    changes = {c["name"]: c for c in found["changes"]}
    assert changes["patch_embed.proj.weight"]["role"] == "patch projection"
    found = json.loads(anypatch("check", *VIT, "--json", "--patch-size", "32").stdout)
    assert found["passed"] is True
    assert 0 < found["error"] < 1e-4
    result = anypatch("adapt", *VIT, "--json", "--patch-size", "33", "--image-size", "nearest", "--output", "out")
    found = json.loads(result.stdout)
    assert found["before"]["image_size"] == [160, 160]
    assert found["after"] == {
        "patch_size": [33, 33], "image_size": [165, 165], "grid": [5, 5], "prefix_tokens": 1, "library": "timm"
    }  # fmt: skip
    result = anypatch("convert", "out", "there", "--patch-size", "11", "--image-size", "nearest", "--json")
    assert json.loads(result.stdout)["target"] == "there"
    assert package.geometry(package.load(tmp_path / "there")).grid == (15, 15)


@pytest.mark.slow
def test_sweep_and_view_take_the_nearest_size_and_print_lines(anypatch: Anypatch, tmp_path: Path) -> None:
    from builders import image_folder

    folder = image_folder(tmp_path / "photos", 2)
    common = ["--patch-size", "16,33", "--image-size", "nearest"]
    small = ["--images", str(folder), "--no-cache", "--batch-size", "2", "--device", "cpu", "--workers", "0"]
    result = anypatch("sweep", *VIT, *common, *small, "--output", "swept", "--quiet")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    head, *rows = (line.split("\t") for line in result.stdout.splitlines())
    assert head[:2] == ["patch_size", "image_size"]
    assert [row[:2] for row in rows] == [["16", "160"], ["33", "165"]]
    assert all(len(row) == len(head) for row in rows)
    drawn = [*common, *small, "--output", "swept", "--figure", "seen/sweep.svg"]
    found = json.loads(anypatch("sweep", *VIT, *drawn, "--quiet", "--json").stdout)
    assert (tmp_path / "seen" / "sweep.svg").read_text().startswith("<?xml")
    assert [row["image_size"] for row in found["rows"]] == [160, 165]
    picture = next(folder.glob("*/*.png"))
    result = anypatch("view", *VIT, str(picture), *common, "--output", "seen/v.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "seen" / "v.png").is_file()


@pytest.mark.parametrize(("terminal", "before", "after"), [(True, None, "1"), (False, None, "1"), (True, "0", "0")])
def test_bars_of_other_libraries_are_off_unless_asked_for(
    terminal: bool, before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal, too: above a bar of ours they stand still at 0 %, and stay there."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", before or "")  # so that it is put back
    if before is None:
        monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr(sys, "argv", ["anypatch", "--version"])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == after


@pytest.mark.slow  # a process that imports transformers
def test_a_terminal_sees_no_bar_but_ours(tmp_path: Path) -> None:
    """transformers' own, of loading and of writing, under a pseudo-terminal."""
    import fcntl
    import pty
    import struct
    import termios

    from transformers import Dinov2Config, Dinov2Model

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(tmp_path / "dino")
    own, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("4H", 40, 80, 0, 0))  # rows and columns: bars need some
    command = ["adapt", str(tmp_path / "dino"), "--patch-size", "7", "--output", str(tmp_path / "seven")]
    with subprocess.Popen([sys.executable, "-m", "anypatch", *command], stdout=other, stderr=other) as process:
        os.close(other)
        said = b""
        while True:
            try:
                said += (part := os.read(own, 1 << 16))
            except OSError:  # nobody holds the other end any more
                break
            if not part:
                break
    os.close(own)
    assert process.returncode == 0, said
    assert b"patch 14x14 -> 7x7" in said
    assert b"it/s" not in said
    assert b"%|" not in said


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (
            80,
            [
                "patch  images per second  accuracy",
                "8                   12.0     0.901",
                "16                  48.0     0.897",
            ],
        ),
        (34, ["patch                 8     16", "images per second  12.0   48.0", "accuracy          0.901  0.897"]),
        (20, ["patch 8", "  images per second  12.0", "  accuracy           0.901"]),
    ],
)
def test_numbers_stand_side_by_side(
    width: int, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(output, "terminal", lambda: True)
    output.table(
        ("patch", "images per second", "accuracy"), (("8", "12.0", "0.901"), ("16", "48.0", "0.897")), right=True
    )
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()][: len(expected)] == [
        " ".join(line.split()) for line in expected
    ]


def test_a_pipe_gets_whole_words(anypatch: Anypatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    lines = anypatch("inspect", *VIT, "--patch-size", "32").stdout.splitlines()
    assert "patch_embed.proj.weight\tpatch projection\t(64, 3, 16, 16)\t(64, 3, 32, 32)\ttensor" in lines
    assert "patch_embed.patch_size\tattribute\t(16, 16)\t(32, 32)\tattribute" in lines
    assert "patch size\t16x16 -> 32x32" in lines
    assert "grid\t10x10 -> 5x5" in lines
    assert "\x1b" not in "".join(lines)


@pytest.mark.usefixtures("wide")
def test_a_terminal_of_80_columns_gets_whole_words(anypatch: Anypatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = anypatch("inspect", *VIT, "--patch-size", "32").stdout
    for word in (
        "patch_embed.proj.weight",
        "absolute positions (1 + 10x10 tokens)",
        "(64, 3, 32, 32)",
        "2 tensors, resampled",
        " set anew",
    ):
        assert word in shown
    output.table(("patch", "fidelity"), [("8", "0.98"), ("16", "1.00")], right=True)
    table = capsys.readouterr().out.splitlines()
    assert [line.split() for line in table] == [["patch", "fidelity"], ["8", "0.98"], ["16", "1.00"]]
    names = ["patch", *(f"measurement {i}" for i in range(10))]
    output.table(names, [[str(i) for i in range(11)]], right=True)
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    assert max(map(len, shown.splitlines())) <= 80


def test_completion_is_offered(anypatch: Anypatch) -> None:
    assert "--install-completion" in anypatch("--help").stdout


# -- while it works ----------------------------------------------------------------------------------------------


def test_a_log_says_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with stderr.working("loading"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""  # what is quick says nothing
    monkeypatch.setattr("anypatch.report.progress.EVERY", 0.05)
    with stderr.working("loading") as log:
        time.sleep(0.12)  # nothing is reported, and still it is seen to live
        log("patch 16, photos", 3, 9)
        time.sleep(0.12)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "loading, after 0 s"
    assert lines[-1] == "patch 16, photos: 3 of 9, after 0 s"
    assert 2 <= len(lines) <= 5
    with stderr.working("loading", quiet=True) as report:
        report("x", 1, 2)
        time.sleep(0.12)
    assert capsys.readouterr().err == ""


def test_notes_are_ours_by_their_class_not_by_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    def warn(category: type[Warning], path: str) -> None:
        warnings.warn_explicit("the head is new", category, path, 1)

    with stderr.notes():
        warn(AnypatchWarning, "/somewhere/else.py")
        warn(UserWarning, "/envs/anypatch/lib/python/site-packages/other/x.py")
    assert capsys.readouterr().err == "note: the head is new\n"
    with stderr.notes(quiet=True):
        warn(AnypatchWarning, "/x.py")
    assert capsys.readouterr().err == ""
    with stderr.notes(debug=True):
        warn(UserWarning, "/other.py")
    assert "UserWarning: the head is new" in capsys.readouterr().err


def test_every_warning_of_the_package_is_of_its_class() -> None:
    import ast

    for path in (Path(package.__file__).parent).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                assert "AnypatchWarning" in ast.unparse(node), f"{path}:{node.lineno}"


def test_ctrl_c_is_130_and_a_word(anypatch: Anypatch, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anypatch.sources.load", interrupt)
    result = anypatch("inspect", *VIT)
    assert result.returncode == 130
    assert result.stderr == "interrupted\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_what_ends_a_process_ends_it_as_ctrl_c_does(
    anypatch: Anypatch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """While a file is written that would replace one: the old one is whole, and nothing lies beside it."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # as it is not under nohup
    write = shards.write_safetensors

    def half(file: Any, *arguments: Any) -> None:
        file.write(b"half")
        signal.raise_signal(number)
        write(file, *arguments)

    monkeypatch.setattr(shards, "write_safetensors", half)
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    (tmp_path / "out.safetensors").write_text("old")
    result = anypatch("convert", "vit.safetensors", "out.safetensors", "--patch-size", "8", "--overwrite")
    assert result.returncode == 128 + number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "vit.safetensors"]
    assert (tmp_path / "out.safetensors").read_text() == "old"
    assert signal.signal(number, before) is signal.SIG_DFL


@pytest.mark.slow
def test_a_reader_who_leaves_ends_it_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "anypatch", "--help"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert done.returncode in (1, 141)  # 1 where the help is printed, by typer itself
    assert done.stderr == ""


def test_what_nobody_expected_is_still_one_line(anypatch: Anypatch, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("anypatch.sources.load", fail)
    result = anypatch("inspect", *VIT)
    assert result.returncode == 2
    assert result.stderr == "error: RuntimeError: two lines (--debug shows where)\n"
