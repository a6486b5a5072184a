"""`python -m calotype_train`: teach a model a style, a word or a kind of control. `calotype train` runs
exactly this."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from calotype_shared.errors import CalotypeError, InvalidRequest

if TYPE_CHECKING:
    from calotype_train.data import Example
    from calotype_train.loop import Recipe, Training
    from calotype_train.pipeline import BaseModel, Shot

N = TypeVar("N", int, float)

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
_SHOTS = 6  # of a sample sheet without --validation-prompts


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 a file cannot be written, 2 bad usage or data, 130 interrupted."""
    options = build_parser().parse_args(arguments)
    try:
        train(options)
        return 0
    except CalotypeError as error:
        print(f"calotype train {options.recipe}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"calotype train {options.recipe}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calotype train", description="Train an addition to a model.")
    recipes = parser.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    lora = recipes.add_parser("lora", help="a style or a subject, as a small file")
    _common(lora, out="FILE.safetensors", rate=1e-3, batch=8, steps=1000, dropout=0.1)
    lora.add_argument("--rank", type=_positive, default=8)
    lora.add_argument("--alpha", type=_above_zero, help="scale times rank (default: the rank)")
    lora.add_argument(
        "--targets", default="to_q,to_k,to_v,to_out.0", help="endings of the layers' names (default: %(default)s)"
    )
    word = recipes.add_parser("textual-inversion", help="a new word")
    _common(word, out="FILE.safetensors", rate=5e-3, batch=4, steps=1000, dropout=0.0)
    word.add_argument("--token", required=True, help='the new word as captions write it, such as "<my-thing>"')
    word.add_argument("--initialize-from", required=True, metavar="WORD", help="a known word to start from")
    word.add_argument("--vectors", type=_positive, default=1, help="tokens that the word stands for")
    control = recipes.add_parser("controlnet", help="control by an image, such as an outline")
    _common(control, out="FOLDER", rate=1e-4, batch=4, steps=5000, dropout=0.1)
    control.add_argument(
        "--embedding-channels", type=_numbers, default=(16, 32, 96, 256), help="widths, one a halving and one more"
    )
    control.add_argument("--light", action="store_true", help="without attention: much smaller, hears no words")
    return parser


def _common(parser: argparse.ArgumentParser, *, out: str, rate: float, batch: int, steps: int, dropout: float) -> None:
    add = parser.add_argument
    add("--model", default="demo", help="demo, or the folder of a Stable Diffusion pipeline (default: %(default)s)")
    add("--data", type=Path, required=True, metavar="FOLDER", help="images and their metadata.jsonl")
    add("--out", type=Path, required=True, metavar=out, help="what to write; checkpoints go to OUT.training beside it")
    add("--steps", type=_positive, default=steps, help="(default: %(default)s)")
    add("--batch-size", type=_positive, default=batch, help="(default: %(default)s)")
    add("--learning-rate", type=_above_zero, default=rate, help="(default: %(default)s)")
    add("--warmup-steps", type=_count, default=50, help="(default: %(default)s)")
    add("--schedule", choices=["constant", "cosine"], default="cosine", help="of the rate (default: %(default)s)")
    add("--weighting", choices=["uniform", "min-snr", "noisy"], default="uniform", help="of the timesteps' errors")
    add("--snr-gamma", type=_above_zero, default=5.0, help="for min-snr (default: %(default)s)")
    add("--caption-dropout", type=_share, default=dropout, help="share of empty captions (default: %(default)s)")
    add("--weight-decay", type=float, default=1e-2 if dropout else 0.0, help="(default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--hold-out", type=_share, default=0.1, help="share of the images to judge by, 32 at most")
    add("--validation-prompts", type=Path, metavar="FILE", help="a prompt a line for the sample sheets")
    add("--checkpoint-every", type=_count, default=200, help="steps; 0: only at the end (default: %(default)s)")
    add("--sample-every", type=_count, default=500, help="steps; 0: only at the end (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--device", default="cpu", help="cpu or cuda:N (default: %(default)s)")


def train(options: argparse.Namespace) -> None:
    """Train, save, say how it went. Raises what `prepare` raises."""
    training, recipe = prepare(options)
    training.run(checkpoint_every=options.checkpoint_every, sample_every=options.sample_every)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    recipe.save(options.out)
    print(
        f"{options.out}: {training.step} steps in {training.seconds:.0f} s; validation loss "
        f"{training.validation_loss:.4f}, untrained {training.untrained_loss:.4f}"
    )


def prepare(options: argparse.Namespace) -> tuple[Training, Recipe]:
    """Read the data, load the model, encode; the run is ready to start or to go on.

    Raises:
        InvalidRequest: what is wrong with the data, the model or an option.
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
    recipe = RECIPES[options.recipe](model, options, examples)
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
    """
    Raises:
        InvalidRequest: no such file, or nothing in it.
    """
    if path is None:
        return []
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
    if not prompts:
        raise InvalidRequest(
            "no prompts there",
            field="--validation-prompts",
            value=str(path),
            remedy="give a text file, a prompt a line",
        )
    return prompts


def _lora(model: BaseModel, options: argparse.Namespace, _: Sequence[Example]) -> Recipe:
    from calotype_train.lora import LoraRecipe  # noqa: PLC0415

    targets = [target.strip() for target in options.targets.split(",") if target.strip()]
    return LoraRecipe(model, rank=options.rank, alpha=options.alpha, targets=targets, seed=options.seed)


def _textual_inversion(model: BaseModel, options: argparse.Namespace, examples: Sequence[Example]) -> Recipe:
    from calotype_train.textual_inversion import TextualInversionRecipe, check_captions  # noqa: PLC0415

    check_captions([example.text for example in examples], options.token)
    return TextualInversionRecipe(
        model, token=options.token, initialize_from=options.initialize_from, vectors=options.vectors
    )


def _controlnet(model: BaseModel, options: argparse.Namespace, _: Sequence[Example]) -> Recipe:
    from calotype_train.controlnet import ControlNetRecipe  # noqa: PLC0415

    return ControlNetRecipe(
        model, embedding_channels=options.embedding_channels, light=options.light, seed=options.seed
    )


RECIPES: dict[str, Callable[[BaseModel, argparse.Namespace, Sequence[Example]], Recipe]] = {
    "lora": _lora,
    "textual-inversion": _textual_inversion,
    "controlnet": _controlnet,
}


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
    """What the libraries would print over the progress bar."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    import transformers  # noqa: PLC0415

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers  # noqa: PLC0415

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


def _positive(text: str) -> int:
    return _checked(int(text), text, int(text) > 0, "a number above 0")


def _count(text: str) -> int:
    return _checked(int(text), text, int(text) >= 0, "0 or more")


def _above_zero(text: str) -> float:
    return _checked(float(text), text, 0 < float(text) < float("inf"), "a number above 0")


def _share(text: str) -> float:
    return _checked(float(text), text, 0 <= float(text) <= 1, "a share from 0 to 1")


def _checked(value: N, text: str, right: bool, wanted: str) -> N:
    if not right:
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
