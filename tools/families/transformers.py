"""Tiny models of every transformers model type that has a patch size."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from families import Family

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


def families() -> Iterator[Family]:
    yield from _plain()
    yield from _shrunk()
    yield from _refused()


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
              num_hidden_layers=4, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
              reassemble_factors=[4, 2, 1, 0.5])  # fmt: skip
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


def variants() -> Iterator[Family]:
    """Models that are no rows of the table, but tell more of what a class takes for a square."""

    def row(name: str, model: str, config: str, **fields: Any) -> Family:
        return Family("transformers", name, lambda: _build(model, config, {**ENCODER, **fields}), CONV, "")

    yield row("data2vec-vision absolute", "Data2VecVisionModel", "Data2VecVisionConfig",
              use_absolute_position_embeddings=True)  # fmt: skip
    yield row("deit masked image modelling", "DeiTForMaskedImageModeling", "DeiTConfig", encoder_stride=4)


def _module(kind: str, file: str = "") -> Any:
    return importlib.import_module(f"transformers.models.{kind}.modeling_{file or kind}")


def _shrunk() -> Iterator[Family]:
    """Models whose default configuration shrinks by itself, towers inside vision-language models among them."""

    def row(kind: str, model: str, positions: str = "learned", embedding: str = CONV, *, name: str = "", file: str = "",
            config: str = "", patch: Any = None, refused: bool = False, **over: Any) -> Family:  # fmt: skip
        def build() -> nn.Module:
            import transformers

            cls = getattr(_module(kind, file), model)
            configuration = getattr(transformers, config) if config else cls.config_class
            return cls(tiny(configuration, {k.replace("__", "."): v for k, v in over.items()}))

        return Family("transformers", name or kind, build, embedding, positions, patch, refused)

    learned, rotary, both = "learned, class token", "rotary", "learned and rotary"
    packed = "convolution over packed patches"
    # contrastive models, whole
    yield row("clip", "CLIPModel", learned, name="clip, both towers")
    yield row("siglip", "SiglipModel", name="siglip, both towers")
    yield row("siglip2", "Siglip2Model", "learned, interpolated in forward", LINEAR)
    yield row("aimv2", "Aimv2Model")
    yield row("altclip", "AltCLIPModel", learned)
    yield row("blip", "BlipForConditionalGeneration", learned)
    yield row("bridgetower", "BridgeTowerModel", learned, vision_config__num_hidden_layers=2,
              vision_config__hidden_size=64, text_config__num_hidden_layers=2)  # fmt: skip
    yield row("chinese_clip", "ChineseCLIPModel", learned)
    yield row("clipseg", "CLIPSegForImageSegmentation", learned, extract_layers=[1])
    yield row("groupvit", "GroupViTModel")
    yield row("metaclip_2", "MetaClip2Model", learned)
    yield row("owlvit", "OwlViTModel", learned, name="owlvit, both towers")
    yield row("owlv2", "Owlv2Model", learned)
    yield row("x_clip", "XCLIPModel", learned)
    yield row("tipsv2", "Tipsv2Model", learned)
    yield row("vision_text_dual_encoder", "VisionTextDualEncoderModel", learned, vision_config="ViTConfig",
              text_config="BertConfig", vision_config__pooler_output_size=32)  # fmt: skip
    yield row("videoprism", "VideoPrismClipModel", "learned in space and in time", patch=(1, 8, 8),
              vision_config__image_size=16, vision_config__tubelet_size=[1, 4, 4],
              vision_config__num_frames=4)  # fmt: skip
    yield row("flava", "FlavaModel", learned)
    # dense heads and detectors
    yield row("chmv2", "CHMv2ForDepthEstimation", rotary)
    yield row("depth_anything", "DepthAnythingForDepthEstimation", learned)
    yield row("prompt_depth_anything", "PromptDepthAnythingForDepthEstimation", learned)
    yield row("depth_pro", "DepthProForDepthEstimation", learned, patch_size=16, fusion_hidden_size=8,
              scaled_images_feature_dims=[8, 8, 8], intermediate_feature_dims=[8, 8],
              intermediate_hook_ids=[1, 0], image_model_config__patch_size=4, patch_model_config__patch_size=4,
              fov_model_config__patch_size=4)  # fmt: skip
    yield row("zoedepth", "ZoeDepthForDepthEstimation", "relative tables", neck_hidden_sizes=[32, 32, 32, 32],
              fusion_hidden_size=32, bottleneck_features=32)  # fmt: skip
    yield row("tipsv2_dpt", "Tipsv2DptForDensePrediction", learned)
    yield row(
        "vitmatte",
        "VitMatteForImageMatting",
        "learned map",
        refused=True,
        backbone_config__patch_size=16,
        backbone_config__image_size=64,
    )
    yield row("sam", "SamModel", "learned map and decomposed relative", name="sam, whole", **SAM)
    yield row("sam_hq", "SamHQModel", "learned map and decomposed relative", mask_decoder_config__vit_dim=32, **SAM)
    yield row("sam3", "Sam3VisionModel", both)
    yield row("sam3", "Sam3Model", both, name="sam3, whole")
    yield row("sam3_lite_text", "Sam3LiteTextModel", both)
    yield row("sam3_tracker", "Sam3TrackerModel", both)
    yield row("sam3_tracker_video", "Sam3TrackerVideoModel", both, image_size=16, vision_config__image_size=16)
    yield row("sam3_video", "Sam3VideoModel", both, **SAM3_VIDEO)
    yield row("slanext", "SLANeXtForTableRecognition", "learned map and decomposed relative")
    yield row(
        "lw_detr",
        "LwDetrForObjectDetection",
        "learned",
        backbone_config__num_windows=4,
        projector_scale_factors=[1.0],
        projector_in_channels=[32],
        num_feature_levels=1,
        num_queries=8,
        backbone_config__image_size=32,
    )
    yield row("rf_detr", "RfDetrForObjectDetection", learned, backbone_config__num_windows=2, num_queries=8)
    swin = "windowed relative tables"
    yield row("maskformer", "MaskFormerForInstanceSegmentation", swin, name="maskformer, whole", **SWIN_BACKBONE)
    yield row("mask2former", "Mask2FormerForUniversalSegmentation", swin, **SWIN_BACKBONE)
    yield row("oneformer", "OneFormerForUniversalSegmentation", swin, **SWIN_BACKBONE)
    yield row("upernet", "UperNetForSemanticSegmentation", swin, backbone_config="SwinConfig", hidden_size=16,
              auxiliary_in_channels=64, backbone_config__out_features=["stage1", "stage2", "stage3", "stage4"],
              **SWIN_BACKBONE)  # fmt: skip
    yield row("grounding_dino", "GroundingDinoForObjectDetection", swin, **SWIN_BACKBONE)
    yield row("mm_grounding_dino", "MMGroundingDinoForObjectDetection", swin, **SWIN_BACKBONE)
    yield row("eomt", "EomtForUniversalSegmentation", learned, num_blocks=1)
    yield row("eomt_dinov3", "EomtDinov3ForUniversalSegmentation", rotary, num_blocks=1)
    yield row("videomt", "VideomtForUniversalSegmentation", learned, num_blocks=1)
    yield row(
        "seggpt",
        "SegGptModel",
        "learned and decomposed relative",
        image_size=[32, 16],
        pretrain_image_size=12,
        merge_index=0,
        intermediate_hidden_state_indices=[1],
        decoder_hidden_size=8,
    )
    yield row("sapiens2", "Sapiens2Model", rotary)
    yield row("pixio", "PixioModel", learned)
    yield row("mlcd", "MLCDVisionModel", rotary)
    yield row("pixtral", "PixtralVisionModel", rotary)
    yield row("radio", "RadioModel", "learned, interpolated in forward", LINEAR)
    yield row("mgp_str", "MgpstrModel", learned)
    yield row("maskformer", "MaskFormerSwinModel", "windowed relative tables", file="maskformer_swin", **SWIN_SIZES)
    yield row("donut", "DonutSwinModel", "windowed relative tables", file="donut_swin", **SWIN_SIZES)
    yield row("swin2sr", "Swin2SRModel", "windowed continuous relative", image_size=16, window_size=4, depths=[1],
              num_heads=[2], embed_dim=16, patch_size=1, refused=True)  # fmt: skip
    yield row("focalnet", "FocalNetModel", "none", image_size=32, patch_size=2, embed_dim=16, depths=[1, 1],
              hidden_sizes=[16, 32], focal_levels=[1, 1], focal_windows=[3, 3])  # fmt: skip
    yield row("vitpose_backbone", "VitPoseBackbone", "learned", patch_size=[16, 16], image_size=[64, 64])
    yield row("vitpose", "VitPoseForPoseEstimation", "learned", backbone_config__patch_size=[16, 16],
              backbone_config__image_size=[64, 64])  # fmt: skip
    # text and image in one stream
    yield row("layoutlmv3", "LayoutLMv3Model", learned, input_size=16, coordinate_size=4, shape_size=8)
    yield row("udop", "UdopEncoderModel", "none, from boxes")
    yield row("vilt", "ViltModel", "learned, interpolated in forward")
    yield row("git", "GitForCausalLM", learned)
    yield row("fuyu", "FuyuForCausalLM", "of the language model", LINEAR)
    yield row("pix2struct", "Pix2StructForConditionalGeneration", "learned rows and columns", LINEAR,
              vision_config__patch_embed_hidden_size=48, vision_config__d_kv=16, text_config__d_kv=16)  # fmt: skip
    # towers that timm makes
    yield row("timm_wrapper", "TimmWrapperModel", learned, architecture="vit_tiny_patch16_224", model_args=TIMM)
    yield row("timm_wrapper", "TimmWrapperForImageClassification", "windowed relative tables",
              name="timm_wrapper image classification", architecture="swin_tiny_patch4_window7_224",
              model_args={"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
                          "window_size": 4})  # fmt: skip
    yield row("perception_lm", "PerceptionLMForConditionalGeneration", both, text_config="LlamaConfig",
              vision_config={**WRAPPER, "architecture": "vit_pe_lang_large_patch14_448"})  # fmt: skip
    yield row("pe_video", "PeVideoModel", both, video_config__vision_config=WRAPPER)
    yield row("pe_video", "PeVideoEncoder", both, name="pe_video, encoder", vision_config=WRAPPER)
    yield row("pe_audio_video", "PeAudioVideoModel", both, audio_video_config__video_config__vision_config=WRAPPER)
    yield row("gemma3n", "Gemma3nForConditionalGeneration", "", "overlapping convolution", refused=True,
              text_config__intermediate_size=48, text_config__activation_sparsity_pattern=None,
              text_config__num_kv_shared_layers=0,
              vision_config__model_args={"channel_multiplier": 0.1})  # fmt: skip
    yield row("fast_vlm", "FastVlmForConditionalGeneration", "", "several convolutions", refused=True,
              text_config="Qwen2Config")  # fmt: skip
    yield row("timm_backbone", "TimmBackbone", learned, refused=True, backbone="vit_tiny_patch16_224")
    # vision-language models
    yield row("aria", "AriaForConditionalGeneration", "learned buckets", projector_patch_to_query_dict={16: 4})
    yield row("aya_vision", "AyaVisionForConditionalGeneration")
    yield row("blip_2", "Blip2ForConditionalGeneration", learned)
    yield row("cohere2_vision", "Cohere2VisionForConditionalGeneration")
    yield row("cohere_compass", "CohereCompassVisionModel", both, packed)
    yield row("cohere_compass", "CohereCompassForConditionalGeneration", both, packed, name="cohere_compass, whole",
              text_config__layer_types=["full_attention", "sliding_attention"],
              text_config__rope_parameters={f"{reach}_attention": {"rope_type": "default", "rope_theta": 10000.0}
                                            for reach in ("full", "sliding")})  # fmt: skip
    yield row("colmodernvbert", "ColModernVBertForRetrieval", "learned buckets")
    yield row("colpali", "ColPaliForRetrieval")
    yield row("colqwen2", "ColQwen2ForRetrieval", rotary, packed)
    yield row("cosmos3_omni", "Cosmos3OmniForConditionalGeneration", both, packed)
    yield row("cosmos3_edge", "Cosmos3EdgeForConditionalGeneration", "learned, interpolated in forward", LINEAR)
    yield row("deepseek_ocr2", "DeepseekOcr2SamVisionEncoder", "learned map and decomposed relative",
              **SAM_ENCODER)  # fmt: skip
    yield row("deepseek_ocr2", "DeepseekOcr2ForConditionalGeneration", "learned map and decomposed relative",
              name="deepseek_ocr2, whole", text_config__mlp_layer_types=["dense", "sparse"], **OCR)  # fmt: skip
    yield row("deepseek_vl", "DeepseekVLForConditionalGeneration")
    yield row("deepseek_vl_hybrid", "DeepseekVLHybridForConditionalGeneration")
    yield row(
        "dots3_note", "Dots3NoteVisionModel", rotary, packed, mlp_layer_types=["dense", "sparse"], adapter_in_dim=32
    )
    yield row("diffusion_gemma", "DiffusionGemmaForBlockDiffusion", "learned tables per axis", LINEAR,
              vision_config="Gemma4VisionConfig", vision_config__pooling_kernel_size=2, text_config__num_experts=4,
              text_config__top_k_experts=2, text_config__moe_intermediate_size=32)  # fmt: skip
    yield row("dots3_note", "Dots3NoteForConditionalGeneration", rotary, packed, name="dots3_note, whole",
              text_config__layer_types=["full_attention"] * 2, vision_config__mlp_layer_types=["dense", "sparse"],
              vision_config__adapter_in_dim=32, vision_config__adapter_out_dim=32,
              audio_config__adapter_input_size=32, audio_config__adapter_out_dim=32)  # fmt: skip
    yield row("embedding_gemma2", "EmbeddingGemma2Model", "learned tables per axis", LINEAR,
              vision_config="Gemma4VisionConfig", vision_config__pooling_kernel_size=2)  # fmt: skip
    yield row("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", rotary, LINEAR,
              text_config__head_dim=128)  # fmt: skip
    yield row("exaone4_5", "Exaone4_5_ForConditionalGeneration", "rotary, windows in pixels", packed)
    yield row("gemma3", "Gemma3ForConditionalGeneration", mm_tokens_per_image=4)
    yield row("gemma4", "Gemma4ForConditionalGeneration", "learned tables per axis", LINEAR,
              vision_config="Gemma4VisionConfig", vision_config__pooling_kernel_size=2)  # fmt: skip
    yield row("glm46v", "Glm46VForConditionalGeneration", both, packed)
    yield row("glm4v", "Glm4vForConditionalGeneration", both, packed)
    yield row("glm4v_moe", "Glm4vMoeForConditionalGeneration", both, packed)
    yield row("glm5_next", "Glm5NextForConditionalGeneration", both, packed)
    yield row("glm46v", "Glm46VForConditionalGeneration", both, packed, name="glmga", config="GlmgaConfig")
    yield row("glm_image", "GlmImageForConditionalGeneration", "learned, interpolated in forward", packed)
    yield row("glm_ocr", "GlmOcrForConditionalGeneration", rotary, packed)
    yield row("got_ocr2", "GotOcr2ForConditionalGeneration", "learned map and decomposed relative")
    yield row("granite4_vision", "Granite4VisionForConditionalGeneration", learned, vision_config__hidden_size=64,
              downsample_rate="1/2", deepstack_layer_map=[[0, 0]], spatial_target_layers=[1, 1, 1, 1],
              image_grid_pinpoints=PINPOINTS)  # fmt: skip
    yield row("granite_docling", "GraniteDoclingForConditionalGeneration", "learned buckets")
    yield row("hunyuan_vl", "HunYuanVLVisionTransformer", "learned, interpolated in forward", packed,
              max_image_size=24)  # fmt: skip
    yield row("hunyuan_vl", "HunYuanVLForConditionalGeneration", "learned, interpolated in forward", packed,
              name="hunyuan_vl, whole", vision_config__max_image_size=24, text_config__head_dim=16)  # fmt: skip
    yield row("hy_v4_vl", "HYV4VLForConditionalGeneration", "learned, interpolated in forward", packed,
              vision_config__max_image_size=24)  # fmt: skip
    yield row("hyperclovax_vision_v2", "HyperCLOVAXVisionV2ForConditionalGeneration", "rotary, windows in pixels",
              packed)  # fmt: skip
    yield row("idefics", "IdeficsForVisionText2Text", learned)
    yield row("idefics2", "Idefics2ForConditionalGeneration", "learned buckets")
    yield row("idefics3", "Idefics3ForConditionalGeneration", "learned buckets")
    yield row("inkling2", "Inkling2ForConditionalGeneration", "learned, interpolated in forward", LINEAR)
    yield row("inkling2_loop", "Inkling2LoopForConditionalGeneration", "learned, interpolated in forward", LINEAR)
    yield row("instructblip", "InstructBlipForConditionalGeneration", learned)
    yield row("instructblipvideo", "InstructBlipVideoForConditionalGeneration", learned)
    yield row("internvl", "InternVLForConditionalGeneration", learned)
    yield row("janus", "JanusVisionModel")
    yield row("janus", "JanusForConditionalGeneration", name="janus, whole", vq_config__base_channels=32)
    yield row("kimi_k25", "Kimi_K25ForConditionalGeneration", both, packed)
    yield row("kosmos2", "Kosmos2ForConditionalGeneration", learned)
    yield row("kosmos2_5", "Kosmos2_5ForConditionalGeneration", "learned rows and columns", LINEAR,
              vision_config__patch_embed_hidden_size=48)  # fmt: skip
    yield row("lfm2_vl", "Lfm2VlForConditionalGeneration", "learned, interpolated in forward", LINEAR)
    yield row("lfm3_vl", "Lfm3VlForConditionalGeneration", rotary, LINEAR)
    yield row("lighton_ocr", "LightOnOcrForConditionalGeneration", rotary)
    yield row("llama4", "Llama4ForConditionalGeneration", "learned and rotary", LINEAR,
              vision_config__projector_input_dim=32, vision_config__projector_output_dim=32,
              vision_config__vision_output_dim=32, vision_config__intermediate_size=128)  # fmt: skip
    yield row("llava", "LlavaForConditionalGeneration", learned)
    yield row("llava_next", "LlavaNextForConditionalGeneration", learned, image_grid_pinpoints=PINPOINTS)
    yield row("llava_next_video", "LlavaNextVideoForConditionalGeneration", learned, image_grid_pinpoints=PINPOINTS)
    yield row("llava_onevision", "LlavaOnevisionForConditionalGeneration", image_grid_pinpoints=PINPOINTS)
    yield row("minicpm_ocr", "MiniCPMOcrForConditionalGeneration", "learned buckets", packed)
    yield row("minicpmv4_6", "MiniCPMV4_6ForConditionalGeneration", "learned buckets", packed)
    yield row("minicpmv4_7", "MiniCPMV4_7ForConditionalGeneration", "learned buckets", packed)
    yield row("minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration", rotary, packed)
    yield row("mistral3", "Mistral3ForConditionalGeneration", rotary)
    yield row("mistral_large4", "MistralLarge4ForConditionalGeneration", rotary, text_config__kv_source_layers=[0, 0])
    yield row("mllama", "MllamaForConditionalGeneration", "learned, per tile", name="mllama, whole")
    yield row("mllama", "MllamaVisionModel", "learned, per tile")
    yield row("modernvbert", "ModernVBertModel", "learned buckets")
    yield row("molmo2", "Molmo2VisionModel", embedding=LINEAR, image_size=[16, 16], num_position_embeddings=16)
    yield row("molmo2", "Molmo2ForConditionalGeneration", embedding=LINEAR, name="molmo2, whole",
              vision_config__image_size=[16, 16], vision_config__num_position_embeddings=16,
              adapter_config__vision_feature_layer=[1, 0])  # fmt: skip
    yield row("muse_glimmer", "MuseGlimmerForConditionalGeneration", both, LINEAR, out_hidden_size=128)
    yield row("muse_spark", "MuseSparkVisionModel", both, LINEAR)
    yield row("muse_spark", "MuseSparkForConditionalGeneration", both, LINEAR, name="muse_spark, whole",
              out_hidden_size=128, audio_config__num_hidden_layers=4, audio_config__hidden_sizes=[32, 32, 32, 32],
              audio_config__out_hidden_size=32)  # fmt: skip
    yield row("nemotron_h_omni", "NemotronH_Omni_Reasoning_V3", "learned, interpolated in forward", LINEAR)
    yield row("ovis2", "Ovis2ForConditionalGeneration")
    yield row("paddleocr_vl", "PaddleOCRVLForConditionalGeneration", both, packed)
    yield row("paligemma", "PaliGemmaForConditionalGeneration")
    yield row("phi4_multimodal", "Phi4MultimodalForCausalLM", "learned buckets")
    yield row("pi0", "PI0ForConditionalGeneration")
    yield row("got_ocr2", "GotOcr2ForConditionalGeneration", "learned map and decomposed relative",
              name="pp_chart2table", config="PPChart2TableConfig")  # fmt: skip
    yield row("pp_formulanet", "PPFormulaNetForConditionalGeneration", "learned map and decomposed relative")
    yield row("qianfan_ocr", "QianfanOCRForConditionalGeneration", learned)
    yield row("qwen2_vl", "Qwen2VLForConditionalGeneration", rotary, packed)
    yield row("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "rotary, windows in pixels", packed)
    yield row("qwen2_5_omni", "Qwen2_5OmniThinkerForConditionalGeneration", "rotary, windows in pixels", packed)
    yield row("qwen2_5_omni", "Qwen2_5OmniForConditionalGeneration", "rotary, windows in pixels", packed,
              name="qwen2_5_omni, whole", enable_audio_output=False)  # fmt: skip
    yield row("qwen3_5", "Qwen3_5ForConditionalGeneration", both, packed)
    yield row("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", both, packed)
    yield row("qwen3_omni_moe", "Qwen3OmniMoeThinkerForConditionalGeneration", both, packed)
    yield row("qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration", both, packed,
              name="qwen3_omni_moe, whole", enable_audio_output=False)  # fmt: skip
    yield row("qwen3_vl", "Qwen3VLForConditionalGeneration", both, packed)
    yield row("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", both, packed)
    yield row("qwen4_exp", "Qwen4ExpForConditionalGeneration", both, packed)
    yield row("shieldgemma2", "ShieldGemma2ForImageClassification", mm_tokens_per_image=4)
    yield row("smolvlm", "SmolVLMForConditionalGeneration", "learned buckets")
    yield row("step3p7", "Step3p7ForConditionalGeneration", both)
    yield row("t5gemma2", "T5Gemma2ForConditionalGeneration", encoder__mm_tokens_per_image=4)
    yield row("ultravbert", "UltraVBertModel", "learned buckets")
    yield row("unlimited_ocr", "UnlimitedOcrSamVisionEncoder", "learned map and decomposed relative", **SAM_ENCODER)
    yield row("unlimited_ocr", "UnlimitedOcrForConditionalGeneration", "learned map and decomposed relative",
              name="unlimited_ocr, whole", **OCR)  # fmt: skip
    yield row("vision_encoder_decoder", "VisionEncoderDecoderModel", learned)
    yield row("vision_encoder_decoder", "VisionEncoderDecoderModel", "windowed relative tables", name="nougat",
              encoder="DonutSwinConfig", decoder="MBartConfig", decoder__is_decoder=True,
              decoder__add_cross_attention=True, **SWIN_ENCODER)  # fmt: skip
    yield row("video_llama_3", "VideoLlama3ForConditionalGeneration", rotary, packed)
    yield row("video_llava", "VideoLlavaForConditionalGeneration", learned)
    yield row("vipllava", "VipLlavaForConditionalGeneration", learned, vision_feature_layers=[1])


SAM_ENCODER: dict[str, Any] = {"output_channels": 32, "window_size": 2, "global_attn_indexes": [1]}
OCR: dict[str, Any] = {
    f"vision_config__sam_config__{k}": v for k, v in {**SAM_ENCODER, "downsample_channels": [32, 32]}.items()
}
SAM: dict[str, Any] = {
    **{f"vision_config__{k}": v for k, v in SAM_ENCODER.items()},
    "vision_config__num_pos_feats": 16,
    "prompt_encoder_config__image_embedding_size": 4,
    "mask_decoder_config__iou_head_hidden_dim": 32,
}
SAM3_VIDEO: dict[str, Any] = {
    f"{part}_config__{field}": 16
    for part in ("detector", "tracker")
    for field in ("image_size", "vision_config__image_size")
}
SWIN_ENCODER: dict[str, Any] = {f"encoder__{k}": v for k, v in SWIN.items()}
SWIN_SIZES: dict[str, Any] = dict(SWIN)
SWIN_BACKBONE: dict[str, Any] = {
    f"backbone_config__{k}": v
    for k, v in {**SWIN, "image_size": 64, "depths": [1] * 4, "num_heads": [1, 2, 2, 2], "window_size": 2}.items()
}
TIMM: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
WRAPPER: dict[str, Any] = {
    "model_type": "timm_wrapper",
    "architecture": "vit_pe_core_large_patch14_336",
    "model_args": TIMM,
}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def _refused() -> Iterator[Family]:
    """Models whose stem is not one linear map per patch, or that have no patches at all."""

    def row(name: str, model: str, reason: str, config: str = "", **fields: Any) -> Family:
        config = config or model.removesuffix("Model") + "Config"
        return Family("transformers", name, lambda: _build(model, config, fields), reason, "", refused=True)

    overlapping, several = "overlapping convolution", "several convolutions"
    yield row("levit", "LevitModel", several)
    yield row("pvt_v2", "PvtV2Model", overlapping)
    yield row("pvt", "PvtModel", CONV, hidden_sizes=[16, 16, 16, 16], num_attention_heads=[1, 1, 1, 1], image_size=32,
              depths=[1, 1, 1, 1])  # fmt: skip
    yield row("segformer", "SegformerModel", overlapping)
    yield row("glpn", "GLPNModel", overlapping)
    yield row("cvt", "CvtModel", overlapping)
    yield row("hiera", "HieraModel", overlapping)
    yield row("mobilevit", "MobileViTModel", several)
    yield row("mobilevitv2", "MobileViTV2Model", several)
    yield row("swiftformer", "SwiftFormerModel", several)
    yield row("convnext", "ConvNextModel", "convolutional network", hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    yield row("convnextv2", "ConvNextV2Model", "convolutional network", hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    yield row("poolformer", "PoolFormerModel", overlapping)
    yield row("resnet", "ResNetModel", overlapping)
    yield Family("transformers", "clap", lambda: _shrink("ClapModel"), "folded spectrogram", "", refused=True)
    yield Family("transformers", "inkling", lambda: _shrink("InklingForConditionalGeneration"),
                 "tree of linear layers over a patch", "", refused=True)  # fmt: skip
    yield Family("transformers", "neomme", lambda: _shrink("NeoMMEModel"), "normalised patch, two layers", "",
                 refused=True)  # fmt: skip
    yield Family("transformers", "gemma4_unified", lambda: _shrink("Gemma4UnifiedForConditionalGeneration",
                 {"vision_config": "Gemma4UnifiedVisionConfig"}), "normalised patch", "", refused=True)  # fmt: skip
    yield Family("transformers", "florence2", lambda: _shrink("Florence2ForConditionalGeneration"), overlapping, "",
                 refused=True)  # fmt: skip
    whole = [("sam2", "Sam2VisionModel", overlapping), ("sam2, whole", "Sam2Model", overlapping),
             ("sam2_video", "Sam2VideoModel", overlapping), ("edgetam", "EdgeTamVisionModel", several),
             ("edgetam, whole", "EdgeTamModel", several), ("edgetam_video", "EdgeTamVideoModel", several),
             ("tvp", "TvpModel", "convolutional network"), ("align", "AlignModel", "convolutional network"),
             ("apertus1p5", "Apertus1p5VisionTokenizerModel", "convolutional network")]  # fmt: skip
    for name, model, reason in whole:
        yield Family("transformers", name, partial(_shrink, model), reason, "", refused=True)
    text = [("minimax_m2 (MiniMax-M2)", "MiniMaxM2ForCausalLM"), ("deepseek_v3 (Kimi-K2)", "DeepseekV3ForCausalLM"),
            ("qwen2 (Spark-Formalizer-X1)", "Qwen2ForCausalLM"), ("blt", "BltModel"),
            ("bert", "BertModel")]  # fmt: skip
    for name, model in text:
        over = {"encoder_hash_byte_group_vocab": 64} if name == "blt" else {}
        yield Family("transformers", name, partial(_shrink, model, over), "text only", "", refused=True)
    yield Family("transformers", "gemma4_assistant", _gemma4_assistant, "text only", "", refused=True)


def _gemma4_assistant() -> nn.Module:
    """Its default configuration is not valid, so there is none to shrink."""
    import transformers

    text = tiny(
        transformers.Gemma4TextConfig,
        {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2},
    )
    return transformers.Gemma4AssistantForCausalLM(
        transformers.Gemma4AssistantConfig(text_config=text, backbone_hidden_size=32)
    )


def _shrink(model: str, over: dict[str, Any] | None = None) -> nn.Module:
    import transformers

    cls = getattr(transformers, model)
    return cls(tiny(cls.config_class, over))


# -- shrinking a default configuration ---------------------------------------------------------------------

# Per-layer lists and the like: the configuration makes them anew.
DROP = re.compile(
    r"^(layer_types|num_key_value_heads_per_layer|per_layer_config|_.*|transformers_version|architectures|torch_dtype|dtype|"
    r"mlp_layer_types|no_rope_layers|cross_attention_layers|id2label|label2id|attention_types|attention_layers|"
    r"moe_layers|layers_block_type|hybrid_override_pattern|quantization_config)$"
)
LIMITS = (
    (r"head_dim$|^kv_channels$", 16),
    (r"^(num|n)_(hidden_|encoder_|decoder_|text_|vision_)?layers?$|^(encoder|decoder)_layers$", 2),
    (r"^depth$|^num_blocks$|_num_hidden_layers$|^n_layer", 2),
    (r"(num|n)_.*heads?$|^n_head$|attention_heads$|^num_heads$", 2),
    (r"lora_rank", 16),
    (r"(experts_per_tok|top_k_experts|moe_topk|num_experts_per_token|moe_k|^top_k$)", 2),
    (r"(n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts)$", 1),
    (r"(num|n)_.*experts|^num_experts$", 4),
    (r"intermediate|ffn|mlp_dim|^mlp_hidden", 48),
    (r"hidden_size|hidden_dim|embed_dim|embedding_size|^d_model$|^width$|^dim$|projection_dim|out_dim|output_dim", 32),
    (r"proj_dim|^n_embd|mm_embed_dim", 32),
    (r"vocab_size", 256),
)


def tiny(cls: Any, over: dict[str, Any] | None = None) -> Any:
    """The default configuration of a class, shrunk.

    Args:
        over: dotted path -> value; the name of a configuration class stands for its shrunk default.
    """
    fields = shrink(cls().to_dict())
    for path, value in (over or {}).items():
        if isinstance(value, str) and value.endswith("Config"):
            import transformers

            value = shrink(getattr(transformers, value)().to_dict())
        inner = fields
        *parents, last = path.split(".")
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return cls(**fields)


def shrink(fields: dict[str, Any], tokens: Iterator[int] | None = None) -> dict[str, Any]:
    """A configuration's fields with every size cut down; patches are 4 pixels and images 16."""
    tokens = itertools.count(5) if tokens is None else tokens
    small = {}
    for name, value in fields.items():
        if not DROP.search(name):
            kept = _shrink_value(fields, name, value, tokens)
            if kept is not DROP:
                small[name] = kept
    stages = fields.get("out_features") or fields.get("_out_features") or ()
    if len(stages) > 1:
        small["num_hidden_layers"] = len(stages)
        small["out_features"] = [f"stage{i + 1}" for i in range(len(stages))]
    return small


