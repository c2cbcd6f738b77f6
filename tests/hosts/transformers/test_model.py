"""transformers: one family of each kind, references where exactness does not hold, configurations, files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import anypatch
from anypatch import GeometryError, UnsupportedModelError
from anypatch.adaptation import describe, host
from anypatch.core.geometry import Geometry
from anypatch.core.kernels import Pi
from anypatch.hosts.transformers.feeding import patchify
from anypatch.hosts.transformers.processors import follow, resized
from anypatch.proof import check, enlarge, randomise, tensors
from families.transformers import families, tiny

FAMILIES = {family.name: family for family in families()}
# Newer than 5.20, the last transformers for Python 3.10.
NEW = pytest.mark.skipif(not hasattr(transformers, "Inkling2ForConditionalGeneration"), reason="transformers is older")
KINDS = [
    "vit", "deit", "beit", "beit shared", "data2vec-vision", "siglip", "dinov2_with_registers", "dinov3_vit", "swin",
    "swinv2", "vit_mae", "vit_msn", "ijepa", "yolos", "dpt", "sam", "vitdet", "audio-spectrogram-transformer", "vjepa2",
    "timesformer", "vivit", "clip, both towers", "siglip2", "groupvit", "x_clip", "depth_anything", "depth_pro",
    "sam, whole", "seggpt", "layoutlmv3", "vilt", "fuyu", "blip_2", "ernie4_5_vl_moe", "gemma3", "gemma4", "glm4v",
    "got_ocr2", "idefics3", "kimi_k25", "llama4", "llava_next", "minicpmv4_6", "mllama", "molmo2",
    "muse_glimmer", "paddleocr_vl", "qwen2_5_vl", "qwen3_vl", "radio", "rf_detr", "vitpose",
    "kosmos2_5", "mask2former", "pe_audio_video", "perception_lm", "pix2struct", "timm_wrapper",
    pytest.param("inkling2", marks=NEW),
]  # fmt: skip
HEADS = ["vit masked image modelling", "vit_mae pre-training", "videomae pre-training", "clipseg"]
RECTANGLES = ["vit", "dinov2", "dinov3_vit", "swin", "videomae", "vitdet", "internvl"]


def made(name: str) -> Any:
    """A family's tiny model with random parameters, in evaluation mode."""
    model = FAMILIES[name].build().eval()
    with torch.no_grad():
        randomise(model, torch.Generator().manual_seed(1))
    return model


def doubled(model: nn.Module) -> tuple[int, ...]:
    patch = anypatch.geometry(model).patch_size
    return (*patch[:-2], 2 * patch[-2], 2 * patch[-1])


