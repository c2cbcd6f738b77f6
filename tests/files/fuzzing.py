"""Damaged and hostile files: how they are made from good ones, and what reading them may not do."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import resource
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1]
OPCODES = (
    b"(.)]}\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x93\x94\x95\x52\x62\x63\x68\x6a\x71\x72\x74\x75\x58\x4a\x4b\x4d\x51"
)
ZIP = b"PK\x03\x04"
# What a program may take for one input above what it had, whatever the input says.
PEAK = 1 << 30


def mutate(data: bytes, seeds: list[bytes], chance: random.Random) -> bytes:
    """One to four changes: bits, numbers, pickle opcodes, digits of a header, cuts, copies, parts of other files.

    Half of the archives are changed inside, with checksums that agree: else nothing behind a checksum is ever reached.
    """
    if data.startswith(ZIP) and chance.random() < 0.5:
        inside = _record_changed(data, seeds, chance)
        if inside is not None:
            return inside
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if not result:
            break
        _change(result, seeds, chance)
    return bytes(result)


def _change(result: bytearray, seeds: list[bytes], chance: random.Random) -> None:
    at = chance.randrange(len(result))
    how = chance.randrange(9)
    if how == 0:
        result[at] ^= 1 << chance.randrange(8)
    elif how == 1:
        result[at] = chance.randrange(256)
    elif how == 2:
        width = chance.choice((1, 2, 4, 8))
        result[at : at + width] = (chance.choice(NUMBERS) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    elif how == 3:
        result[at] = chance.choice(OPCODES)
    elif how == 4:
        digits = [i for i, byte in enumerate(result[:400]) if 48 <= byte <= 57]
        if digits:
            result[chance.choice(digits)] = chance.choice(b"0123456789-.eE")
    elif how == 5:
        del result[at:]
    elif how == 6:
        del result[at : at + chance.randrange(1, 64)]
    elif how == 7:
        result[at:at] = result[at : at + chance.randrange(1, 64)] * chance.choice((1, 2, 50))
    else:
        other = chance.choice(seeds)
        start = chance.randrange(len(other))
        piece = other[start : start + chance.randrange(1, 64)]
        result[at : at + len(piece)] = piece


def _record_changed(data: bytes, seeds: list[bytes], chance: random.Random) -> bytes | None:
    """An archive with one record changed, doubled, renamed, left out or compressed; ``None`` of no archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            records = [(info.filename, old.read(info)) for info in old.infolist()]
    except Exception:
        return None
    pickles = [i for i, (name, _) in enumerate(records) if name.endswith((".pkl", ".npy"))]
    at = chance.choice(pickles) if pickles and chance.random() < 0.8 else chance.randrange(len(records))
    name, inner = records[at]
    how = chance.randrange(8)
    packed = zipfile.ZIP_STORED
    if how == 0:
        del records[at]
    elif how == 1:
        records.append((name, chance.choice(records)[1]))
    elif how == 2:
        records[at] = (chance.choice(records)[0] + chance.choice(("", "x", "/../x", "/")), inner)
    elif how == 3:
        packed = zipfile.ZIP_DEFLATED
        records[at] = (name, inner * chance.choice((1, 1000)))
    else:
        changed = bytearray(inner or b"x")
        for _ in range(chance.choice((1, 1, 2, 4))):
            if changed:
                _change(changed, seeds, chance)
        records[at] = (name, bytes(changed))
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as new:
        warnings.simplefilter("ignore")  # a name that occurs twice is meant
        for name, inner in records:
            new.writestr(name, inner, packed)
    return buffer.getvalue()


# -- configurations ----------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 1.5, 1e308, float("inf"), float("nan"), 10**4, 10**6, 10**9, 2**31, 2**63,
    10**30, "", "x", "0", "gelu", "auto", "\x00", "../x", "/etc/passwd", "https://example.org/x", "evil", "evil/evil",
    "evil:evil", "local-dir:evil", "hf-hub:evil/evil", "__import__('os')", "x" * 10_000, [], {}, [[]], [1], [2, 3],
    [1, 2, 3, 4], ["x"], {"x": 1}, {"height": 32, "width": 32}, {"shortest_edge": 10**9}, [0] * 1000, "bfloat16",
    "torch.float32", "float4", "os.system", ["evil.py", None], {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"},
)  # fmt: skip
# What configurations of the libraries say of other places, of code, and of sizes.
KEYS: tuple[str, ...] = (
    "auto_map", "architectures", "model_type", "_name_or_path", "backbone", "use_pretrained_backbone",
    "backbone_config", "backbone_kwargs", "use_timm_backbone", "pretrained_cfg", "pretrained", "checkpoint_path",
    "file", "url", "hf_hub_id", "source", "custom_load", "text_model_name", "tokenizer_class",
    "image_processor_type", "processor_class", "model_args", "quantization_config", "quant_method",
    "attn_implementation", "_attn_implementation", "dtype", "torch_dtype", "num_labels", "id2label", "label2id",
    "base_model_name_or_path", "auto_mapping", "peft_type", "trust_remote_code", "transformers_version",
    "custom_pipelines", "base_model_tp_plan", "device_map", "_from_auto", "weight_map", "metadata", "hf_model_name",
    "hf_tokenizer_name", "hf_tokenizer_kwargs", "timm_model_name", "timm_model_pretrained", "image_size",
    "patch_size", "num_channels", "hidden_size", "num_attention_heads", "text_config", "vision_config",
    "torchscript", "tie_word_embeddings", "pruned_heads", "chunk_size_feed_forward", "problem_type", "use_cache",
    "return_dict", "is_encoder_decoder", "experts_implementation", "subfolder", "revision", "repo_id",
    "_commit_hash",
)  # fmt: skip


