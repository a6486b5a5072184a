"""`FirstBlockCache`: a transformer that runs only its first block while that hardly changes (ParaAttention, 2024).

The first block's residual (what it adds to its input) shows how much the whole network's output has changed since the
last step. While the change is small, the other blocks' last residual is added again. diffusers' hook of this name
decides by the mean of a batch and keeps one state for it. Here each row decides by its own memory, and the rows that
must run pass the other blocks together, as a smaller batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from calotype_shared.errors import ModelLoadError
from calotype_worker.models.base import RowMemory, Rows
from calotype_worker.models.lora import LoraBank

_FIRST = "first"  # keys in a row's memory: the first block's residual when the others last ran, (tokens, features)
_REST = "rest"  # and the others' residual


class Stream(NamedTuple):
    """The hidden states of the blocks."""

    image: torch.Tensor  # (R, tokens, features)
    text: torch.Tensor  # (R, tokens, features)
    embedding: torch.Tensor  # (R, features) of timestep, pooled text, guidance
    places: Any = None  # rotary embedding of all rows, which have one size

    def part(self, chosen: Sequence[int]) -> Stream:
        return self._replace(image=self.image[chosen], text=self.text[chosen], embedding=self.embedding[chosen])


class Blocks(Protocol):
    """A transformer, taken apart."""

    def begin(self, **inputs: Any) -> Stream: ...

    def first(self, stream: Stream) -> Stream: ...

    def rest(self, stream: Stream) -> Stream: ...

    def end(self, stream: Stream, **inputs: Any) -> torch.Tensor: ...


class FirstBlockCache:
    """Called instead of a transformer, in the engine's thread."""

    def __init__(self, transformer: Any, *, threshold: float, loras: LoraBank, name: str) -> None:
        """Raises ModelLoadError if the network of model `name` is not a transformer of a known structure."""
        kind = BLOCKS.get(type(transformer).__name__)
        if kind is None:
            raise ModelLoadError(
                f"model {name!r}: first_block_cache={threshold:g} needs a transformer of Stable Diffusion 3 or "
                f"Flux, and this model has a {type(transformer).__name__}; leave it off for this model (use "
                "deep_cache for U-Nets)"
            )
        self._blocks: Blocks = kind(transformer)
        self._threshold = threshold
        self._loras = loras

    def __call__(self, rows: Rows, **inputs: Any) -> tuple[torch.Tensor]:
        before = self._blocks.begin(**inputs)
        head = self._blocks.first(before)
        image = self._rest(rows, head.image - before.image, head)
        return (self._blocks.end(head._replace(image=image), **inputs),)

    def _rest(self, rows: Rows, added: torch.Tensor, head: Stream) -> torch.Tensor:
        """The output of the last block, (R, tokens, features). `added` is the first block's residual."""
        memories = rows.memories or [None] * len(added)
        changes = _changes(added, memories).tolist()  # the device is waited for here
        due = [row for row, change in enumerate(changes) if not change <= self._threshold]
        image = head.image.clone()
        if due:
            with self._loras.active(rows.part(due).loras):
                image[due] = self._blocks.rest(head.part(due)).image
        for row, memory in enumerate(memories):
            if memory is None:
                continue
            if changes[row] <= self._threshold:
                image[row] += memory.kept[_REST]
            else:
                # Both are set together and only here, so a pass that failed earlier can simply be repeated.
                memory.kept = {_FIRST: added[row].clone(), _REST: image[row] - head.image[row]}
        return image


def _changes(added: torch.Tensor, memories: Sequence[RowMemory | None]) -> torch.Tensor:
    """Relative change of each row's first residual, (R,) float32; infinity if there is none cached."""
    found = torch.full((len(added),), torch.inf, device=added.device)
    known = [row for row, memory in enumerate(memories) if memory is not None and _FIRST in memory.kept]
    if known:
        before = torch.stack([m.kept[_FIRST] for m in memories if m is not None and _FIRST in m.kept]).float()
        change = (added[known].float() - before).abs().mean((1, 2)) / before.abs().mean((1, 2))
        found[known] = change
    return found


class StableDiffusion3Blocks:
    """Of an `SD3Transformer2DModel`; the parts of its forward pass."""

    def __init__(self, transformer: Any) -> None:
        self._net = transformer

    def begin(self, **inputs: Any) -> Stream:
        net = self._net
        return Stream(
            image=net.pos_embed(inputs["hidden_states"]).contiguous(),
            text=net.context_embedder(inputs["encoder_hidden_states"]),
            embedding=net.time_text_embed(inputs["timestep"], inputs["pooled_projections"]),
        )

    def first(self, stream: Stream) -> Stream:
        return _through(self._net.transformer_blocks[:1], stream)

    def rest(self, stream: Stream) -> Stream:
        return _through(self._net.transformer_blocks[1:], stream)

    def end(self, stream: Stream, **inputs: Any) -> torch.Tensor:
        net = self._net
        patches = net.proj_out(net.norm_out(stream.image, stream.embedding))
        side = net.config.patch_size
        height, width = (length // side for length in inputs["hidden_states"].shape[-2:])
        cells = patches.reshape(len(patches), height, width, side, side, net.out_channels)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), net.out_channels, height * side, width * side)


class FluxBlocks:
    """Of a `FluxTransformer2DModel`: blocks of two streams, then of one."""

    def __init__(self, transformer: Any) -> None:
        self._net = transformer

    def begin(self, **inputs: Any) -> Stream:
        net = self._net
        image = net.x_embedder(inputs["hidden_states"])
        scales = [inputs["timestep"].to(image.dtype) * 1000]
        if inputs["guidance"] is not None:
            scales.append(inputs["guidance"].to(image.dtype) * 1000)
        return Stream(
            image=image,
            text=net.context_embedder(inputs["encoder_hidden_states"]),
            embedding=net.time_text_embed(*scales, inputs["pooled_projections"]),
            places=net.pos_embed(torch.cat((inputs["txt_ids"], inputs["img_ids"]))),
        )

    def first(self, stream: Stream) -> Stream:
        return _through([self._all[0]], stream)

    def rest(self, stream: Stream) -> Stream:
        return _through(self._all[1:], stream)

    def end(self, stream: Stream, **inputs: Any) -> torch.Tensor:
        net = self._net
        result: torch.Tensor = net.proj_out(net.norm_out(stream.image, stream.embedding))
        return result

    @property
    def _all(self) -> list[Any]:
        return [*self._net.transformer_blocks, *self._net.single_transformer_blocks]


def _through(blocks: Sequence[Any], stream: Stream) -> Stream:
    image, text = stream.image, stream.text
    places = {} if stream.places is None else {"image_rotary_emb": stream.places}
    for block in blocks:
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=stream.embedding, **places)
    return stream._replace(image=image, text=text)


BLOCKS: dict[str, Callable[[Any], Blocks]] = {
    "SD3Transformer2DModel": StableDiffusion3Blocks,
    "FluxTransformer2DModel": FluxBlocks,
}
