"""Small models laid out like torch.hub repositories: the same attribute names, as little else as possible."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 48), nn.GELU(), nn.Linear(48, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class IntPatchEmbed(nn.Module):
    """DINO's: sizes are plain ints."""

    def __init__(self, img_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.img_size, self.patch_size = img_size, patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class PairPatchEmbed(nn.Module):
    """DINOv2's and MAE's: sizes are pairs, and the forward insists on them."""

    def __init__(self, img_size: int | tuple[int, int], patch_size: int | tuple[int, int], dim: int) -> None:
        super().__init__()
        pair = lambda s: (s, s) if isinstance(s, int) else tuple(s)  # noqa: E731
        self.img_size, self.patch_size = pair(img_size), pair(patch_size)
        self.patches_resolution = tuple(i // p for i, p in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches = math.prod(self.patches_resolution)
        self.proj = nn.Conv2d(3, dim, self.patch_size, self.patch_size)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] % self.patch_size[0] == 0
        assert x.shape[3] % self.patch_size[1] == 0
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class Dino(nn.Module):
    def __init__(self, img_size: int = 32, patch_size: int = 8, dim: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.num_features = self.embed_dim = dim
        self.patch_embed = IntPatchEmbed(img_size, patch_size, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches + 1, dim))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Identity()

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        npatch, n = x.shape[1] - 1, self.pos_embed.shape[1] - 1
        if npatch == n and w == h:
            return self.pos_embed
        side = math.isqrt(n)
        size = (w // self.patch_embed.patch_size, h // self.patch_embed.patch_size)
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=size, mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], grid], 1)

    def forward(self, x: Tensor) -> Tensor:
        _, _, w, h = x.shape
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + self.interpolate_pos_encoding(x, w, h)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class DinoV2(nn.Module):
    def __init__(self, img_size: int = 56, patch_size: int = 14, dim: int = 32, registers: int = 2) -> None:
        super().__init__()
        self.num_features = self.embed_dim = dim
        self.num_tokens, self.n_blocks, self.num_heads = 1, 2, 2
        self.patch_size = patch_size
        self.num_register_tokens = registers
        self.interpolate_antialias, self.interpolate_offset = False, 0.1
        self.patch_embed = PairPatchEmbed(img_size, patch_size, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches + 1, dim))
        self.register_tokens = nn.Parameter(torch.randn(1, registers, dim)) if registers else None
        self.chunked_blocks = True
        self.blocks = nn.ModuleList(
            [nn.ModuleList([Block(dim)]), nn.ModuleList([nn.Identity(), Block(dim)])]  # chunks, padded by identities
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Identity()
        self.mask_token = nn.Parameter(torch.randn(1, dim))

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        n = self.pos_embed.shape[1] - 1
        if x.shape[1] - 1 == n and w == h:
            return self.pos_embed
        side = math.isqrt(n)
        assert side * side == n
        scale = tuple((s // self.patch_size + self.interpolate_offset) / side for s in (w, h))
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], grid], 1)

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
        _, _, w, h = x.shape
        x = self.patch_embed(x)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token[None], x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + self.interpolate_pos_encoding(x, w, h)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for chunk in self.blocks:
            for block in chunk:
                x = block(x)
        x = self.norm(x)
        count = 1 + self.num_register_tokens
        return {"x_norm_clstoken": x[:, 0], "x_norm_regtokens": x[:, 1:count], "x_norm_patchtokens": x[:, count:]}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x)["x_norm_clstoken"])


