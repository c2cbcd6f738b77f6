"""What the library says of its arguments, as the command line has them: ``image_size=(224, 448)`` is
``--image-size 224x448``."""

from __future__ import annotations

import re

# Arguments whose option has another name. Those of the host library's own are passed by --option.
RENAMED = {"num_workers": "workers"}
OPTIONS = (
    *("patch_size", "image_size", "keep", "kernel", "positions", "arch", "prefix", "overwrite", "output", "device"),
    *("reference", "data", "images", "class_names", "limit", "batch_size", "num_workers", "cache", "figure"),
    *("minutes", "steps", "learning_rate", "lora", "seed", "precision", "resume", "link"),
)
PASSED = ("img_size", "num_classes", "pretrained", "trust_remote_code")
SAID = {
    "an int of at least": "a whole number of at least",
    "an int or a (height, width) pair": "a number of pixels, or HEIGHTxWIDTH",
    "anypatch.memory_limit(BYTES) or ANYPATCH_MEMORY_LIMIT": "the environment variable ANYPATCH_MEMORY_LIMIT=BYTES",
}
NAMES = "|".join(OPTIONS)
TWO_WORDS = "|".join(name for name in OPTIONS if "_" in name)
BEFORE, AFTER = r"(?<![\w.'\"`/-])(?<!json: )", r"(?![\w'\"`.(\[]|: )"  # no part of a path, of another name, of a field
SIZE = r"\d+(?:x\d+)*"
PAIR = r"\((\d+(?:, \d+)*),?\)"


def as_typed(message: str) -> str:
    """A message of the library's, its arguments written as options.

    >>> as_typed('patch_size 28x28 does not divide image_size 518x518: use image_size 504x504, or keep="grid"')
    'patch size 28x28 does not divide image size 518x518: use --image-size 504x504, or --keep grid'
    >>> as_typed("accepts only square images: image_size=(224, 224)")
    'accepts only square images: --image-size 224x224'
    """
    text = re.sub(rf"{BEFORE}({NAMES})=(?:\"([^\"]*)\"|'([^']*)'|{PAIR}|([\w.-]*\w)?)", _given, message)
    text = re.sub(rf"{BEFORE}({'|'.join(PASSED)})=(\([\w, ]+\)|[\w.-]*\w)", _passed, text)
    for of_python, typed in SAID.items():
        text = text.replace(of_python, typed)
    text = re.sub(
        rf"(\b(?:pass|give|without|leave out|needs|use an?|use|or|take)\s)({TWO_WORDS}) ({SIZE})", _asked, text
    )
    text = re.sub(
        rf"(\b(?:pass|without|leave out|needs|give|give either)\s)({NAMES})\b(?: (and|or) ({NAMES})\b)?", _advised, text
    )
    text = re.sub(rf"^({NAMES})(?= (?:must|needs|takes|are|is|names)\b)", lambda m: _flag(m[1]), text)
    text = re.sub(rf"{BEFORE}({TWO_WORDS}){AFTER}", lambda m: m[1].replace("_", " "), text)
    return re.sub(rf"\bgot {PAIR}", lambda m: f"got {_sides(m[1])}", text)


def _flag(name: str) -> str:
    return "--" + RENAMED.get(name, name).replace("_", "-")


def _sides(text: str) -> str:
    return "x".join(re.findall(r"\d+", text))


def _given(match: re.Match[str]) -> str:
    """``NAME=VALUE``; a name whose value is left to the reader keeps none, and a switch takes none."""
    name, *texts, pair, word = match.groups()
    value = _sides(pair) if pair else next((text for text in (*texts, word) if text), "")
    return _flag(name) if value in ("", "True") else f"{_flag(name)} {value}"


def _passed(match: re.Match[str]) -> str:
    """An argument of the host library's; quoted, as a shell would read its brackets."""
    typed = f"{match[1]}={match[2]}"
    return f"--option '{typed}'" if "(" in typed else f"--option {typed}"


def _asked(match: re.Match[str]) -> str:
    return f"{match[1]}{_flag(match[2])} {match[3]}"


def _advised(match: re.Match[str]) -> str:
    first = match[1].replace("pass ", "give ") + _flag(match[2])
    return first + (f" {match[3]} {_flag(match[4])}" if match[3] else "")
