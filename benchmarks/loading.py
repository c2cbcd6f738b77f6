"""How fast a checkpoint file loads at another patch size, and how much memory it takes.

    python benchmarks/loading.py [--models vit_base_patch16_224 vit_large_patch16_224] [--runs 5]

Writes random weights to a file, then times, each in a process of its own, with everything imported and the file in the
page cache:

- ``timm``: ``timm.create_model(name, pretrained=True, patch_size=32, pretrained_cfg_overlay={"file": path})``
- ``anypatch``: ``anypatch.load(path, patch_size=32, arch=name)``
- ``transformers``: ``from_pretrained`` at the native size, and ``anypatch.load(directory, patch_size=16)`` (``--clip``)
- ``convert``: ``anypatch.convert(directory, target, patch_size=28)``, everything imported, against ``cp -r``, in turn
  (``--convert GIB``)

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
import timm, anypatch, anypatch.sources, anypatch.conversion, anypatch.hosts.timm.model, accelerate, safetensors.torch
name, path, how = sys.argv[1:4]
if "transformers" in how:
    import transformers, anypatch.hosts.transformers.model
def timm_way():
    overlay = {"file": path, "custom_load": False}
    return timm.create_model(name, pretrained=True, patch_size=32, pretrained_cfg_overlay=overlay)
ways = {
    "timm": timm_way,
    "anypatch": lambda: anypatch.load(path, patch_size=32, arch="timm:" + name),
    "transformers": lambda: getattr(transformers, name).from_pretrained(path),
    "transformers+anypatch": lambda: anypatch.load(path, patch_size=16),
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

# A virtual machine hands free memory back to its host after a second or two, and getting it again takes longer than the
# copy: so a process touches as much as will be needed right before each of the two.
TOUCH = "import sys; bytes(b'x' * int(sys.argv[1]))"
CONVERT = """
import json, subprocess, sys, time
import anypatch, anypatch.hosts.transformers.opening, transformers.models.clip.modeling_clip
subprocess.run(json.loads(sys.argv[3]), check=True)
start = time.perf_counter()
anypatch.convert(sys.argv[1], sys.argv[2], patch_size=28)
took = time.perf_counter() - start
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
print(json.dumps({"convert": took, "peak": peak}))
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
    print(f"transformers CLIP ViT-B/32, from_pretrained {base['load']:.3f} s, load at patch 16 {ours['load']:.3f} s")
    shutil.rmtree(directory)


def convert(gib: float, runs: int, place: Path) -> None:
    """A sharded CLIP of about ``gib`` GiB, a quarter of one of which is its text tower."""
    import torch
    import transformers

    layers = max(2, int((gib - 0.25) * 2**30 / 4 / (12 * 1280**2)))
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
    target = place / "target"
    touch = [sys.executable, "-c", TOUCH, str(size)]

    def timed(arguments: list[str]) -> tuple[float, dict[str, float]]:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        subprocess.run(touch, check=True)
        start = time.perf_counter()
        said = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
        return time.perf_counter() - start, json.loads(said.splitlines()[-1]) if said else {}

    command = [sys.executable, "-W", "ignore", "-c", CONVERT, str(directory), str(target), json.dumps(touch)]
    rounds = [(timed(["cp", "-r", str(directory), str(target)])[0], *timed(command)) for _ in range(runs)]
    copy = statistics.median(r[0] for r in rounds)
    whole = statistics.median(r[1] for r in rounds)
    ours = statistics.median(r[2]["convert"] for r in rounds)
    ratios = sorted(r[2]["convert"] / r[0] for r in rounds)
    high = max(r[2]["peak"] for r in rounds)
    print(
        f"convert of {size / 2**30:.2f} GiB in {len(list(directory.glob('*.safetensors')))} shards, {runs} runs, "
        f"median: {ours:.2f} s, and start-up {whole - ours:.2f} s; cp -r {copy:.2f} s; "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
        f"peak memory {high / 2**20:.0f} MiB"
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
            convert(options.convert, options.runs, Path(place))


if __name__ == "__main__":
    main()
