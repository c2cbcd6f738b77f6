"""How fast a checkpoint file loads at another patch size, and how much memory it takes.

    python benchmarks/loading.py [--models vit_base_patch16_224 vit_large_patch16_224] [--runs 5]

Writes random weights to a file, then times, each in a process of its own, with everything imported and the file in the
page cache:

- ``timm``: ``timm.create_model(name, pretrained=True, patch_size=32, pretrained_cfg_overlay={"file": path})``
- ``anypatch``: ``anypatch.load(path, patch_size=32, arch=name)``
- ``transformers``: ``from_pretrained`` at the native size, and ``anypatch.load(directory, patch_size=32)`` (``--clip``)
- ``convert``: ``anypatch.convert(directory, target, patch_size=...)`` against ``cp -r`` and a flush (``--convert GIB``)

Every loaded model is used: the sum of all parameters is part of the time ("and read"), as mapped bytes cost nothing
until then. Memory is the peak beyond what the process held before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROBE = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import timm, anypatch, anypatch.sources, anypatch.checkpoint, anypatch.libraries.timm, accelerate, safetensors.torch
name, path, how = sys.argv[1:4]
if "transformers" in how:
    import transformers, anypatch.libraries.transformers
def timm_way():
    overlay = {"file": path, "custom_load": False}
    return timm.create_model(name, pretrained=True, patch_size=32, pretrained_cfg_overlay=overlay)
ways = {
    "timm": timm_way,
    "anypatch": lambda: anypatch.load(path, patch_size=32, arch="timm:" + name),
    "transformers": lambda: getattr(transformers, name).from_pretrained(path),
    "transformers+anypatch": lambda: anypatch.load(path, patch_size=32),
}
def peak():
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024, int(lines["VmRSS"].split()[0]) * 1024
timm.create_model("vit_tiny_patch16_224", patch_size=32, depth=1)  # caches that every process fills once
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
_, before = peak()
start, cpu = time.perf_counter(), time.process_time()
model = ways[how]()
loaded, cpu_loaded = time.perf_counter() - start, time.process_time() - cpu
sum(p.detach().float().sum().item() for p in model.parameters())
read = time.perf_counter() - start
high, _ = peak()
print(json.dumps({"load": loaded, "cpu": cpu_loaded, "read": read, "peak": high - before}))
"""


def probe(name: str, path: Path, how: str, runs: int) -> dict[str, float]:
    """The median of several processes."""
    results = []
    for _ in range(runs):
        said = subprocess.run([sys.executable, "-c", PROBE, name, str(path), how], capture_output=True, text=True)
        if said.returncode:
            raise SystemExit(said.stderr[-2000:])
        results.append(json.loads(said.stdout.splitlines()[-1]))
    return {key: statistics.median(r[key] for r in results) for key in results[0]}


def files(names: list[str], runs: int, place: Path) -> None:
    import timm
    from safetensors.torch import save_file

    for name in names:
        path = place / f"{name}.safetensors"
        save_file(timm.create_model(name).state_dict(), path)
        size = path.stat().st_size
        base = probe(name, path, "timm", runs)
        ours = probe(name, path, "anypatch", runs)
        print(f"{name} ({size / 2**20:.0f} MiB), {runs} runs, median")
        for label, result in (("timm", base), ("anypatch", ours)):
            print(
                f"  {label:9s} load {result['load']:.3f} s (cpu {result['cpu']:.3f}), and read {result['read']:.3f} s, "
                f"peak {result['peak'] / size:.2f} x file"
            )
        print(
            f"  ratio     load {base['load'] / ours['load']:.1f}, cpu {base['cpu'] / ours['cpu']:.1f}, "
            f"and read {base['read'] / ours['read']:.1f}"
        )
        path.unlink()


def clip(runs: int, place: Path) -> None:
    import transformers

    directory = place / "clip"
    transformers.CLIPModel(transformers.CLIPConfig()).save_pretrained(directory)
    base = probe("CLIPModel", directory, "transformers", runs)
    ours = probe("CLIPModel", directory, "transformers+anypatch", runs)
    print(f"transformers CLIP ViT-B/32, from_pretrained {base['load']:.3f} s, load at patch 32 {ours['load']:.3f} s")
    shutil.rmtree(directory)


def convert(gib: float, place: Path) -> None:
    """A sharded CLIP of about ``gib`` GiB."""
    import torch
    import transformers

    layers = max(2, round(gib * 2**30 / 4 / (12 * 1280**2)))
    vision: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16}
    config = transformers.CLIPConfig(vision_config={**vision, "num_hidden_layers": layers, "patch_size": 14})
    directory = place / "big"
    with torch.device("meta"):
        model = transformers.CLIPModel(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(directory, max_shard_size="500MB")
    del model
    size = sum(p.stat().st_size for p in directory.iterdir())
    command = "import sys, anypatch; anypatch.convert(sys.argv[1], sys.argv[2], patch_size=28)"
    empty = "import sys, anypatch.converting, transformers, transformers.models.clip.modeling_clip"

    def timed(arguments: list[str], target: Path | None = None) -> tuple[float, int]:
        if target is not None and target.exists():
            shutil.rmtree(target)
        os.sync()
        start = time.perf_counter()
        process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
        _, _, usage = os.wait4(process.pid, 0)
        return time.perf_counter() - start, usage.ru_maxrss * 1024

    target = place / "target"
    script = f"cp -r {directory} {target}"
    copy = min(timed(["sh", "-c", script], target)[0] for _ in range(3))
    flushed = min(timed(["sh", "-c", f"{script} && sync {target}/* {target}"], target)[0] for _ in range(3))
    start_up = min(timed([sys.executable, "-W", "ignore", "-c", empty])[0] for _ in range(3))
    ours = [
        timed([sys.executable, "-W", "ignore", "-c", command, str(directory), str(target)], target) for _ in range(3)
    ]
    best = min(t for t, _ in ours)
    print(
        f"convert of {size / 2**30:.2f} GiB in {len(list(directory.glob('*.safetensors')))} shards: {best:.2f} s, of "
        f"which start-up {start_up:.2f} s; cp -r {copy:.2f} s, with a flush {flushed:.2f} s; "
        f"({best - start_up:.2f} s / cp = {(best - start_up) / copy:.2f}, / flushed cp = "
        f"{(best - start_up) / flushed:.2f}); peak memory {max(m for _, m in ours) / 2**20:.0f} MiB"
    )
    shutil.rmtree(directory)
    shutil.rmtree(target)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of loading and converting checkpoints.")
    parser.add_argument("--models", nargs="*", default=["vit_base_patch16_224", "vit_large_patch16_224"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--clip", action="store_true", help="also transformers' CLIP")
    parser.add_argument("--convert", type=float, metavar="GIB", help="also convert a sharded CLIP of this size")
    parser.add_argument("--place", type=Path, help="directory for the files (a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        files(options.models, options.runs, Path(place))
        if options.clip:
            clip(options.runs, Path(place))
        if options.convert:
            convert(options.convert, Path(place))


if __name__ == "__main__":
    main()
