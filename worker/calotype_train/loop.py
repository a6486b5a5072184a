"""The training loop that all recipes share: batches, optimizer, validation, checkpoints, sample sheets, log.

All randomness of step i comes from a generator seeded by (seed, i), so a run that resumes from a checkpoint takes the
same steps as without the interruption.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from calotype_shared.errors import InvalidRequest
from calotype_train.checkpoint import load_checkpoint, save_checkpoint
from calotype_train.data import Batch, Images
from calotype_train.objective import Objective, Weighting
from calotype_train.pipeline import BaseModel, Shot
from calotype_train.sheet import comparison

_VALIDATION_TIMESTEPS = 8  # evenly spaced; every held-out image is judged at each
_LOG_EVERY = 25  # steps
_GRADIENT_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The options that determine a run's results, besides the recipe's own."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    schedule: str  # constant or cosine, after the warm-up
    weighting: Weighting
    snr_gamma: float
    caption_dropout: float  # share of rows trained with an empty caption, for classifier-free guidance
    weight_decay: float
    seed: int


class Recipe(Protocol):
    """What is trained, and how it contributes to a prediction."""

    name: str
    model: BaseModel
    parameters: Mapping[str, torch.nn.Parameter]  # what the optimizer changes, by the names in a checkpoint

    @property
    def facts(self) -> Mapping[str, Any]:
        """The recipe's own options, JSON-ready: a run can only go on under the same."""

    def predict(self, batch: Batch, noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The U-Net's prediction, like `noised` (B, C, h, w)."""

    def images(self, shots: Sequence[Shot], *, trained: bool) -> list[Image.Image]:
        """Sample images, with the trained addition or without."""

    def save(self, path: Path) -> None:
        """Write the trained addition in the format that plain diffusers loads."""


class Training:
    """One run. Mutable; owned by the thread that calls `run`."""

    def __init__(
        self,
        recipe: Recipe,
        images: Images,
        held_out: Images,
        settings: TrainingSettings,
        *,
        work: Path,
        shots: Sequence[Shot],
        resume: bool = False,
    ) -> None:
        """`work` is the run's folder, `shots` are the sample images to generate.

        Raises:
            InvalidRequest: `work` contains a run and `resume` was not given, or a run with other settings.
        """
        self.step = 0
        self.seconds = 0.0  # time of steps, over all parts of the run
        self.untrained_loss = math.nan
        self.validation_loss = math.nan
        self._recipe = recipe
        self._images = images
        self._held_out = held_out
        self._settings = settings
        self._work = work
        self._shots = shots
        self._before: list[Image.Image] | None = None
        self._device = recipe.model.device
        self._objective = Objective(
            recipe.model.pipeline.scheduler, weighting=settings.weighting, gamma=settings.snr_gamma
        )
        self._optimizer = torch.optim.AdamW(
            [*recipe.parameters.values()],
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
        )
        if resume:
            self._resume()
        elif work.exists() and any(work.iterdir()):
            raise InvalidRequest(
                "contains checkpoints of an earlier run",
                field="--out",
                value=str(work),
                remedy="continue it with --resume, give another --out, or remove the folder",
            )
        work.mkdir(parents=True, exist_ok=True)

    def run(self, *, checkpoint_every: int = 0, sample_every: int = 0, stop_after: int | None = None) -> None:
        """Train to the last step (or only to `stop_after`), then save and judge. 0 means: only at the end."""
        last = min(self._settings.steps, stop_after or self._settings.steps)
        if self.step == 0:
            self.untrained_loss = self.validate()
            self._log(step=0, validation_loss=self.untrained_loss)
        losses: list[float] = []
        with _progress() as progress:
            task = progress.add_task(self._recipe.name, total=self._settings.steps, completed=self.step, note="")
            while self.step < last:
                began = time.monotonic()
                losses.append(self.train_step())
                self.seconds += time.monotonic() - began
                recent = sum(losses[-_LOG_EVERY:]) / len(losses[-_LOG_EVERY:])
                note = f"loss {recent:.4f}  {self.step / self.seconds:.2f} steps/s"
                progress.update(task, advance=1, note=note)
                if self.step % _LOG_EVERY == 0:
                    self._log(step=self.step, loss=recent, learning_rate=self._rate(self.step - 1))
                if checkpoint_every and self.step % checkpoint_every == 0 and self.step < last:
                    self._checkpoint()
                    progress.print(f"step {self.step}: {note}; {self._verdict()}")
                if sample_every and self.step % sample_every == 0 and self.step < last:
                    self.sample_sheet()
        self._checkpoint()
        self.sample_sheet()

    def train_step(self) -> float:
        """One optimizer step; returns the batch's weighted loss before it."""
        settings, objective = self._settings, self._objective
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step)
        batch = _with_dropped_captions(
            self._images.draw(settings.batch_size, generator), settings.caption_dropout, generator
        )
        # One timestep from each of B equal parts of the schedule: uniform, with less variance than B draws.
        parts = torch.randperm(len(batch), generator=generator) + torch.rand(len(batch), generator=generator)
        timesteps = (parts / len(batch) * objective.timesteps).long().clamp(max=objective.timesteps - 1)
        noise = torch.randn(batch.latents.shape, generator=generator)
        errors = self._errors(batch, noise, timesteps)
        loss = (errors * objective.weights(timesteps.to(self._device))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*self._recipe.parameters.values()], _GRADIENT_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def validate(self) -> float:
        """Mean squared error on the held-out images, at fixed timesteps and noise: comparable between any runs."""
        generator = torch.Generator().manual_seed(0)
        total, count = 0.0, 0
        for bucket in self._held_out.buckets:
            for number in range(_VALIDATION_TIMESTEPS):
                timestep = int((number + 0.5) / _VALIDATION_TIMESTEPS * self._objective.timesteps)
                for begin in range(0, len(bucket), self._settings.batch_size):
                    batch = bucket.batch(range(begin, min(begin + self._settings.batch_size, len(bucket))))
                    noise = torch.randn(batch.latents.shape, generator=generator)
                    errors = self._errors(batch, noise, torch.full((len(batch),), timestep))
                    total, count = total + errors.sum().item(), count + len(batch)
        return total / count

    def sample_sheet(self) -> None:
        """`samples-N.png` in the work folder: each shot without and with the trained addition, from the same seed."""
        if not self._shots:
            return
        if self._before is None:
            self._before = self._recipe.images(self._shots, trained=False)
        rows = {"before": self._before, "after": self._recipe.images(self._shots, trained=True)}
        conditions = [shot.condition for shot in self._shots if shot.condition is not None]
        page = comparison({"control": conditions} | rows if conditions else rows, [s.prompt for s in self._shots])
        page.save(self._work / f"samples-{self.step:06d}.png")

    def _errors(self, batch: Batch, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) mean squared errors of a batch's prediction."""
        latents, noise, timesteps = (part.to(self._device) for part in (batch.latents, noise, timesteps))
        noised = self._objective.noised(latents, noise, timesteps)
        # bfloat16 on GPUs; on CPU cores float32 was measured to be faster (decision note 0004).
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._device.type == "cuda"):
            predicted = self._recipe.predict(batch, noised, timesteps)
        target = self._objective.target(latents, noise, timesteps)
        return (predicted.float() - target).square().mean(dim=(1, 2, 3))

    def _rate(self, step: int) -> float:
        settings = self._settings
        rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
        if settings.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        return rate

    def _facts(self) -> dict[str, Any]:
        """What must be equal to resume a run. A constant rate does not depend on the number of steps."""
        settings = asdict(self._settings)
        if self._settings.schedule == "constant":
            del settings["steps"]
        return {
            "recipe": self._recipe.name,
            "model": Path(self._recipe.model.name).name,
            "images": len(self._images),
            "captions": hashlib.sha256("\n".join(self._images.captions).encode()).hexdigest()[:16],
            **settings,
            **self._recipe.facts,
        }

    def _checkpoint(self) -> None:
        self.validation_loss = self.validate()
        self._log(step=self.step, validation_loss=self.validation_loss, untrained_loss=self.untrained_loss)
        tensors = {f"weight/{name}": parameter for name, parameter in self._recipe.parameters.items()}
        for name, parameter in self._recipe.parameters.items():
            moments = self._optimizer.state[parameter]
            tensors |= {f"{moment}/{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq")}
        progress = {
            "seconds": round(self.seconds, 1),
            "untrained_loss": self.untrained_loss,
            "validation_loss": self.validation_loss,
        }
        save_checkpoint(self._work, self.step, tensors, {**progress, "settings": self._facts()})

    def _resume(self) -> None:
        found = load_checkpoint(self._work)
        if found is None:
            return
        tensors, facts = found
        mine = json.loads(json.dumps(self._facts()))
        for name, value in mine.items():
            if facts["settings"].get(name) != value:
                raise InvalidRequest(
                    f"the run in {self._work.name} was started with {facts['settings'].get(name)!r}",
                    field=name,
                    value=value,
                    remedy="resume with the same options, or start a new run with another --out",
                )
        with torch.no_grad():
            for name, parameter in self._recipe.parameters.items():
                parameter.copy_(tensors[f"weight/{name}"])
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(facts["step"])),
                    "exp_avg": tensors[f"exp_avg/{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(parameter.device),
                }
        self.step, self.seconds = facts["step"], facts["seconds"]
        self.untrained_loss, self.validation_loss = facts["untrained_loss"], facts["validation_loss"]

    def _verdict(self) -> str:
        return f"validation loss {self.validation_loss:.4f}, untrained {self.untrained_loss:.4f}"

    def _log(self, **values: float) -> None:
        line = {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
        with (self._work / "log.jsonl").open("a") as file:
            file.write(json.dumps({**line, "seconds": round(self.seconds, 1)}) + "\n")


def _with_dropped_captions(batch: Batch, share: float, generator: torch.Generator) -> Batch:
    dropped = (torch.rand(len(batch), generator=generator) < share).tolist()
    captions = tuple("" if drop else text for text, drop in zip(batch.captions, dropped, strict=True))
    return Batch(latents=batch.latents, captions=captions, conditions=batch.conditions)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )
