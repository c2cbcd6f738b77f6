"""open_clip: its own towers and timm's, text towers untouched, preprocessing, save without anypatch."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import anypatch
from anypatch.core.empty import empty

pytest.importorskip("open_clip")
import open_clip
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2

TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
SIGLIP = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
CUSTOM = {
    "pool_type": "avg",
    "final_ln_after_pool": True,
    "ls_init_value": 0.1,
    "no_ln_pre": True,
    "mlp_ratio": 2.3,
    "qk_norm": True,
    "scale_fc": True,
    "scale_attn": True,
    "norm_kwargs": {"eps": 1e-6},
    "patch_dropout": 0.5,
}
COCA = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2, "output_tokens": True}


def config(name: str) -> dict:
    """Configurations in open_clip's own words."""
    return copy.deepcopy(
        {
            "clip": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True},
            "custom": {
                "embed_dim": 16,
                "vision_cfg": {**VISION, **CUSTOM},
                "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
                "custom_text": True,
                "init_logit_bias": -10.0,
            },
            "coca": {
                "embed_dim": 16,
                "vision_cfg": {**VISION, **COCA},
                "text_cfg": {**TEXT, "context_length": 7, "embed_cls": True, "output_tokens": True},
                "multimodal_cfg": {"width": 32, "context_length": 7, "layers": 1, "heads": 2},
                "custom_text": True,
            },
            "siglip": {"embed_dim": 64, "vision_cfg": SIGLIP, "text_cfg": TEXT, "custom_text": True},
        }[name]
    )


@pytest.fixture
def build(tmp_path):
    """Makes models by ``open_clip.create_model`` from configuration files."""

    def make(name: str, precision: str = "fp32"):
        folder = tmp_path / f"config-{name}"
        folder.mkdir(exist_ok=True)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config(name)}))
        model = open_clip.create_model(f"local-dir:{folder}", precision=precision).eval()
        if name == "coca":  # left uninitialised
            torch.nn.init.normal_(model.text_decoder.text_projection)
        return model

    return make


OWN = ["clip", "custom", "coca"]
CLASSES = {"clip": CLIP, "custom": CustomTextCLIP, "coca": CoCa, "siglip": CustomTextCLIP}


@pytest.mark.parametrize("name", OWN)
def test_own_towers_are_exact_when_the_patch_grows(build, name):
    model = build(name)
    assert type(model) is CLASSES[name]
    got = anypatch.geometry(model)
    assert (got.patch_size, got.image_size, got.prefix_tokens, got.library) == ((8, 8), (32, 32), 1, "open_clip")
    for patch in (9, (8, 12), (16, 10)):
        assert anypatch.check(model, patch).error < 1e-4


def test_a_bare_tower_is_exact_and_tokens_are_compared(build):
    result = anypatch.check(build("coca").visual, (12, 9))
    assert result.error < 1e-4
    assert result.compared == 2  # pooled and tokens


def test_the_proof_sees_positions(build, monkeypatch):
    """Exactness must break when the adaptation damages a table."""

    proof = importlib.import_module("anypatch.proof")
    plan_for = proof.plan_for

    def damaging(subject, *args, **kwargs):
        plan = plan_for(subject, *args, **kwargs)
        plan.apply()
        with torch.no_grad():
            subject.model.visual.positional_embedding[1:] = subject.model.visual.positional_embedding[1:].flip(0)

    monkeypatch.setattr(proof, "plan_for", damaging)
    assert anypatch.check(build("clip"), 12).error > 1e-2