def run(model: nn.Module, pixels: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Pixels and what the model makes of them."""
    subject = describe(model)
    example = host(model).example(subject)
    if pixels is None:
        pixels = torch.randn(example.shape, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    with torch.no_grad():
        return pixels, [t for t in tensors(example.call(model, pixels)) if t.is_floating_point()]


def assert_as_built(model: Any) -> None:
    """The live model computes what a fresh one of its configuration does with its weights."""
    config = type(model.config).from_dict(json.loads(json.dumps(model.config.to_dict())))
    fresh = type(model)(config).eval()
    fresh.load_state_dict(model.state_dict())
    pixels, found = run(model)
    _, wanted = run(fresh, pixels)
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b) or torch.allclose(a, b, atol=1e-6)


# -- the proof ---------------------------------------------------------------------------------------------


@pytest.mark.siblings(fast=32)
@pytest.mark.parametrize("name", KINDS + HEADS)
def test_growing_the_patch_is_exact(name: str) -> None:
    model = FAMILIES[name].build()
    found = check(model, FAMILIES[name].patch_size or doubled(model))
    assert found.compared > 0
    assert found.error < 1e-4


@pytest.mark.parametrize("name", RECTANGLES)
def test_rectangular_patches(name: str) -> None:
    model = FAMILIES[name].build()
    patch = anypatch.geometry(model).patch_size
    assert check(model, (*patch[:-2], 2 * patch[-2], 3 * patch[-1])).passed


@pytest.mark.parametrize("name", ["clip", "depth_anything", "pix2struct", "qwen2_vl", "vjepa2", "pixtral"])
def test_square_only_is_said_and_changes_nothing(name: str) -> None:
    model = made(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = model.config.to_json_string()
    patch = anypatch.geometry(model).patch_size
    with pytest.raises(UnsupportedModelError, match="only square"):
        anypatch.adapt(model, (*patch[:-2], 2 * patch[-2], patch[-1]), keep="grid")
    assert model.config.to_json_string() == config
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_table_that_forward_takes_for_a_square() -> None:
    model = made("dinov2")
    with pytest.raises(GeometryError, match="8x12 grid"):
        anypatch.adapt(model, image_size=(32, 48))


@pytest.mark.siblings(fast=10)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("levit", "patch_embeddings.*four convolutions"),
        ("segformer", "stages.0.patch_embeddings.proj is a convolution of kernel 7x7 with stride 4x4"),
        ("hiera", "embeddings.patch_embeddings.projection is a convolution of kernel 7x7"),
        ("mobilevit", "conv_stem.convolution"),
        ("swiftformer", "patch_embed.patch_embedding.0"),
        ("convnext", "dwconv"),
        ("pvt", "later stages"),
        ("neomme", "normalises the pixels"),
        ("gemma4_unified", "patch_ln1"),
        ("vitmatte", "decoder"),
        ("swin2sr", "fixes the patch at 1"),
        ("sam2, whole", "vision_encoder.backbone.patch_embed.projection is a convolution of kernel 7x7"),
        ("edgetam, whole", "overlapping convolution"),
        ("gemma3n", "conv_stem.conv of MobileNetV5Encoder .* overlapping"),
        ("fast_vlm", "stem.0.*stride=.2, 2."),
        ("timm_backbone", "patch_embed.proj is a convolution .* no field of its configuration"),
        ("minimax_m2 (MiniMax-M2)", "text only: it has no vision tower"),
        ("qwen2 (Spark-Formalizer-X1)", "text only"),
        ("blt", "text only"),
    ],
)
def test_refusals_name_the_reason(name: str, reason: str) -> None:
    assert FAMILIES[name].refused
    model = FAMILIES[name].build()
    with pytest.raises(UnsupportedModelError, match=reason):
        anypatch.adapt(model, patch_size=doubled(model), keep="grid")


@torch.no_grad()
def test_padding_that_does_not_grow_with_the_patch(tmp_path: Path) -> None:
    model = made("vitpose").eval()  # its class pads by 2 pixels whatever the patch is
    drawn = torch.nn.functional.interpolate(torch.randn(2, 3, 8, 8), 64, mode="bicubic")
    larger = torch.nn.functional.interpolate(drawn, 128, mode="bicubic")
    wanted = model(drawn).heatmaps
    anypatch.adapt(model, 32, keep="grid")
    found = model(larger).heatmaps
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(larger).heatmaps, found)
    with pytest.raises(GeometryError, match="more than 4"):
        anypatch.adapt(model, 4, keep="grid")


# -- other grids: against the model built there ------------------------------------------------------------


def assert_follows(name: str) -> None:
    """Another image size, then another patch, each as in a model built there."""
    model = made(name)
    image = anypatch.geometry(model).image_size
    if name.startswith("videomae"):  # its sinusoid over the flattened grid would give tokens the places of others
        with pytest.raises(GeometryError, match="numbers the tokens one after another"):
            anypatch.adapt(model, image_size=(*image[:-2], 2 * image[-2], 2 * image[-1]))
        anypatch.adapt(model, doubled(model), keep="grid")
        assert_as_built(model)
        return
    if image is not None:
        anypatch.adapt(model, image_size=(*image[:-2], 2 * image[-2], 2 * image[-1]))
        assert_as_built(model)
    anypatch.adapt(model, doubled(model))
    assert_as_built(model)


GRIDS = ["vit", "beit shared", "swin", "swinv2", "yolos", "sam, whole", "vitdet", "videomae", "vjepa2", "dinov3_vit",
         "gemma3", "aria", "llava_next", "glm4v", "qwen2_5_vl", "minicpmv4_6", "mllama",
         "audio-spectrogram-transformer", "perception_lm", "sam3_tracker_video", "timm_wrapper"]  # fmt: skip


@pytest.mark.siblings(fast=7)
@pytest.mark.parametrize("name", GRIDS)
def test_everything_that_follows_is_as_in_a_model_built_there(name: str) -> None:
    assert_follows(name)


def bicubic(table: Tensor, old: int, new: int) -> Tensor:
    """Rows over an (old, old) grid, resampled without anypatch."""
    image = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(new, new), mode="bicubic", antialias=True)
    return image.permute(0, 2, 3, 1).reshape(new * new, -1)


def test_shrinking_the_patch_keeps_prefix_tokens_and_resamples_the_grid() -> None:
    model = made("clip")
    kernel = model.embeddings.patch_embedding.weight.detach().clone()
    table = model.embeddings.position_embedding.weight.detach().clone()
    anypatch.adapt(model, 2, kernel="pi")
    found = model.embeddings.position_embedding.weight
    assert torch.allclose(found[:1], table[:1])
    assert torch.allclose(found[1:], bicubic(table[1:], 4, 8), atol=1e-6)
    wanted = anypatch.resize_kernel(kernel, 2, "pi")
    assert torch.equal(model.embeddings.patch_embedding.weight, wanted)
    assert model.embeddings.position_ids.tolist() == [list(range(65))]
    assert_as_built(model)


def test_detection_tokens_stay_behind_the_grid() -> None:
    model = made("yolos")
    name, table = next(
        (n, p.detach().clone()) for n, p in model.named_parameters() if n.endswith("embeddings.position_embeddings")
    )
    anypatch.adapt(model, image_size=(32, 48))
    found = model.get_parameter(name)
    assert torch.equal(found[:, -5:], table[:, -5:])
    assert torch.equal(found[:, :1], table[:, :1])
    assert found.shape[1] == 1 + 8 * 12 + 5


def test_relative_tables_centre_on_the_centre() -> None:
    model = made("beit")
    names = [n for n, _ in model.named_parameters() if "relative_position_bias_table" in n]
    assert names
    before = {n: model.get_parameter(n).detach().clone() for n in names}
    anypatch.adapt(model, 2)
    for name in names:
        found, old = model.get_parameter(name), before[name]
        assert torch.allclose(found[-3:], old[-3:])
        assert torch.allclose(found[:-3], bicubic(old[:-3], 7, 15), atol=1e-6)


def test_tables_of_tiles_are_resampled_tile_by_tile() -> None:
    model = made("mllama")
    table = model.gated_positional_embedding.tile_embedding.weight.detach().clone()
    tiles, dim = model.config.max_num_tiles, model.config.hidden_size
    anypatch.adapt(model, 2)
    found = model.gated_positional_embedding.tile_embedding.weight.view(-1, tiles, 65, dim)
    old = table.view(-1, tiles, 17, dim)
    assert torch.equal(found[:, :, 0], old[:, :, 0])
    assert torch.allclose(found[1, 2, 1:], bicubic(old[1, 2, 1:], 4, 8), atol=1e-6)


# -- pixel heads -------------------------------------------------------------------------------------------


def as_image(logits: Tensor, patch: int, grid: int) -> Tensor:
    """(1, tokens, patch * patch * 3) to an image."""
    tokens = logits.reshape(1, grid, grid, patch, patch, 3)
    return tokens.permute(0, 5, 1, 3, 2, 4).reshape(1, 3, grid * patch, grid * patch)


def test_a_masked_autoencoder_paints_the_enlarged_image() -> None:
    model = made("vit_mae pre-training")
    image = torch.randn(1, 3, 16, 16)
    noise = torch.rand(1, 16)
    with torch.no_grad():
        before = as_image(model(image, noise=noise).logits, 4, 4)
        anypatch.adapt(model, 8, keep="grid", kernel="pi")
        large = enlarge(image, (4, 4), (8, 8), Pi())
        after = as_image(model(large, noise=noise).logits, 8, 4)
    assert torch.allclose(after, enlarge(before, (4, 4), (8, 8), Pi()), atol=1e-4)


@pytest.mark.parametrize("name", ["vit masked image modelling", "swin masked image modelling"])
def test_a_masked_image_head_paints_the_enlarged_image(name: str) -> None:
    model = made(name)
    old = anypatch.geometry(model)
    assert old.image_size is not None
    image = torch.randn(1, 3, *old.image_size)
    size = old.patch_size[0]
    with torch.no_grad():
        before = model(image).reconstruction
        anypatch.adapt(model, 2 * size, keep="grid", kernel="pi")
        after = model(enlarge(image, (size,) * 2, (2 * size,) * 2, Pi())).reconstruction
    stride = model.config.encoder_stride
    assert after.shape[-1] == 2 * before.shape[-1]
    wanted = enlarge(before, (stride // 2,) * 2, (stride, stride), Pi())
    assert torch.allclose(after, wanted, atol=1e-4)


def test_a_transposed_convolution_paints_the_enlarged_patch() -> None:
    model = made("clipseg")
    layer = model.decoder.transposed_convolution
    tokens = torch.randn(1, layer.in_channels, 4, 4)
    with torch.no_grad():
        before = layer(tokens)
        anypatch.adapt(model, 8, keep="grid")
        after = layer(tokens)
    assert torch.allclose(after, enlarge(before, (4, 4), (8, 8), Pi()), atol=1e-4)


# -- flattening orders, against the processors that cut the patches ----------------------------------------

PLAIN = {
    "do_resize": False,
    "do_rescale": False,
    "do_normalize": False,
    "do_convert_rgb": False,
    "return_tensors": "pt",
}


def declared(name: str) -> str:
    """The order that the library's file declares for a family's stem."""
    (order,) = set(describe(FAMILIES[name].build()).facts.orders.values())
    return order


@pytest.mark.parametrize(
    ("name", "processor", "blocks"),
    [
        ("siglip2", "Siglip2ImageProcessor", 1),
        ("ernie4_5_vl_moe", "Ernie4_5_VLMoeImageProcessor", 2),
        pytest.param("lfm3_vl", "Qwen2VLImageProcessor", 2, marks=NEW),
        ("qwen2_vl", "Qwen2VLImageProcessor", 2),
        ("cosmos3_edge", "Cosmos3EdgeImageProcessor", 2),
        ("muse_glimmer", "MuseGlimmerImageProcessor", 1),
    ],
)
def test_patches_are_cut_as_the_image_processor_cuts_them(name: str, processor: str, blocks: int) -> None:
    cut = getattr(transformers, processor)(patch_size=4)
    order = "c t h w" if name == "qwen2_vl" else declared(name)  # Qwen2-VL's stem is a convolution
    image = torch.randint(0, 255, (3, 16, 24)).float()
    values = cut(images=[image], **PLAIN)["pixel_values"].reshape(-1)
    if "t" in order:
        frames = image[:, None].expand(-1, 2, -1, -1)
        mine = patchify(frames, (2, 4, 4), order, blocks)
    else:
        mine = patchify(image, (4, 4), order, blocks)
    assert torch.equal(values[: mine.numel()], mine.reshape(-1).to(values.dtype))


def test_patches_are_cut_as_the_models_own_functions_cut_them() -> None:
    from transformers.models.gemma4.image_processing_gemma4 import convert_image_to_patches
    from transformers.models.kosmos2_5.image_processing_kosmos2_5 import torch_extract_patches as kosmos
    from transformers.models.lfm2_vl.image_processing_lfm2_vl import convert_image_to_patches as lfm2
    from transformers.models.molmo2.image_processing_molmo2 import batch_pixels_to_patches as molmo
    from transformers.models.nemotron_h_omni.image_processing_nemotron_h_omni import (
        convert_image_to_patches as nemotron,
    )
    from transformers.models.pix2struct.image_processing_pix2struct import torch_extract_patches

    image = torch.randn(3, 8, 12)

    def mine(name: str) -> Tensor:
        return patchify(image, (4, 4), declared(name))

    assert torch.equal(convert_image_to_patches(image, 4), mine("gemma4"))
    assert torch.equal(lfm2(image[None], 4)[0], mine("lfm2_vl"))
    assert torch.equal(nn.Unfold(4, stride=4)(image[None])[0].T, mine("llama4"))
    assert torch.equal(nemotron(image[None], 4)[0], mine("nemotron_h_omni"))
    assert torch.equal(molmo(image.permute(1, 2, 0)[None], 4)[0], mine("molmo2"))
    pixels = torch_extract_patches(image[None], 4, 4).reshape(-1, 48)
    assert torch.equal(pixels, mine("pix2struct"))
    assert torch.equal(kosmos(image[None], 4, 4).reshape(-1, 48), mine("kosmos2_5"))
    fuyu = transformers.FuyuImageProcessor(patch_size={"height": 4, "width": 4})
    assert torch.equal(fuyu.patchify_image(image[None])[0], mine("fuyu"))
    radio = FAMILIES["radio"].build()
    embeddings = next(m for m in radio.modules() if hasattr(m, "_image_to_patches"))
    assert torch.equal(embeddings._image_to_patches(image[None])[0], mine("radio"))


def test_the_model_itself_says_in_which_order_it_writes_pixels() -> None:
    class ChannelsFirst(transformers.ViTMAEForPreTraining):
        def unpatchify(self, patches: Tensor, *_: object) -> Tensor:
            side = math.isqrt(patches.shape[1])
            cut = patches.unflatten(2, (3, 4, 4)).unflatten(1, (side, side))
            return cut.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    config = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )  # fmt: skip
    for cls, order in ((transformers.ViTMAEForPreTraining, "h w c"), (ChannelsFirst, "c h w")):
        assert describe(cls(config)).facts.order("decoder.decoder_pred.weight") == order


# -- configurations and references -------------------------------------------------------------------------


def test_configurations_follow_everywhere_and_only_in_this_model() -> None:
    config = transformers.CLIPConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
                       "image_size": 16, "patch_size": 4},
        text_config={"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
                     "vocab_size": 64},
    )  # fmt: skip
    model, other = transformers.CLIPModel(config), transformers.CLIPModel(config)
    words = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.text_model.named_parameters()}
    anypatch.adapt(model, 8, 32)
    assert (model.config.vision_config.patch_size, model.config.vision_config.image_size) == (8, 32)
    held = [m.config for m in model.vision_model.modules() if hasattr(m, "config")]
    assert held
    assert all(c is model.config.vision_config for c in held)
    assert other.config is config
    assert config.vision_config.patch_size == 4
    assert other.vision_model.config.patch_size == 4
    assert model.config.text_config.num_hidden_layers == 3
    for name, parameter in model.text_model.named_parameters():
        assert parameter.data_ptr() == words[name][0]
        assert torch.equal(parameter, words[name][1])


def test_sizes_keep_the_form_they_had() -> None:
    vit = made("vit")
    anypatch.adapt(vit, 8, keep="grid")
    assert (vit.config.patch_size, vit.config.image_size) == (8, 32)
    internvl = made("internvl")
    anypatch.adapt(internvl, 8, keep="grid")
    vision = internvl.config.vision_config
    assert (list(vision.patch_size), list(vision.image_size)) == ([8, 8], [32, 32])


def test_linked_sizes_follow() -> None:
    sam = made("sam, whole")
    anypatch.adapt(sam, 2)
    assert sam.config.prompt_encoder_config.patch_size == 2
    assert sam.config.prompt_encoder_config.image_embedding_size == 8
    depth = made("depth_anything")
    anypatch.adapt(depth, 8, keep="grid")
    assert depth.config.patch_size == depth.config.backbone_config.patch_size == 8
    windows = made("qwen2_5_vl")
    before = windows.config.vision_config.window_size
    anypatch.adapt(windows, 8)
    assert windows.config.vision_config.window_size == 2 * before
    tiles = made("llava_next")
    anypatch.adapt(tiles, 8, keep="grid")
    assert tiles.config.image_grid_pinpoints == [[32, 64], [64, 32], [64, 64]]


def test_the_language_model_has_no_full_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = transformers.Qwen2VLForConditionalGeneration
    model = kind(tiny(transformers.Qwen2VLConfig, {"text_config.num_hidden_layers": 12}))
    built: list[int] = []
    layer = sys.modules[type(model).__module__].Qwen2VLDecoderLayer  # type: ignore[attr-defined]
    make = layer.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        built.append(1)
        make(self, *args, **kwargs)

    monkeypatch.setattr(layer, "__init__", counted)
    anypatch.adapt(model, 8)
    assert 0 < len(built) <= 4
    assert model.config.text_config.num_hidden_layers == 12


def test_geometry_reads_time_first() -> None:
    found = anypatch.geometry(made("videomae"))
    assert (found.patch_size, found.image_size, found.grid) == ((2, 4, 4), (4, 16, 16), (2, 4, 4))
    assert anypatch.geometry(made("qwen2_vl")).image_size is None
    spectrum = anypatch.geometry(made("audio-spectrogram-transformer"))
    assert (spectrum.patch_size, spectrum.kernel_size, spectrum.grid) == ((3, 3), (4, 4), (5, 11))
    assert anypatch.geometry(made("dinov2_with_registers")).prefix_tokens >= 1


# -- files -------------------------------------------------------------------------------------------------

RELOAD = """
import sys
try:
    import anypatch
    sys.exit("anypatch can be imported")
except ImportError:
    pass
import torch, transformers
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1]).eval()
pixels = torch.load(sys.argv[1] + "/pixels.pt")
with torch.no_grad():
    out = model.get_image_features(pixels).pooler_output if sys.argv[2] == "CLIPModel" else model(pixels)[0]