class MaskedAutoencoder(nn.Module):
    """MAE's layout; ``order`` says how its pixel head flattens a patch."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int | tuple[int, int] = 8,
        dim: int = 32,
        decoder_dim: int = 24,
        order: str = "h w c",
    ) -> None:
        super().__init__()
        self.order = order
        self.patch_embed = PairPatchEmbed(img_size, patch_size, dim)
        count, (h, w) = self.patch_embed.num_patches, self.patch_embed.patch_size
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, count + 1, dim), requires_grad=False)
        self.blocks = nn.ModuleList([Block(dim), Block(dim)])
        self.norm = nn.LayerNorm(dim)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, count + 1, decoder_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList([Block(decoder_dim)])
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, h * w * 3)
        self.norm_pix_loss = False

    def patchify(self, imgs: Tensor) -> Tensor:
        (p, q), n = self.patch_embed.patch_size, len(imgs)
        x = imgs.reshape(n, 3, imgs.shape[2] // p, p, imgs.shape[3] // q, q)
        axes = (0, 2, 4, 3, 5, 1) if self.order == "h w c" else (0, 2, 4, 1, 3, 5)
        return x.permute(*axes).reshape(n, -1, p * q * 3)

    def unpatchify(self, x: Tensor) -> Tensor:
        p, q = self.patch_embed.patch_size
        h, w = self.patch_embed.patches_resolution
        if self.order == "h w c":
            x = x.reshape(len(x), h, w, p, q, 3).permute(0, 5, 1, 3, 2, 4)
        else:
            x = x.reshape(len(x), h, w, 3, p, q).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(len(x), 3, h * p, w * q)

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patch_embed(x) + self.pos_embed[:, 1:]
        n, length, _ = x.shape
        keep = int(length * (1 - mask_ratio))
        shuffle = torch.rand(n, length).argsort(1)
        restore = shuffle.argsort(1)
        x = x.gather(1, shuffle[:, :keep, None].expand(-1, -1, x.shape[-1]))
        mask = (restore >= keep).float()
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(n, -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, restore

    def forward_decoder(self, x: Tensor, restore: Tensor) -> Tensor:
        x = self.decoder_embed(x)
        hidden = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        full = torch.cat([x[:, 1:], hidden], 1).gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], full], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        latent, mask, restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, restore)
        loss = ((pred - self.patchify(imgs)) ** 2).mean(-1)
        return (loss * mask).sum() / mask.sum(), pred, mask


class TwoTowers(nn.Module):
    """The layout of OpenAI's CLIP: a tower called ``visual``, and a text table that the grid must not touch."""

    class Visual(nn.Module):
        def __init__(self, input_resolution: int, patch_size: int, width: int) -> None:
            super().__init__()
            self.input_resolution = input_resolution
            self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
            self.class_embedding = nn.Parameter(torch.randn(width))
            self.positional_embedding = nn.Parameter(torch.randn((input_resolution // patch_size) ** 2 + 1, width))
            self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(Block(width), Block(width))})
            self.proj = nn.Parameter(torch.randn(width, 16))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
            return self.transformer["resblocks"](x)[:, 0] @ self.proj

    def __init__(self, image_resolution: int = 32, patch_size: int = 8, context_length: int = 20) -> None:
        super().__init__()
        self.context_length = context_length
        self.positional_embedding = nn.Parameter(torch.randn(context_length, 16))
        self.token_embedding = nn.Embedding(50, 16)
        self.visual = self.Visual(image_resolution, patch_size, 32)

    def encode_text(self, text: Tensor) -> Tensor:
        return (self.token_embedding(text) + self.positional_embedding).mean(1)

    def forward(self, image: Tensor) -> Tensor:
        return self.visual(image)


class HandMade(nn.Module):
    """A user's own: sizes in a configuration dictionary, positions in an ``nn.Embedding`` or a buffer, any image."""

    def __init__(self, size: tuple[int, int] = (24, 32), patch: tuple[int, int] = (4, 8), table: str = "embedding"):
        super().__init__()
        self.config = {"image_size": list(size), "patch_size": list(patch), "window": list(patch), "layers": 1}
        self.grid_size = tuple(s // p for s, p in zip(size, patch, strict=True))
        self.tubes = patch  # the tuple that patch_size once was; nothing says that it is one
        self.patch_size = patch
        self.to_patches = nn.Conv2d(1, 16, patch, patch)
        self.num_patches = math.prod(self.grid_size)
        if table == "embedding":
            self.position_embedding = nn.Embedding(self.num_patches, 16)
            self.register_buffer("position_ids", torch.arange(self.num_patches)[None], persistent=False)
        elif table == "buffer":
            self.register_buffer("pos_embed", torch.randn(1, *self.grid_size, 16))
        elif table == "plain":
            self.pos_embed = torch.randn(1, self.num_patches, 16)
        self.table = table
        self.block = Block(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_patches(x).flatten(2).transpose(1, 2)
        if self.table == "embedding":
            x = x + self.position_embedding(self.position_ids)
        elif self.table != "none":
            x = x + self.pos_embed.reshape(1, -1, 16)
        assert x.shape[1] == self.num_patches
        return self.block(x).mean(1)


class Video(nn.Module):
    """Tubes of frames; one joint table (VideoMAE), or one over space and one over time (TimeSformer)."""

    def __init__(self, img_size: int = 32, patch_size: int = 8, frames: int = 4, tubelet: int = 2, joint: bool = True):
        super().__init__()
        self.img_size, self.patch_size, self.num_frames, self.tubelet_size = img_size, patch_size, frames, tubelet
        self.joint = joint
        self.proj = nn.Conv3d(3, 16, (tubelet, patch_size, patch_size), (tubelet, patch_size, patch_size))
        side, steps = img_size // patch_size, frames // tubelet
        if joint:
            self.pos_embed = nn.Parameter(torch.randn(1, steps * side * side, 16))
        else:
            self.pos_embed = nn.Parameter(torch.randn(1, side * side, 16))
            self.temporal_embed = nn.Parameter(torch.randn(1, steps, 16))
        self.block = Block(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(3).permute(0, 2, 3, 1)
        if self.joint:
            return self.block(x.flatten(1, 2) + self.pos_embed)
        return self.block((x + self.pos_embed[:, None] + self.temporal_embed[:, :, None]).flatten(1, 2))


class WindowedMap(nn.Module):
    """SAM's image encoder: a position map, and decomposed relative tables of a window and of the whole grid."""

    class Attention(nn.Module):
        def __init__(self, size: tuple[int, int]) -> None:
            super().__init__()
            self.rel_pos_h = nn.Parameter(torch.randn(2 * size[0] - 1, 16))
            self.rel_pos_w = nn.Parameter(torch.randn(2 * size[1] - 1, 16))

        def forward(self, x: Tensor) -> Tensor:
            height, width = x.shape[1:3]
            rows, columns = torch.arange(height), torch.arange(width)
            rows = F.interpolate(self.rel_pos_h.T[None], 2 * height - 1)[0].T[rows[:, None] - rows + height - 1]
            columns = F.interpolate(self.rel_pos_w.T[None], 2 * width - 1)[0].T[columns[:, None] - columns + width - 1]
            bias = (
                torch.einsum("bhwc,hkc->bhwk", x, rows)[..., None]
                + torch.einsum("bhwc,wkc->bhwk", x, columns)[..., None, :]
            )
            return torch.einsum("bhwkl,bklc->bhwc", bias.flatten(-2).softmax(-1).unflatten(-1, (height, width)), x)

    class Block(nn.Module):
        def __init__(self, grid: tuple[int, int], window_size: int) -> None:
            super().__init__()
            self.window_size = window_size
            self.attn = WindowedMap.Attention((window_size, window_size) if window_size else grid)

        def forward(self, x: Tensor) -> Tensor:
            size = self.window_size
            if not size:
                return x + self.attn(x)
            b, h, w, c = x.shape
            windows = x.reshape(b, h // size, size, w // size, size, c).transpose(2, 3)
            y = self.attn(windows.reshape(-1, size, size, c)).reshape(windows.shape)
            return x + y.transpose(2, 3).reshape(b, h, w, c)

    def __init__(self, img_size: int | tuple[int, int] = 32, patch_size: int = 8) -> None:
        super().__init__()
        self.img_size = img_size
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        grid = (sides[0] // patch_size, sides[1] // patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 16, patch_size, patch_size)})
        self.pos_embed = nn.Parameter(torch.randn(1, *grid, 16))
        self.blocks = nn.Sequential(self.Block(grid, 2), self.Block(grid, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.patch_embed["proj"](x).permute(0, 2, 3, 1) + self.pos_embed)