@pytest.mark.parametrize("width", [48, 64])
def test_widths_that_equal_a_patch_are_no_patches(width):
    """Every ViT-B/32 has 3072 values in its MLPs, as many as a 32x32 patch of three channels."""
    vision = {
        "image_size": 32,
        "layers": 3,
        "width": width,
        "head_width": 16,
        "patch_size": 8,
        "mlp_ratio": 192 / width,
    }
    text = {"context_length": 7, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    anypatch.adapt(model, 16)
    assert model.visual.conv1.kernel_size == (16, 16)
    assert model.visual.transformer.resblocks[2].mlp.c_proj.in_features == 192


TRUNKS = [
    ("test_vit", "map", "none", 160, 16),
    ("test_vit2", "", "linear", 160, 16),
    ("test_vit3", "", "mlp", 160, 16),
    ("eva02_tiny_patch14_224", "token", None, 224, 14),
    ("vit_pe_core_tiny_patch16_384", "map", None, 384, 16),
    ("nest_tiny", "abs_attn", "", 224, 4),
]


def timm_clip(name: str, pool: str, proj: str | None, image: int) -> CustomTextCLIP:
    vision = {"image_size": image, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj}
    model = CustomTextCLIP(64, vision, TEXT).eval()
    blocks = getattr(model.visual.trunk, "blocks", None)
    if blocks is not None:
        model.visual.trunk.blocks = blocks[:1]
    return model


@pytest.mark.parametrize(("name", "pool", "proj", "image", "patch"), TRUNKS[:-1])
def test_timm_towers_are_exact_when_the_patch_grows(name, pool, proj, image, patch):
    model = timm_clip(name, pool, proj, image)
    got = anypatch.geometry(model)
    assert (got.patch_size, got.image_size, got.library) == ((patch, patch), (image, image), "open_clip")
    assert anypatch.check(model, (patch + 2, patch)).error < 1e-4


def test_attention_pool_of_a_timm_tower_follows_the_grid():
    model = timm_clip(*TRUNKS[-1][:4])
    table = model.visual.head.pool.pos_embed.detach().clone()
    anypatch.adapt(model, image_size=112)
    pool = model.visual.head.pool
    assert pool.feat_size == (7, 7)
    assert model.visual.trunk.pretrained_cfg["pool_size"] == (7, 7)  # which open_clip sizes the pool by
    grid = table[1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(7, 7), mode="bicubic", antialias=True).flatten(2)[0].T
    torch.testing.assert_close(pool.pos_embed, torch.cat([table[:1], grid]))
    assert model.encode_image(torch.randn(1, 3, 112, 112)).shape == (1, 64)


@pytest.mark.parametrize(("patch", "image"), [(4, 32), (16, (32, 48)), ((4, 8), (24, 32)), (8, (16, 64))])
def test_another_grid_equals_a_model_built_there(build, patch, image):
    model = build("clip")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    anypatch.adapt(model, patch, image, kernel="bilinear")

    pair = (patch, patch) if isinstance(patch, int) else patch
    sides = (image, image) if isinstance(image, int) else image
    cfg = config("clip")
    cfg["vision_cfg"] |= {"patch_size": patch, "image_size": image}
    reference = CLIP(**cfg).eval()
    size = tuple(i // p for i, p in zip(sides, pair, strict=True))
    table = state["visual.positional_embedding"]
    grid = table[1:].T.reshape(1, 32, 4, 4)
    grid = F.interpolate(grid, size=size, mode="bicubic", antialias=True).flatten(2)[0].T
    state["visual.positional_embedding"] = torch.cat([table[:1], grid])
    if pair != (8, 8):
        kernel = F.interpolate(state["visual.conv1.weight"], size=pair, mode="bilinear", antialias=True)
        state["visual.conv1.weight"] = kernel * (64 / (pair[0] * pair[1]))
    reference.load_state_dict(state)

    x = torch.randn(2, 3, *sides)
    torch.testing.assert_close(model.encode_image(x), reference.encode_image(x), rtol=1e-4, atol=1e-4)
    visual = model.visual
    assert (tuple(visual.grid_size), tuple(visual.image_size), tuple(visual.patch_size)) == (size, sides, pair)
    features = visual.forward_intermediates(x, intermediates_only=True)["image_intermediates"]
    assert features[0].shape == (2, 32, *size)


@pytest.mark.parametrize("name", [*OWN, "siglip"])
def test_text_tower_is_untouched(build, name):
    model = build(name)
    before = {k: (v, v.clone()) for k, v in model.state_dict(keep_vars=True).items() if not k.startswith("visual.")}
    text = torch.randint(1, 40, (2, 7 if name == "coca" else 8))
    expected = model.encode_text(text)
    anypatch.adapt(model, 4 if name != "siglip" else 20)
    after = model.state_dict(keep_vars=True)
    assert len(before) > 5
    for key, (tensor, value) in before.items():
        assert after[key] is tensor
        assert torch.equal(tensor, value)
    assert torch.equal(model.encode_text(text), expected)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_preprocessing_follows_the_image_size(build, name):
    image_module = pytest.importorskip("PIL.Image")
    model = build(name)
    shared = model.visual.preprocess_cfg
    anypatch.adapt(model, image_size=(64, 96))
    assert tuple(model.visual.preprocess_cfg["size"]) == (64, 96)
    assert tuple(shared["size"]) != (64, 96)  # the dictionary that others may hold is not written to
    pixels = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)(
        image_module.new("RGB", (300, 200))
    )
    assert pixels.shape == (3, 64, 96)
    assert torch.isfinite(model.encode_image(pixels[None])).all()
    assert tuple(model.visual.image_size) == (64, 96)


def test_half_precision_tower_keeps_its_dtypes(build):
    model = build("clip", precision="fp16")
    dtypes = {k: v.dtype for k, v in model.state_dict().items()}
    assert torch.float16 in dtypes.values()
    anypatch.adapt(model, 4)
    assert {k: v.dtype for k, v in model.state_dict().items()} == dtypes


def test_towers_without_a_linear_stem_are_refused():
    resnet = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "image_size": 64}
    with pytest.raises(anypatch.UnsupportedModelError, match=r"ModifiedResNet.*three convolutions"):
        anypatch.adapt(CLIP(16, resnet, TEXT), 32)
    fastvit = {"image_size": 64, "timm_model_name": "fastvit_t8", "timm_pool": "avg", "timm_proj": None}
    with pytest.raises(anypatch.UnsupportedModelError, match="overlapping"):
        anypatch.adapt(CustomTextCLIP(16, fastvit, TEXT), 8)
    convnext = {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}
    model = CustomTextCLIP(16, convnext, TEXT)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(anypatch.UnsupportedModelError, match="conv"):
        anypatch.adapt(model, 8)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