torch.save(out, sys.argv[1] + "/out.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip, both towers", "timm_wrapper", "vit"])
def test_saved_models_load_without_anypatch(name: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path / "old")
    loaded = anypatch.load(f"transformers:{tmp_path / 'old'}", patch_size=8, image_size=48).eval()
    assert type(loaded) is type(model)
    anypatch.save(loaded, tmp_path / "new")
    pixels = torch.randn(1, 3, 48, 48)
    torch.save(pixels, tmp_path / "new" / "pixels.pt")
    block = tmp_path / "anypatch.py"
    block.write_text("raise ImportError('not installed')\n")
    subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path / "new"), type(model).__name__],
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )
    with torch.no_grad():
        wanted: Any = loaded
        wanted = wanted.get_image_features(pixels).pooler_output if "clip" in name else wanted(pixels)[0]
    assert torch.allclose(torch.load(tmp_path / "new" / "out.pt"), wanted, atol=1e-6)


def test_the_processor_beside_the_model_follows(tmp_path: Path) -> None:
    model = made("vit")
    model.save_pretrained(tmp_path / "old")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "old")
    loaded = anypatch.load(f"transformers:{tmp_path / 'old'}", patch_size=8, image_size=48)
    anypatch.save(loaded, tmp_path / "new")
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path / "new")
    assert (found.size["height"], found.size["width"]) == (48, 48)


