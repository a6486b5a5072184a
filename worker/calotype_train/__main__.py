"""`python -m calotype_train`: train a LoRA, a textual inversion or a ControlNet.

`calotype train` runs exactly this.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calotype_shared.errors import CalotypeError, InvalidRequest
from calotype_shared.options import new_app, parsed, with_options
from calotype_train.options import (
    RECIPES,
    ControlNetOptions,
    LoraOptions,
    TextualInversionOptions,
    TrainOptions,
    checked,
)

if TYPE_CHECKING:
    import typer

    from calotype_train.data import Example
    from calotype_train.loop import Recipe, Training
    from calotype_train.pipeline import BaseModel, Shot

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
_SHOTS = 6  # of a sample sheet without --validation-prompts


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 success, 1 a file cannot be written, 2 invalid usage or data, 130 interrupted."""
    name = "calotype train"
    try:
        options = parse(arguments)
        if options is not None:
            name = f"{name} {options.recipe}"
            train(options)
        return 0
    except CalotypeError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED


def parse(arguments: Sequence[str] | None) -> TrainOptions | None:
    """The options of the selected recipe; None if only help was requested. Raises SettingsError."""
    options = parsed(build_app(), arguments, name="calotype train")
    return options if isinstance(options, TrainOptions) else None


def build_app() -> typer.Typer:
    """A command for each recipe, which returns its options."""
    app = new_app()
    app.callback(help="Train a LoRA, a textual inversion or a ControlNet for a model.")(lambda: None)
    for kind in RECIPES:
        app.command(kind.recipe, help=kind.__doc__)(_command(kind))
    return app


def _command(kind: type[TrainOptions]) -> Callable[..., TrainOptions]:
    @with_options(kind)
    def command(**given: Any) -> TrainOptions:
        return checked(kind, given)

    return command


def train(options: TrainOptions) -> None:
    """Train, save and print the result. Raises what `prepare` raises."""
    training, recipe = prepare(options)
    training.run(checkpoint_every=options.checkpoint_every, sample_every=options.sample_every)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    recipe.save(options.out)
    print(
        f"{options.out}: {training.step} steps in {training.seconds:.0f} s; validation loss "
        f"{training.validation_loss:.4f}, untrained {training.untrained_loss:.4f}"
    )


def prepare(options: TrainOptions) -> tuple[Training, Recipe]:
    """Read the data, load the model and encode the data, ready to start or resume the run.

    Raises:
        InvalidRequest: the data, the model or an option is invalid.
    """
    from calotype_train.data import hold_out, read_examples  # noqa: PLC0415 - torch takes seconds

    examples = read_examples(options.data, conditions=options.recipe == "controlnet")
    prompts = read_prompts(options.validation_prompts)
    _quiet()
    from calotype_train.data import encode  # noqa: PLC0415
    from calotype_train.loop import Training, TrainingSettings  # noqa: PLC0415
    from calotype_train.objective import Weighting  # noqa: PLC0415
    from calotype_train.pipeline import BaseModel  # noqa: PLC0415

    model = BaseModel(options.model, device=options.device)
    recipe = _recipe(model, options, examples)
    learned_from, judged_by = hold_out(examples, share=options.hold_out, most=32)
    training = Training(
        recipe,
        encode(learned_from, model.vae, sizes=model.sizes, device=model.device),
        encode(judged_by, model.vae, sizes=model.sizes, device=model.device),
        TrainingSettings(
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=options.warmup_steps,
            schedule=options.schedule,
            weighting=Weighting(options.weighting),
            snr_gamma=options.snr_gamma,
            caption_dropout=options.caption_dropout,
            weight_decay=options.weight_decay,
            seed=options.seed,
        ),
        work=options.out.with_name(options.out.name + ".training"),
        shots=_shots(model, judged_by, prompts),
        resume=options.resume,
    )
    return training, recipe


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a file, without empty ones; none without a file.

    Raises:
        InvalidRequest: the file does not exist or has no prompts.
    """
    if path is None:
        return []
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
    if not prompts:
        raise InvalidRequest(
            "contains no prompts",
            field="--validation-prompts",
            value=str(path),
            remedy="give a text file with one prompt per line",
        )
    return prompts


def _recipe(model: BaseModel, options: TrainOptions, examples: Sequence[Example]) -> Recipe:
    match options:
        case LoraOptions():
            from calotype_train.lora import LoraRecipe  # noqa: PLC0415

            targets = [target.strip() for target in options.targets.split(",") if target.strip()]
            return LoraRecipe(model, rank=options.rank, alpha=options.alpha, targets=targets, seed=options.seed)
        case TextualInversionOptions():
            from calotype_train.textual_inversion import TextualInversionRecipe, check_captions  # noqa: PLC0415

            check_captions([example.text for example in examples], options.token)
            return TextualInversionRecipe(
                model, token=options.token, initialize_from=options.initialize_from, vectors=options.vectors
            )
        case ControlNetOptions():
            from calotype_train.controlnet import ControlNetRecipe  # noqa: PLC0415

            return ControlNetRecipe(
                model, embedding_channels=options.embedding_channels, light=options.light, seed=options.seed
            )
    raise NotImplementedError(options.recipe)


def _shots(model: BaseModel, judged_by: Sequence[Example], prompts: Sequence[str]) -> list[Shot]:
    """The prompts at the model's first size; without any, the first held-out images' captions and controls."""
    from PIL import Image, ImageOps  # noqa: PLC0415

    from calotype_train.data import nearest_size  # noqa: PLC0415
    from calotype_train.pipeline import Shot  # noqa: PLC0415

    width, height = model.sizes[0]
    if prompts and not judged_by[0].condition:
        return [Shot(prompt=p, seed=seed, width=width, height=height) for seed, p in enumerate(prompts)]
    shots = []
    for seed, example in enumerate(judged_by[:_SHOTS]):
        with Image.open(example.condition or example.image) as image:
            width, height = nearest_size(image.size, model.sizes)
            condition = ImageOps.fit(image.convert("RGB"), (width, height)) if example.condition else None
        shots.append(Shot(prompt=example.text, seed=seed, width=width, height=height, condition=condition))
    return shots


def _quiet() -> None:
    """Silence output of libraries that would disturb the progress bar."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    import transformers  # noqa: PLC0415

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers  # noqa: PLC0415

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
