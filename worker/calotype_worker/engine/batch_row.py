"""`BatchRow`: one request's place in a step batch, and `layout`: which rows of a forward pass the members occupy.

A member has one row in the forward pass, and a second, unconditional one if it is guided. The order is: the conditional
rows of all members, then the unconditional rows of guided members, then padding.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from calotype_worker.models.base import Conditioning, ControlRows, RowMemory
from calotype_worker.request import ControlInput, GenerationRequest
from calotype_worker.sampling.row_scheduler import RowScheduler
from calotype_worker.sampling.table import SamplerTable

_AHEAD_BYTES = 32 * 2**20  # of one request's noise


@dataclass(frozen=True, kw_only=True)
class InpaintBlend:
    """State of inpainting: after every step the unmasked part is reset to the source, noised to the step's level."""

    mask: torch.Tensor  # (1, h, w) float32, 1 where to paint
    image: torch.Tensor  # (C, h, w) latents of the source
    noise: torch.Tensor  # (C, h, w), one draw for the whole trajectory
    noising: torch.Tensor  # (N + 1, 2): shares of image and noise before each step

    def blend(self, sample: torch.Tensor, step: int) -> torch.Tensor:
        """The sample (C, h, w) after `step` steps, with the kept part put back."""
        image_share, noise_share = self.noising[step].tolist()
        return self.mask * sample + (1 - self.mask) * (image_share * self.image + noise_share * self.noise)