LOADER = """
import sys
sys.modules["anypatch"] = None
import torch, open_clip
torch.set_num_threads(1)
for directory in sys.argv[1:]:
    model = open_clip.create_model(f"local-dir:{directory}").eval()
    x, y, size = torch.load(f"{directory}/io.pt")
    assert torch.equal(model.encode_image(x), y), (model.encode_image(x) - y).abs().max()
    assert tuple(model.visual.preprocess_cfg["size"]) == size
"""


@pytest.mark.slow
def test_saved_models_load_without_anypatch(build, tmp_path: Path):
    directories = []
    for name, patch, image in (
        ("clip", (4, 8), (32, 48)),
        ("custom", 16, 48),
        ("coca", 4, 32),
        ("siglip", (20, 10), (80, 60)),
    ):
        model = build(name)
        anypatch.adapt(model, patch, image)
        size = (image, image) if isinstance(image, int) else image
        directory = tmp_path / name
        anypatch.save(model, directory)
        x = torch.randn(1, 3, *size)
        torch.save((x, model.encode_image(x).detach(), size), directory / "io.pt")
        directories.append(directory)
        loaded = anypatch.load(str(directory)).eval()
        assert torch.equal(loaded.encode_image(x), model.encode_image(x))
        assert anypatch.geometry(loaded) == anypatch.geometry(model)
    subprocess.run([sys.executable, "-c", LOADER, *map(str, directories)], check=True)

    moved = tmp_path / "moved"
    shutil.move(tmp_path / "siglip", moved)
    x, y, _ = torch.load(moved / "io.pt")
    assert torch.equal(anypatch.load(f"open_clip:local-dir:{moved}").eval().encode_image(x), y)
    cfg = open_clip.get_model_config(f"local-dir:{moved}")
    cfg["vision_cfg"]["timm_model_name"] = f"local-dir:{moved}/tower"
    model = open_clip.create_model(f"local-dir:{moved}", vision_cfg=cfg["vision_cfg"])
    assert torch.equal(model.eval().encode_image(x), y)


def test_a_timm_tower_with_its_own_pool_is_saved(tmp_path):
    model = timm_clip(*TRUNKS[-1][:4])
    anypatch.adapt(model, image_size=112)
    anypatch.save(model, tmp_path)
    x = torch.randn(1, 3, 112, 112)
    assert torch.equal(open_clip.create_model(f"local-dir:{tmp_path}").eval().encode_image(x), model.encode_image(x))


def saved_config(model, directory: Path, **kwargs) -> dict:
    anypatch.save(model, directory, **kwargs)
    return json.loads((directory / "open_clip_config.json").read_text())["model_cfg"]


