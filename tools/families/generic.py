"""Small models laid out like torch.hub repositories and hand-made ones, with the attribute names of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families import Family

DIM = 32


def families() -> Iterator[Family]:
    def row(name: str, cls: type[nn.Module], positions: str, patch: Any = None, refused: bool = False, **kwargs: Any):  # type: ignore[no-untyped-def]
        stem = "several convs" if refused else "conv"
        return Family("generic", name, lambda: cls(**kwargs).eval(), stem, positions, patch, refused)

    interpolated = "absolute, class token, interpolated in forward"
    yield row("DINO layout", Dino, interpolated, 12)
    yield row("DINOv2 layout", DinoV2, interpolated, 16)
    yield row("DINOv2 layout, registers", DinoV2, interpolated, 28, registers=2)
    yield row(
        "MAE layout, with decoder and pixel head", MaskedAutoencoder, "fixed tables, encoder and decoder", (12, 16)
    )
    yield row("CLIP layout (visual tower beside a text table)", TwoTowers, "absolute, class token", 12)
    yield row("hand-made, nn.Embedding positions", HandMade, "absolute, embedding", (6, 9))
    yield row("hand-made, position map in a buffer", HandMade, "absolute map, buffer", (6, 9), table="buffer")
    yield row("hand-made, no positions", HandMade, "none", (6, 9), table="none")
    yield row("hand-made, stem of three convolutions", ConvStemmed, "absolute", 8, refused=True)
    yield Family(
        "generic", "timm VisionTransformer built by class", _timm_class, "conv", "absolute, class token", (12, 9)
    )
    yield Family("generic", "module that holds a timm model", _holding, "conv", "absolute, class token", (12, 9))


def _timm_class() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, embed_dim=DIM, depth=1, num_heads=2, num_classes=3).eval()


def _holding() -> nn.Module:
    import timm

    backbone = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0)
    return nn.Sequential(backbone, nn.Linear(64, 3)).eval()


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, dim: int = DIM, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 48), nn.GELU(), nn.Linear(48, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Sizes as ints (DINO) or as pairs (DINOv2, MAE)."""

    def __init__(self, img_size: int, patch_size: int, pairs: bool) -> None:
        super().__init__()
        side = img_size // patch_size
        self.img_size = (img_size, img_size) if pairs else img_size
        self.patch_size = (patch_size, patch_size) if pairs else patch_size
        if pairs:
            self.patches_resolution = (side, side)
        self.num_patches = side * side
        self.proj = nn.Conv2d(3, DIM, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Dino(nn.Module):
    """DINO: an interpolated table, and sizes as ints on the patch embedding."""

    pairs = False

    def __init__(self, img_size: int = 32, patch_size: int = 8) -> None:
        super().__init__()
        self.embed_dim = DIM
        self.patch_embed = PatchEmbed(img_size, patch_size, self.pairs)
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches + 1, DIM))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(DIM)

    def patch_side(self) -> int:
        return int(self.patch_embed.patch_size)  # type: ignore[arg-type]

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        count = self.pos_embed.shape[1] - 1
        if x.shape[1] - 1 == count and w == h:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (math.isqrt(count), -1))
        grid = F.interpolate(grid, size=(w // self.patch_side(), h // self.patch_side()), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def prepare(self, x: Tensor) -> Tensor:
        w, h = x.shape[-2:]
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return x + self.interpolate_pos_encoding(x, w, h)

    def forward(self, x: Tensor) -> Any:
        x = self.prepare(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class DinoV2(Dino):
    """DINOv2: sizes as pairs, the patch size again on the model, registers, a mask token, blocks in chunks."""

    pairs = True

    def __init__(self, img_size: int = 56, patch_size: int = 14, registers: int = 0) -> None:
        super().__init__(img_size, patch_size)
        self.patch_size = patch_size
        self.num_register_tokens, self.interpolate_offset = registers, 0.1
        self.register_tokens = nn.Parameter(torch.randn(1, registers, DIM)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, DIM))
        self.blocks = nn.ModuleList([nn.ModuleList([Block()]), nn.ModuleList([nn.Identity(), Block()])])

    def patch_side(self) -> int:
        return self.patch_size

    def forward(self, x: Tensor) -> Any:
        x = self.prepare(x)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for chunk in self.blocks:
            for block in chunk:  # type: ignore[attr-defined]
                x = block(x)
        return {"x_norm_clstoken": self.norm(x)[:, 0], "x_norm_patchtokens": self.norm(x)[:, 1:]}


class MaskedAutoencoder(nn.Module):
    """MAE: an encoder of the visible patches, a decoder with its own table, a head that predicts pixels."""

    def __init__(self, img_size: int = 32, patch_size: int = 8) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, True)
        shape = (1, self.patch_embed.num_patches + 1, DIM)
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.mask_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.randn(shape), requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(torch.randn(shape), requires_grad=False)
        self.block, self.decoder_block = Block(), Block()
        self.decoder_pred = nn.Linear(DIM, 3 * patch_size**2)

    def unpatchify(self, x: Tensor) -> Tensor:
        (p, q), (h, w) = self.patch_embed.patch_size, self.patch_embed.patches_resolution  # type: ignore[misc]
        return x.reshape(len(x), h, w, p, q, 3).permute(0, 5, 1, 3, 2, 4).reshape(len(x), 3, h * p, w * q)

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patch_embed(x) + self.pos_embed[:, 1:]
        keep = int(x.shape[1] * (1 - mask_ratio))
        shuffle = torch.rand(x.shape[:2]).argsort(1)
        restore = shuffle.argsort(1)
        x = x.gather(1, shuffle[:, :keep, None].expand(-1, -1, DIM))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        return self.block(x), (restore >= keep).float(), restore

    def forward_decoder(self, x: Tensor, restore: Tensor) -> Tensor:
        hidden = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        full = torch.cat([x[:, 1:], hidden], 1).gather(1, restore[..., None].expand(-1, -1, DIM))
        return self.decoder_pred(self.decoder_block(torch.cat([x[:, :1], full], 1) + self.decoder_pos_embed)[:, 1:])

    def forward(self, imgs: Tensor) -> Tensor:
        latent, _, restore = self.forward_encoder(imgs, 0.75)
        return self.unpatchify(self.forward_decoder(latent, restore))


class Tower(nn.Module):
    """The image tower of CLIP's own repository."""

    def __init__(self, input_resolution: int, patch_size: int) -> None:
        super().__init__()
        self.input_resolution = input_resolution
        self.conv1 = nn.Conv2d(3, DIM, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(DIM))
        self.positional_embedding = nn.Parameter(torch.randn((input_resolution // patch_size) ** 2 + 1, DIM))
        self.transformer = Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.transformer(x)


class TwoTowers(nn.Module):
    """A tower beside a text table, which the grid must not touch."""

    def __init__(self) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(40, DIM))
        self.visual = Tower(32, 8)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.visual(image), self.positional_embedding


class HandMade(nn.Module):
    """Sizes in a configuration dictionary, rectangular patches and images, positions wherever ``table`` says."""

    def __init__(self, table: str = "embedding") -> None:
        super().__init__()
        self.config = {"image_size": (24, 32), "patch_size": (4, 8)}
        self.to_patches = nn.Conv2d(1, DIM, (4, 8), (4, 8))
        self.num_patches = 24
        if table == "embedding":
            self.position_embedding = nn.Embedding(24, DIM)
            self.register_buffer("position_ids", torch.arange(24)[None], persistent=False)
        elif table == "buffer":
            self.register_buffer("pos_embed", torch.randn(1, 6, 4, DIM))
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_patches(x).flatten(2).transpose(1, 2)
        if hasattr(self, "position_embedding"):
            x = x + self.position_embedding(self.position_ids)
        elif hasattr(self, "pos_embed"):
            x = x + self.pos_embed.flatten(1, 2)  # type: ignore[operator]
        return self.block(x)


class ConvStemmed(nn.Module):
    """A stem of several convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, DIM, 3, 2, 1), nn.GELU(), nn.Conv2d(DIM, DIM, 2, 2)
        )
        self.pos_embed = nn.Parameter(torch.randn(1, 16, DIM))
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed)