@dataclass(kw_only=True, eq=False)
class BatchRow:
    """One request inside a step batch. `step` is written by the engine's thread and may be read by any."""

    request: GenerationRequest
    generator: torch.Generator  # the request's own, on the CPU, so that other rows cannot affect its noise
    sampler: SamplerTable | RowScheduler
    total_steps: int  # network evaluations
    guided: bool  # whether it has an unconditional row besides the conditional one
    step: int = 0  # evaluations done
    latents: torch.Tensor | None = None  # (1, C, h, w) float32: the start; later the batch's state is the truth
    conditioning: Conditioning = field(default_factory=dict)  # of one row, without a batch dimension
    negative: Conditioning = field(default_factory=dict)  # the same, for guided requests
    kept: InpaintBlend | None = None
    controls: Sequence[tuple[ControlInput, torch.Tensor]] = ()  # with their images, (3, H, W) in 0..1
    ahead: deque[torch.Tensor] = field(default_factory=deque)  # noise of coming steps, each (C, h, w)
    # Of its conditional and its unconditional row, for models that cache.
    memories: tuple[RowMemory, RowMemory] = field(default_factory=lambda: (RowMemory(), RowMemory()))

    @property
    def rows(self) -> int:
        """The number of rows that this occupies in a step batch."""
        return 2 if self.guided else 1

    def forget(self) -> None:
        """Free the state of its rows after it has left its step batch; it may still wait for its decode."""
        for memory in self.memories:
            memory.kept.clear()

    def draw_ahead(self, shape: tuple[int, int, int]) -> None:
        """Draw the noise of all steps outside the step loop; for large latents, only that of the first steps."""
        if isinstance(self.sampler, SamplerTable):
            most = _AHEAD_BYTES // (4 * math.prod(shape))
            for _ in range(min(most, sum(self.sampler.draws_noise))):
                self.ahead.append(torch.randn((1, *shape), generator=self.generator)[0])

    def noise(self, shape: tuple[int, int, int]) -> torch.Tensor:
        """Fresh noise (C, h, w), on the CPU."""
        return self.ahead.popleft() if self.ahead else torch.randn((1, *shape), generator=self.generator)[0]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How members map to the R rows of a forward pass."""

    source: torch.Tensor  # (R,) the member that each row belongs to
    owners: Sequence[int | None]  # the same, None for padding
    conditioning: Conditioning  # each (R, …)
    lengths: Mapping[str, Sequence[int]]  # each row's own length in padded tensors
    guided: torch.Tensor  # (G,) members that have an unconditional row
    guidance: torch.Tensor  # (G, 1, 1, 1) float32
    unconditional: torch.Tensor  # (R,) each row's unconditional row, or its own if it has none
    scales: torch.Tensor  # (R, 1, 1, 1) float32: guidance of guided rows, 1 for others
    loras: Sequence[tuple[str, torch.Tensor]]
    control_images: Mapping[tuple[str, int], torch.Tensor]  # by name and number of earlier uses of it: (R, 3, H, W)

    def controls(self, members: Sequence[BatchRow]) -> list[ControlRows]:
        """Every ControlNet's input at the members' current steps."""
        found = []
        for (name, nth), images in self.control_images.items():
            scales = torch.zeros(len(self.owners))
            for row, owner in enumerate(self.owners):
                if owner is not None and (control := _nth(members[owner], name, nth)) is not None:
                    scales[row] = control[0].scale_at(members[owner].step, members[owner].total_steps)
            found.append(ControlRows(name=name, images=images, scales=scales))
        return found

    def memories(self, members: Sequence[BatchRow]) -> list[RowMemory | None]:
        """Each row's memory, at the members' current steps.

        None for padding, and for rows with ControlNets: their scales change from step to step, so cached values would
        be outdated.
        """
        found: list[RowMemory | None] = []
        for row, owner in enumerate(self.owners):
            own = None
            if owner is not None and not members[owner].controls:
                own = members[owner].memories[row >= len(members)]
                own.step = members[owner].step
            found.append(own)
        return found


def layout(members: Sequence[BatchRow], *, buckets: Sequence[int], device: torch.device) -> Layout:
    """Rows for these members, padded to the next bucket."""
    guided = [number for number, row in enumerate(members) if row.guided]
    source = [*range(len(members)), *guided]
    conditioning = [row.conditioning for row in members] + [members[number].negative for number in guided]
    # Repeating row 0 pads with numbers the network has seen; uninitialized memory could be NaN and slow.
    padding = next((bucket - len(source) for bucket in buckets if bucket >= len(source)), 0)
    owners = [*source, *[None] * padding]
    unconditional = list(range(len(owners)))
    scales = [1.0] * len(owners)
    for row, number in enumerate(guided, start=len(members)):
        unconditional[number] = row
        scales[number] = members[number].request.guidance_scale
    source += [0] * padding
    conditioning += [conditioning[0]] * padding
    return Layout(
        source=torch.tensor(source, device=device),
        owners=owners,
        conditioning=stack(conditioning, device),
        lengths={name: own for name in conditioning[0] if len(set(own := lengths(name, conditioning))) > 1},
        guided=torch.tensor(guided, dtype=torch.long, device=device),
        guidance=torch.tensor(
            [members[number].request.guidance_scale for number in guided], dtype=torch.float32, device=device
        ).reshape(-1, 1, 1, 1),
        unconditional=torch.tensor(unconditional, device=device),
        scales=torch.tensor(scales, dtype=torch.float32, device=device).reshape(-1, 1, 1, 1),
        loras=_loras(members, owners, device),
        control_images=_control_images(members, owners, device),
    )


def stack(rows: Sequence[Conditioning], device: torch.device) -> Conditioning:
    """Stack the rows' tensors of each name.

    If their first dimensions differ, the shorter ones are padded with zeros, and `{name}_mask`, (R, length) float32, is
    1 where values are not padding. With masked attention, a row then gets the same result as alone.
    """
    stacked = {}
    for name in rows[0]:
        tensors = [row[name].to(device) for row in rows]
        own = lengths(name, rows)
        longest = max(own)
        if min(own) < longest:
            tensors = [
                torch.cat([tensor, tensor.new_zeros((longest - len(tensor), *tensor.shape[1:]))]) for tensor in tensors
            ]
            reach = torch.tensor(own, device=device).unsqueeze(1)
            stacked[f"{name}_mask"] = (torch.arange(longest, device=device) < reach).float()
        stacked[name] = torch.stack(tensors)
    return stacked


def lengths(name: str, rows: Sequence[Conditioning]) -> list[int]:
    """First dimensions of the rows' tensors of one name; 0 for vectors, whose lengths never differ."""
    return [row[name].shape[0] if row[name].dim() > 1 else 0 for row in rows]


def _loras(
    members: Sequence[BatchRow], owners: Sequence[int | None], device: torch.device
) -> list[tuple[str, torch.Tensor]]:
    """Each LoRA that any row uses, with its weight for every row."""
    chosen = [dict(row.request.loras) for row in members]
    names = sorted({name for own in chosen for name in own})
    return [
        (name, torch.tensor([0.0 if o is None else chosen[o].get(name, 0.0) for o in owners], device=device))
        for name in names
    ]


def _control_images(
    members: Sequence[BatchRow], owners: Sequence[int | None], device: torch.device
) -> dict[tuple[str, int], torch.Tensor]:
    keys: dict[tuple[str, int], torch.Tensor] = {}  # with an image of the right shape
    for row in members:
        names = [control.name for control, _ in row.controls]
        for index, (control, image) in enumerate(row.controls):
            keys.setdefault((control.name, names[:index].count(control.name)), image)
    images = {}
    for (name, nth), example in keys.items():
        blank = torch.zeros_like(example)
        found = [None if owner is None else _nth(members[owner], name, nth) for owner in owners]
        images[name, nth] = torch.stack([blank if own is None else own[1] for own in found]).to(device)
    return images


def _nth(row: BatchRow, name: str, nth: int) -> tuple[ControlInput, torch.Tensor] | None:
    own = [pair for pair in row.controls if pair[0].name == name]
    return own[nth] if nth < len(own) else None
