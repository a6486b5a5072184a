"""`DeepCache`: a U-Net whose inner blocks run only at every n-th step of a row (Ma, Fang & Wang 2023).

A U-Net's deep, coarse features differ little between neighbouring steps. So the input of the last up block is kept in
the row's memory, and in the steps between only the outermost blocks run, with the new latents and timestep. diffusers'
caches keep one state per batch. Here rows of one pass are at different steps, so the outer blocks run for all of them
together and the inner ones only for the rows that are due. A row's image depends only on its own steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from calotype_shared.errors import ModelLoadError
from calotype_worker.models.base import Rows
from calotype_worker.models.lora import LoraBank

_DEEP = "deep"  # key in a row's memory of the input to the last up block, (C, h, w)
_KNOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")


class _Seen(NamedTuple):
    """The inputs that every block of the network gets besides hidden states."""

    embedding: torch.Tensor  # (R, features) of timesteps and additional conditions
    text: torch.Tensor  # (R, tokens, features)
    text_bias: torch.Tensor | None  # (R, 1, tokens)

    def part(self, chosen: Sequence[int]) -> _Seen:
        bias = self.text_bias
        return _Seen(self.embedding[chosen], self.text[chosen], None if bias is None else bias[chosen])

    @property
    def attention(self) -> dict[str, Any]:
        return {"encoder_hidden_states": self.text, "encoder_attention_mask": self.text_bias}


class DeepCache:
    """Called instead of a `UNet2DConditionModel`, in the engine's thread."""

    def __init__(self, unet: Any, *, every: int, loras: LoraBank, name: str) -> None:
        """Raises ModelLoadError if the network of model `name` is not a U-Net of a known structure."""
        outermost = [*getattr(unet, "down_blocks", ())[:1], *getattr(unet, "up_blocks", ())[-1:]]
        kinds = [type(block).__name__ for block in outermost]
        if not outermost or len(unet.up_blocks) < 2 or not set(kinds) <= set(_KNOWN):
            raise ModelLoadError(
                f"model {name!r}: deep_cache={every} needs a U-Net of Stable Diffusion 1.x, 2.x or XL, and this model "
                f"has a {type(unet).__name__}; leave it off for this model (use first_block_cache for transformers)"
            )
        self._unet = unet
        self._every = every
        self._loras = loras

    def __call__(
        self,
        rows: Rows,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        *,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """The network's forward pass, like diffusers' own. ControlNets' residuals are zero in other rows."""
        unet = self._unet
        embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timesteps), timestep_cond)
        added = unet.get_aug_embed(
            emb=embedding, encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added_cond_kwargs
        )
        embedding = embedding if added is None else embedding + added
        embedding = embedding if unet.time_embed_act is None else unet.time_embed_act(embedding)
        bias = None
        if encoder_attention_mask is not None:
            bias = ((1 - encoder_attention_mask.to(sample.dtype)) * -10000.0).unsqueeze(1)
        text = unet.process_encoder_hidden_states(
            encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added_cond_kwargs
        )
        seen = _Seen(embedding, text, bias)

        skips = [unet.conv_in(sample)]
        first = unet.down_blocks[0]
        for number, resnet in enumerate(first.resnets):
            hidden = resnet(skips[-1], embedding)
            if getattr(first, "attentions", None):
                hidden = first.attentions[number](hidden, **seen.attention, return_dict=False)[0]
            skips.append(hidden)
        residuals = None
        inner = skips[-1]
        if down_block_additional_residuals is not None and mid_block_additional_residual is not None:
            residuals = [*down_block_additional_residuals, mid_block_additional_residual]
            skips = [own + more for own, more in zip(skips, residuals, strict=False)]
            residuals = residuals[len(skips) :]
        deep = self._deep(rows, inner, skips[-1].shape, seen, residuals)

        hidden = _up(unet.up_blocks[-1], deep, skips, seen, None)
        if unet.conv_norm_out is not None:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        return (unet.conv_out(hidden),)

    def _deep(
        self,
        rows: Rows,
        hidden: torch.Tensor,
        size: torch.Size,
        seen: _Seen,
        residuals: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        """The input to the last up block: computed for the rows that are due, cached for the others."""
        memories = rows.memories or [None] * len(hidden)
        due = [
            row
            for row, memory in enumerate(memories)
            if memory is None or memory.step % self._every == 0 or _DEEP not in memory.kept
        ]
        fresh: dict[int, torch.Tensor] = {}
        if due:
            chosen = rows.part(due)
            own = None if residuals is None else [more[due] for more in residuals]
            with self._loras.active(chosen.loras):
                found = self._inner(hidden[due], size, seen.part(due), own)
            if len(due) == len(hidden) and not any(memories):
                return found
            fresh = dict(zip(due, found, strict=True))
        for row, feature in fresh.items():
            if (memory := memories[row]) is not None:
                memory.kept[_DEEP] = feature.clone()  # the pass's tensor would live as long as its last row
        features = [fresh[row] if m is None else m.kept[_DEEP] for row, m in enumerate(memories)]
        return torch.stack(features).to(memory_format=torch.channels_last)

    def _inner(
        self, hidden: torch.Tensor, size: torch.Size, seen: _Seen, residuals: Sequence[torch.Tensor] | None
    ) -> torch.Tensor:
        """All blocks except the outermost. `hidden` is the output of the first down block's layers, of shape `size`."""
        unet = self._unet
        odd = any(side % 2**unet.num_upsamplers for side in size[-2:])
        for downsampler in unet.down_blocks[0].downsamplers:
            hidden = downsampler(hidden)
        skips = [hidden]
        for block in unet.down_blocks[1:]:
            attention = seen.attention if getattr(block, "has_cross_attention", False) else {}
            hidden, own = block(hidden_states=hidden, temb=seen.embedding, **attention)
            skips += own
        if residuals is not None:
            skips = [own + more for own, more in zip(skips, residuals[:-1], strict=True)]
        if unet.mid_block is not None:
            attention = seen.attention if getattr(unet.mid_block, "has_cross_attention", False) else {}
            hidden = unet.mid_block(hidden, seen.embedding, **attention)
        if residuals is not None:
            hidden = hidden + residuals[-1]
        for block in unet.up_blocks[:-1]:
            count = len(block.resnets)
            own, skips = skips[-count:], skips[:-count]
            target = skips[-1].shape[-2:] if skips else size[-2:]
            hidden = _up(block, hidden, own, seen, target if odd else None)
        return hidden


def _up(block: Any, hidden: torch.Tensor, skips: Sequence[torch.Tensor], seen: _Seen, size: Any) -> torch.Tensor:
    attention = seen.attention if getattr(block, "has_cross_attention", False) else {}
    result: torch.Tensor = block(
        hidden_states=hidden,
        temb=seen.embedding,
        res_hidden_states_tuple=tuple(skips),
        upsample_size=size,
        **attention,
    )
    return result