@pytest.mark.parametrize("name", [*OWN, "siglip"])
def test_the_configuration_is_read_off_the_live_model(build, tmp_path, name):
    """Every word of the original configuration comes back, without being remembered."""
    got, want = saved_config(build(name), tmp_path / "saved"), config(name)
    for section in ("vision_cfg", "text_cfg"):
        for key, value in want[section].items():
            assert got[section][key] == (pytest.approx(value, abs=0.02) if isinstance(value, float) else value), key
    for key in set(want) - {"vision_cfg", "text_cfg", "multimodal_cfg"}:
        assert got[key] == want[key], key
    assert not (tmp_path / "saved" / "tower").exists()  # timm's own name has this geometry


def test_save_takes_the_tokenizer_from_a_name_or_from_load(tmp_path):
    text = {**TEXT, "hf_tokenizer_name": "some/tokenizer", "tokenizer_kwargs": {"clean": "canonicalize"}}
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "anypatch-tiny.json").write_text(
        json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text, "custom_text": True})
    )
    open_clip.add_model_config(folder)
    loaded = anypatch.load("open_clip:anypatch-tiny", 16, pretrained=False)
    assert loaded.visual.conv1.kernel_size == (16, 16)
    made = open_clip.create_model("anypatch-tiny")
    assert "hf_tokenizer_name" not in saved_config(made, tmp_path / "a")["text_cfg"]
    for model, name in ((made, "anypatch-tiny"), (copy.deepcopy(loaded), None)):
        got = saved_config(model, tmp_path / "b", name=name)["text_cfg"]
        assert (got["hf_tokenizer_name"], got["tokenizer_kwargs"]) == ("some/tokenizer", {"clean": "canonicalize"})


def test_errors_of_load_and_save(build, tmp_path):
    with pytest.raises(anypatch.UnsupportedModelError, match="no-such-model"):
        anypatch.load("open_clip:no-such-model/tag")
    with pytest.raises(anypatch.CheckpointError):
        anypatch.load("open_clip:ViT-B-32/no-such-tag")
    with pytest.raises(anypatch.CheckpointError):
        anypatch.load(f"open_clip:local-dir:{tmp_path}/nowhere")
    model = build("clip")
    with pytest.raises(anypatch.UnsupportedModelError, match="bare"):
        anypatch.save(model.visual, tmp_path / "x")
    model.visual.proj = torch.nn.Parameter(torch.zeros(32, 7))
    with pytest.raises(anypatch.UnsupportedModelError, match=r"visual\.proj"):
        anypatch.save(model, tmp_path / "x")


@pytest.mark.slow
@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_listed_model_adapts_or_says_why_not(name):
    """On the meta device, with one text layer: shapes and bookkeeping only."""
    cfg = open_clip.get_model_config(name)
    vision, timm_name = cfg["vision_cfg"], cfg["vision_cfg"].get("timm_model_name", "")
    vision["timm_model_pretrained"] = False
    if isinstance(vision.get("layers"), int):
        vision["layers"] = 1
    cls = CoCa if "multimodal_cfg" in cfg else CustomTextCLIP
    cfg["text_cfg"] = {**TEXT, "output_tokens": cls is CoCa, "embed_cls": cls is CoCa}
    for key in ("custom_text", "quick_gelu"):
        cfg.pop(key, None)
    model = empty(lambda: cls(**cfg))
    if isinstance(vision.get("layers"), list) or any(word in timm_name for word in ("fastvit", "vitamin", "mci")):
        with pytest.raises(anypatch.UnsupportedModelError):
            anypatch.adapt(model, 32, keep="grid")
        return
    old = anypatch.geometry(model)
    if timm_name.startswith("convnext"):
        with pytest.raises(anypatch.UnsupportedModelError):
            anypatch.adapt(model, 8, keep="grid")
        return
    patch = tuple(2 * side for side in old.patch_size)
    anypatch.adapt(model, patch, keep="grid")
    new = anypatch.geometry(model)
    assert (new.patch_size, new.grid) == (patch, old.grid)
    assert tuple(model.visual.image_size) == new.image_size
    anypatch.adapt(model, old.patch_size)
    assert anypatch.geometry(model).grid == tuple(2 * side for side in old.grid)