def mutate_json(value: Any, chance: random.Random, keys: tuple[str, ...] = KEYS) -> Any:
    """A table with one to three of its values, at any depth, exchanged, left out, moved, doubled, or new."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        tables = [v for v in [value, *(c[k] for c, k in places)] if isinstance(v, dict)]
        how = chance.randrange(6)
        if how <= 2 and places:
            holder, key = chance.choice(places)
            holder[key] = copy.deepcopy(chance.choice(ODD)) if how else _near(holder[key], chance)
        elif how == 3 and places:
            holder, key = chance.choice(places)
            del holder[key]
        elif how == 4 and places:
            (one, a), (two, b) = chance.choice(places), chance.choice(places)
            one[a] = copy.deepcopy(two[b])
        elif tables:
            chance.choice(tables)[chance.choice(keys)] = copy.deepcopy(chance.choice(ODD))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    stack = [value]
    while stack:
        holder = stack.pop()
        items = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
        for key, item in items:
            yield holder, key
            if isinstance(item, (dict, list)) and len(item) < 200:
                stack.append(item)


def _near(value: Any, chance: random.Random) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        near = (value + 1, value - 1, -value, value * 2, value * 1000, value * 10**7, 0, float(value), str(value))
        return chance.choice(near)
    if isinstance(value, float):
        return chance.choice((-value, value * 1e6, 0.0, str(value), repr(value) * 2))
    if isinstance(value, str):
        return chance.choice((value + "x", value[:-1], value.upper(), "/" + value, "../" + value, [value], value * 100))
    if isinstance(value, list):
        return chance.choice((value * 2, value[:-1], value[::-1], [value], dict(enumerate(map(str, value)))))
    if isinstance(value, dict):
        return chance.choice(([value], list(value), {"x": value}, dict.fromkeys(value)))
    return chance.choice((0, "x", [], {}))


def text_of(value: Any, chance: random.Random) -> bytes:
    """JSON as somebody may have written it."""
    text = json.dumps(value, default=str).encode("utf-8", "surrogatepass")
    if chance.random() < 0.05:
        text = mutate(text, [text], chance)
    return text


# -- what happens meanwhile --------------------------------------------------------------------------------------

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.", "pty.spawn",
             "os.remove", "os.rename", "os.mkdir", "shutil.", "ctypes.dlopen", "exec")  # fmt: skip


def watch(events: list[str], may_open: Callable[[str], bool] = lambda path: True, may_write: bool = False) -> None:
    """Record what only executed code would do, and which files are opened that should not be."""
    installed = (sys.prefix, sys.base_prefix)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "exec" and getattr(args[0], "co_filename", "").startswith(("<", *installed)):
            return  # torch imports a module of its own, a dataclass is made
        if event == "open" and isinstance(args[0], (str, os.PathLike, bytes)):
            path = os.path.abspath(os.fsdecode(args[0]))
            if not path.startswith(installed) and not may_open(path):
                events.append(f"open {path}")
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        harmless = may_write and event.startswith(("os.remove", "os.rename", "os.mkdir", "shutil."))
        if (event.startswith(FORBIDDEN) and not harmless) or (writes and not may_write):
            events.append(f"{event} {str(args)[:200]}")

    sys.addaudithook(hook)


def peak() -> int:
    """Bytes of memory that this process has had at most since :func:`forget_peak`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:"))


def forget_peak() -> int:
    """Begin to measure anew; what the process has now, in bytes."""
    descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY)
    os.write(descriptor, b"5")
    os.close(descriptor)
    return peak()


def in_a_process(work: Callable[[], str | None], place: Path) -> str | None:
    """Run in a process of bounded memory, so that a crash is a result like any other."""
    said = place / "said"
    process = os.fork()
    if process == 0:
        code = 1
        try:
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30),) * 2)
            message = work()
            code = 0
            if message is not None:
                os.write(os.open(said, os.O_WRONLY | os.O_CREAT), message.encode("utf-8", "replace"))
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    if said.exists():
        return said.read_text()
    code = os.waitstatus_to_exitcode(status)
    return None if code == 0 else f"the process ended with {code}; the input is in {place}"