def test_the_input_size_of_a_tower_that_timm_made_follows(tmp_path: Path) -> None:
    model = made("timm_wrapper")
    model.config.pretrained_cfg = {"input_size": [3, 16, 16], "mean": [0.5] * 3}
    anypatch.adapt(model, 8, 48)
    assert model.timm_model.pretrained_cfg["input_size"] == (3, 48, 48)
    anypatch.save(model, tmp_path)
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert found.data_config["input_size"] == (3, 48, 48)
    assert list(found.data_config["mean"]) == [0.5] * 3


def test_a_given_processor_is_saved_for_the_new_size_and_left_alone(tmp_path: Path) -> None:
    model = made("clip, both towers")
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    anypatch.adapt(model, 8, 32)
    anypatch.save(model, tmp_path, processor=processor)
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert found.crop_size["height"] == 32
    assert found.size["shortest_edge"] == 40
    assert processor.crop_size["height"] == 16


def test_budgets_of_pixels_follow_the_area_of_a_patch() -> None:
    processor = transformers.Qwen2VLImageProcessor(
        patch_size=14, size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    )
    found = follow(processor, None, Geometry((2, 28, 28), None))
    assert found.patch_size == 28
    assert found.size["shortest_edge"] == 4 * 56 * 56
    assert found.size["longest_edge"] == 4 * 28 * 28 * 1280


