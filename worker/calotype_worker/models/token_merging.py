"""Token merging for U-Nets (Bolya & Hoffman 2023): similar tokens are merged for self-attention.

Attention costs grow with the square of the number of tokens, so they are highest at the highest resolution, where
neighbouring tokens are similar. The first token of each 2x2 square is a destination. The other tokens most similar to a
destination (by cosine) are averaged into it, and afterwards get its result. Every row is matched separately and without
random numbers: with the paper's random destinations, a row's image would depend on the batch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from calotype_shared.errors import ModelLoadError


class Matches:
    """Which tokens of each row are merged into which, in one layer of the network."""

    def __init__(self, tokens: torch.Tensor, height: int, width: int, ratio: float) -> None:
        """`tokens` (R, height * width, features); `ratio` of them are merged, at most all but the destinations."""
        # A compiler cannot trace the cache, and does not need it.
        find = _slots.__wrapped__ if torch.compiler.is_compiling() else _slots
        self._kept, self._others = find(height, width, tokens.device)
        count = min(int(ratio * height * width), len(self._others))
        unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
        likeness, best = (unit[:, self._others] @ unit[:, self._kept].transpose(1, 2)).max(-1)
        order = likeness.argsort(dim=1, descending=True, stable=True)
        self._merged, self._alone = order[:, :count], order[:, count:]  # (R, …) indices among the other tokens
        self._into = best.gather(1, self._merged)  # (R, count) indices among the destinations

    def merge(self, tokens: torch.Tensor) -> torch.Tensor:
        """(R, N, features) to (R, N - count, features): the unmerged tokens, then the destinations."""
        others = tokens[:, self._others]
        alone = others.gather(1, _wide(self._alone, tokens))
        merged = others.gather(1, _wide(self._merged, tokens))
        kept = tokens[:, self._kept].scatter_reduce(1, _wide(self._into, tokens), merged, reduce="mean")
        return torch.cat([alone, kept], dim=1)

    def split(self, tokens: torch.Tensor) -> torch.Tensor:
        """Back to (R, N, features); each merged token becomes a copy of its destination."""
        alone, kept = tokens[:, : self._alone.shape[1]], tokens[:, self._alone.shape[1] :]
        others = torch.empty_like(tokens[:, :1]).expand(-1, len(self._others), -1).clone()
        others = others.scatter(1, _wide(self._alone, tokens), alone)
        others = others.scatter(1, _wide(self._merged, tokens), kept.gather(1, _wide(self._into, tokens)))
        result = tokens.new_empty((len(tokens), len(self._kept) + len(self._others), tokens.shape[-1]))
        result[:, self._kept] = kept
        result[:, self._others] = others
        return result


class MergingProcessor:
    """A diffusers attention processor that runs another one on fewer tokens. Engine's thread only."""

    def __init__(self, inner: Any, ratio: float, *, native_side: int) -> None:
        """`native_side`: tokens per side at the model's native size. Another size requires compiling a new graph."""
        self._inner = inner
        self._ratio = ratio
        self._size = (native_side, native_side)

    def look(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """A hook before the module that turns an image (R, C, h, w) into tokens: records the image's shape."""
        height, width = inputs[0].shape[-2:]
        self._size = (height, width)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **further: Any,
    ) -> torch.Tensor:
        matches = Matches(hidden_states, *self._size, self._ratio)
        result = self._inner(attn, matches.merge(hidden_states), encoder_hidden_states, attention_mask, **further)
        return matches.split(result)


def merge_tokens(unet: Any, *, ratio: float, name: str) -> None:
    """Make a U-Net merge tokens in all self-attention layers of the highest resolution that has any.

    Raises:
        ModelLoadError: the network of model `name` is not a U-Net with attention.
    """
    downs, ups = list(getattr(unet, "down_blocks", ())), list(getattr(unet, "up_blocks", ()))[::-1]
    for level, pair in enumerate(zip(downs, ups, strict=True)):
        images = [attention for block in pair for attention in getattr(block, "attentions", ())]
        for image in images:
            for block in image.transformer_blocks:
                side = int(unet.config.sample_size) >> level
                processor = MergingProcessor(block.attn1.processor, ratio, native_side=side)
                block.attn1.set_processor(processor)
                image.register_forward_pre_hook(processor.look)
        if images:
            return
    raise ModelLoadError(
        f"model {name!r}: token_merging={ratio:g} needs a U-Net with attention, and this model has a "
        f"{type(unet).__name__}; leave it off for this model"
    )


@functools.lru_cache(maxsize=64)
def _slots(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the destination tokens, and of the others. Not as masks, which would block on the device."""
    kept = [row * width + column for row in range(0, height, 2) for column in range(0, width, 2)]
    others = sorted(set(range(height * width)) - set(kept))
    return torch.tensor(kept, device=device), torch.tensor(others, dtype=torch.long, device=device)


def _wide(index: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(R, n) to (R, n, features), for gather and scatter."""
    return index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
