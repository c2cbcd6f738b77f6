"""Tiny models of every transformers model type that has a patch size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from anypatch.families import Family

CONV, LINEAR = "convolution", "linear, flattened patch"

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 4,
    "image_size": 16,
}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}


def _build(model: str, config: str, fields: dict[str, Any]) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**fields))


def _encoder(name: str, stem: str, model: str, config: str, embedding: str, positions: str, **fields: Any) -> Family:
    return Family("transformers", name, lambda: _build(model, config, fields), embedding, positions)


def families() -> Iterator[Family]:
    yield from _plain()


def _plain() -> Iterator[Family]:
    def row(name: str, model: str, config: str, positions: str, embedding: str = CONV, base: Any = ENCODER,
            **fields: Any) -> Family:  # fmt: skip
        merged = {k: v for k, v in {**base, **fields}.items() if v is not None}
        return Family("transformers", name, lambda: _build(model, config, merged), embedding, positions)

    table = "learned, class token"
    yield row("vit", "ViTModel", "ViTConfig", table)
    yield row("vit masked image modelling", "ViTForMaskedImageModeling", "ViTConfig", table, encoder_stride=4)
    yield row("deit", "DeiTModel", "DeiTConfig", "learned, class and distillation tokens")
    yield row("beit", "BeitModel", "BeitConfig", "relative tables", use_relative_position_bias=True)
    yield row("beit shared", "BeitModel", "BeitConfig", "absolute and shared relative table",
              use_shared_relative_position_bias=True, use_absolute_position_embeddings=True)  # fmt: skip
    yield row("data2vec-vision", "Data2VecVisionModel", "Data2VecVisionConfig", "relative tables",
              use_relative_position_bias=True)  # fmt: skip
    yield row("clip", "CLIPVisionModel", "CLIPVisionConfig", table)
    yield row("siglip", "SiglipVisionModel", "SiglipVisionConfig", "learned")
    yield row("dinov2", "Dinov2Model", "Dinov2Config", "learned, interpolated in forward")
    yield row("dinov2_with_registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig",
              "learned, class and register tokens")  # fmt: skip
    yield row("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", "rotary")
    yield row("swin", "SwinModel", "SwinConfig", "windowed relative tables", base=SWIN)
    yield row("swinv2", "Swinv2Model", "Swinv2Config", "windowed continuous relative", base=SWIN)
    yield row("vit_mae", "ViTMAEModel", "ViTMAEConfig", "fixed sine-cosine table")
    yield row("vit_mae pre-training", "ViTMAEForPreTraining", "ViTMAEConfig", "fixed sine-cosine tables",
              decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
              decoder_intermediate_size=48)  # fmt: skip
    yield row("vit_msn", "ViTMSNModel", "ViTMSNConfig", table)
    yield row("ijepa", "IJepaModel", "IJepaConfig", "learned")
    yield row("owlvit", "OwlViTVisionModel", "OwlViTVisionConfig", table)
    yield row("yolos", "YolosModel", "YolosConfig", "learned, class and detection tokens", image_size=[16, 24],
              num_detection_tokens=5)  # fmt: skip
    yield row("dpt", "DPTForDepthEstimation", "DPTConfig", table, backbone_out_indices=[0, 1, 2, 3],
              num_hidden_layers=4, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5])  # fmt: skip
    yield row("sam", "SamVisionModel", "SamVisionConfig", "learned map and decomposed relative", output_channels=16,
              window_size=2, global_attn_indexes=[1], mlp_dim=48)  # fmt: skip
    yield row("vitdet", "VitDetModel", "VitDetConfig", "learned, decomposed relative, windows",
              use_relative_position_embeddings=True, pretrain_image_size=24, window_size=2,
              window_block_indices=[0])  # fmt: skip
    yield row("audio-spectrogram-transformer", "ASTModel", "ASTConfig", "learned, class and distillation tokens",
              "convolution, overlapping", image_size=None, frequency_stride=3, time_stride=3, max_length=34,
              num_mel_bins=16)  # fmt: skip
    video = {**ENCODER, "num_frames": 4, "tubelet_size": 2}
    yield row("videomae", "VideoMAEModel", "VideoMAEConfig", "fixed sine-cosine table", "convolution, tubelets",
              base=video)  # fmt: skip
    yield row("videomae pre-training", "VideoMAEForPreTraining", "VideoMAEConfig", "fixed sine-cosine tables",
              "convolution, tubelets", base=video, decoder_hidden_size=32, decoder_num_hidden_layers=1,
              decoder_num_attention_heads=2, decoder_intermediate_size=48, norm_pix_loss=False)  # fmt: skip
    yield row("swin masked image modelling", "SwinForMaskedImageModeling", "SwinConfig",
              "windowed relative tables", base=SWIN, encoder_stride=4)  # fmt: skip
    yield row("timesformer", "TimesformerModel", "TimesformerConfig", "learned in space and in time", num_frames=3)
    yield row("vivit", "VivitModel", "VivitConfig", table, "convolution, tubelets", base=video,
              tubelet_size=[2, 4, 4], patch_size=None)  # fmt: skip
    yield row("vjepa2", "VJEPA2Model", "VJEPA2Config", "rotary in time and space", "convolution, tubelets",
              image_size=None, crop_size=16, frames_per_clip=4, tubelet_size=2, hidden_size=36,
              pred_hidden_size=36, pred_num_attention_heads=2, pred_num_hidden_layers=1, mlp_ratio=2)  # fmt: skip