def test_sizes_of_processors() -> None:
    old, new = Geometry((16, 16), (1024, 1024)), Geometry((16, 16), (512, 512))
    fields = {"size": {"longest_edge": 1024}, "pad_size": {"height": 1024, "width": 1024}, "do_pad": True}
    assert resized(fields, old, new) == {
        "size": {"longest_edge": 512}, "pad_size": {"height": 512, "width": 512}, "do_pad": True
    }  # fmt: skip
    tiles = {"size": {"shortest_edge": 336}, "crop_size": 336, "image_grid_pinpoints": [[336, 672]], "patch_size": 14}
    found = resized(tiles, None, Geometry((28, 28), (672, 672)))
    assert found == {
        "size": {"shortest_edge": 672},
        "crop_size": 672,
        "image_grid_pinpoints": [[672, 1344]],
        "patch_size": 28,
    }
    assert resized({"num_mel_bins": 128, "max_length": 1024}, None, Geometry((10, 10), (128, 512)))["max_length"] == 512
    assert resized({"image_seq_length": 64}, Geometry((4, 4), (32, 32)), Geometry((8, 8), (32, 32))) == {
        "image_seq_length": 16
    }


@pytest.mark.siblings(fast=1)
@pytest.mark.parametrize("kind", ["Swin", "DonutSwin"])
@pytest.mark.parametrize("by", ["adapt", "at"])
def test_windows_that_a_forward_pass_did_not_shift_are_shifted_again_at_a_larger_image(kind: str, by: str) -> None:
    """Where the map is one window, transformers writes so into the layer, and never takes it back."""
    sizes = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
    config, cls = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}Model")
    model = cls(config(**sizes, image_size=32)).eval()
    with torch.no_grad():
        randomise(model, torch.Generator().manual_seed(1))
    model(torch.rand(1, 3, 32, 32))
    assert model.encoder.layers[1].blocks[1].shift_size == 0
    fresh = cls(config(**sizes, image_size=64)).eval()
    fresh.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 64, 64)
    larger = anypatch.adapt(model, image_size=64) if by == "adapt" else anypatch.at(model, image_size=64)
    torch.testing.assert_close(larger(x).last_hidden_state, fresh(x).last_hidden_state)
    if by == "at":
        assert model.encoder.layers[1].blocks[1].shift_size == 0