def _shrink_value(fields: dict[str, Any], name: str, value: Any, tokens: Iterator[int]) -> Any:
    if isinstance(value, dict):
        if name in ("rope_parameters", "rope_scaling"):
            return _shrink_rope(value)
        return shrink(value, tokens) if "model_type" in value or name.endswith("_config") else value
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if name == "patch_size":
            return 4
        if name in ("image_size", "img_size", "crop_size") and "patch_size" in fields:
            return 16
        if re.search(r"(token_ids?|_index|_id)$", name) and value >= 250:
            return next(tokens)
        limit = next((limit for pattern, limit in LIMITS if re.search(pattern, name)), value)
        return min(value, limit) if value >= 1 else value
    if isinstance(value, (list, tuple)):
        if name in ("patch_size", "image_size") and len(value) == 2:
            return [4, 4] if name == "patch_size" else [16, 16]
        if name.strip("_") in ("out_features", "out_indices"):
            return DROP
        if re.search("indexes|indices", name):
            return [1]
    return value


def _shrink_rope(rope: dict[str, Any]) -> dict[str, Any]:
    small = {name: _shrink_rope(value) if isinstance(value, dict) else value for name, value in rope.items()}
    if "mrope_section" in rope:
        small["mrope_section"] = [2, 3, 3] if len(rope["mrope_section"]) == 3 else [2] * len(rope["mrope_section"])
    return small
