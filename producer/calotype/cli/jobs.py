"""The commands about jobs: submit, status, cancel, jobs, models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from calotype.cli.exit_codes import ExitCode
from calotype.cli.output import clock_time, print_json, print_table, record_json, record_line, report, say
from calotype.client import Client
from calotype.fields import JobFields
from calotype.jobs import require_success
from calotype_shared.errors import InvalidRequest, JobNotFound
from calotype_shared.schema.enums import JobState, Lane, OutputFormat, SamplerType
from calotype_shared.schema.presets import QUALITY_PRESETS

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, including errors.")]
JobId = Annotated[str, typer.Argument(metavar="ID")]


_FIELDS = tuple(name for name in JobFields.__annotations__ if name != "prompt")


def _client() -> Client:
    return Client(on_warning=lambda text: say(f"warning: {text}"))


def _pair(entry: str, name: str, number: str) -> dict[str, Any]:
    """NAME or NAME:NUMBER as a part of a config."""
    written, colon, value = entry.rpartition(":")
    return {name: written, number: value} if colon else {name: value}


def _parameter(entry: str) -> tuple[str, Any]:
    """Parses NAME=JSON; a value that is not JSON is text."""
    name, equals, value = entry.partition("=")
    if not equals:
        raise InvalidRequest("has no value", field="--parameter", value=entry, remedy="write NAME=JSON")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _control(entry: str) -> dict[str, Any]:
    """NAME:FILE or NAME:FILE:SCALE."""
    name, _, rest = entry.partition(":")
    file, _, scale = rest.rpartition(":")
    if file and scale.replace(".", "", 1).isdigit():
        return {"name": name, "image": Path(file), "scale": scale}
    if not rest:
        raise InvalidRequest("does not name an image", field="--control", value=entry, remedy="write NAME:FILE")
    return {"name": name, "image": Path(rest)}


def submit(  # noqa: PLR0917 - the command's options; Typer passes them by name
    prompt: Annotated[str, typer.Argument(help="Text that describes the image.")],
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "--negative", help="Text that describes what to avoid.")
    ] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option("--num-inference-steps", "--steps", help="Number of denoising steps [50].")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", "--guidance", help="Guidance scale; 1 or less turns guidance off [7.5]."),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help=f"Sampler: {', '.join(SamplerType)} [ddim].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first image; random if not given.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels [the model's native width].")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels [the model's native height].")] = None,
    model: Annotated[str | None, typer.Option(help="Model, as listed by `calotype models` [demo].")] = None,
    quality: Annotated[
        str | None, typer.Option(help=f"Preset for steps and guidance: {', '.join(QUALITY_PRESETS)}.")
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="Number of images, with consecutive seeds [1].")] = None,
    output_format: Annotated[
        str | None, typer.Option("--output-format", "--format", help=f"File format: {', '.join(OutputFormat)} [png].")
    ] = None,
    init_image: Annotated[Path | None, typer.Option(help="Image to start from.", dir_okay=False)] = None,
    mask_image: Annotated[
        Path | None,
        typer.Option("--mask-image", "--mask", help="Mask image: white is repainted, black is kept.", dir_okay=False),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much init_image changes: 0 keeps it, 1 ignores it [0.75; 1 with mask].")
    ] = None,
    loras: Annotated[
        list[str] | None, typer.Option("--loras", "--lora", help="LoRA as NAME or NAME:WEIGHT; may be repeated.")
    ] = None,
    controls: Annotated[
        list[str] | None,
        typer.Option(
            "--controls",
            "--control",
            help="ControlNet and its image as NAME:FILE or NAME:FILE:SCALE; may be repeated.",
        ),
    ] = None,
    refiner: Annotated[
        str | None,
        typer.Option(
            help="Refiner model as NAME or NAME:START, with the share of steps after which it takes over [0.8]."
        ),
    ] = None,
    ensemble: Annotated[
        list[str] | None,
        typer.Option("--ensemble", "--also", help="Additional model that makes the same images; may be repeated."),
    ] = None,
    preview_every: Annotated[int | None, typer.Option(help="Number of steps between previews.")] = None,
    num_frames: Annotated[
        int | None, typer.Option("--num-frames", "--frames", help="Number of frames of a video.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of a video.")] = None,
    audio_seconds: Annotated[float | None, typer.Option(help="Length of the audio in seconds.")] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--images", "--image", help="Reference image for an edit; may be repeated.", dir_okay=False),
    ] = None,
    control_image: Annotated[
        Path | None, typer.Option(help="Control image, for models that take one.", dir_okay=False)
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "--parameters",
            "--parameter",
            help="NAME=JSON, a parameter of the model's pipeline as listed by `calotype models`; may be repeated.",
        ),
    ] = None,
    lane: Annotated[Lane, typer.Option(help="Priority; interactive jobs go first.")] = Lane.INTERACTIVE,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job ends.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Maximum number of seconds to wait.", min=0)] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", file_okay=False, help="Folder to save the images in; implies --wait."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Queue a job and print its id."""
    options = dict(locals())  # those of a config are named as its fields
    fields: JobFields = {name: options[name] for name in _FIELDS if options[name] not in (None, [])}  # type: ignore[assignment]
    if loras:
        fields["loras"] = [_pair(entry, "name", "weight") for entry in loras]
    if controls:
        fields["controls"] = [_control(entry) for entry in controls]
    if refiner:
        fields["refiner"] = _pair(refiner, "model", "start")
    if parameters:
        fields["parameters"] = dict(map(_parameter, parameters))
    with _client() as client:
        job = client.submit(prompt, lane=lane, **fields)
        if not (wait or output):
            print_json(record_json(job.status())) if as_json else print(job.id)
            return
        if not as_json:
            say(f"job {job.id}")
        try:
            _follow_with_bar(client, job.id, timeout)
        except KeyboardInterrupt:
            say(f"job {job.id} continues; see calotype status {job.id}, or stop it with calotype cancel {job.id}")
            raise
        record = job.status()
        require_success(record)
        files = []
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            files = [str(image.save(output)) for image in job.images()]
        urls = job.urls()
        if as_json:
            print_json({**record_json(record), "files": files, "urls": urls})
        else:
            print("\n".join(files or urls))


def status(
    job_id: JobId,
    watch: Annotated[bool, typer.Option("--watch", help="Print each change until the job ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a job. With --watch the exit status says how it ended."""
    with _client() as client:
        if not watch:
            record = client.status(job_id)
            print_json(record_json(record)) if as_json else print(record_line(record))
            return
        for record in client.follow(job_id):
            print_json(record_json(record)) if as_json else print(record_line(record), flush=True)
        require_success(record)


def cancel(
    job_ids: Annotated[list[str], typer.Argument(metavar="ID…", help="Jobs to cancel.")], as_json: AsJson = False
) -> None:
    """Cancel queued or running jobs immediately. A finished job stays as it is."""
    missing = False
    with _client() as client:
        for job_id in job_ids:
            try:
                state = client.cancel(job_id)
            except JobNotFound as error:  # the others are still cancelled
                report(error.code, str(error), as_json=as_json)
                missing = True
                continue
            if as_json:
                print_json({"id": job_id, "state": state.value})
            else:
                print(f"{job_id}  {'' if state is JobState.CANCELLED else 'was already '}{state.value}")
    if missing:
        raise typer.Exit(ExitCode.NOT_FOUND)


def jobs(
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(help="Maximum number of jobs.", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with _client() as client:
        records = client.jobs(state=state, limit=limit)
        counts = client.counts()
    if as_json:
        for record in records:
            print_json(record_json(record))
        return
    print_table(
        ("ID", "STATE", "DONE", "MODEL", "SUBMITTED", "PROMPT"),
        (
            (r.id, r.state.value, f"{r.progress:.0%}", r.config.model, clock_time(r.created_at), r.config.prompt[:60])
            for r in records
        ),
    )
    say(", ".join(f"{count} {of.value}" for of, count in counts.items()))


def models(
    as_json: AsJson = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", help="Also which network calls of pipeline models are merged, and why others are not."
        ),
    ] = False,
) -> None:
    """List the models that workers have announced, with the number of live workers for each."""
    with _client() as client:
        cards = client.models()
        workers = client.workers()
    serving = {name: sum(name in worker.models for worker in workers) for name in cards}
    if as_json:
        print_json([{**card.model_dump(mode="json"), "workers": serving[name]} for name, card in cards.items()])
        return
    if not cards:
        say("no worker has announced a model yet; start one with: calotype worker --model demo")
        return
    print_table(
        ("MODEL", "FAMILY", "SIZES", "WORKERS", "DESCRIPTION"),
        (
            (name, card.family, ", ".join(f"{w}x{h}" for w, h in card.native_sizes), serving[name], card.description)
            for name, card in cards.items()
        ),
    )
    networks = [(name, network) for name, card in cards.items() for network in card.networks]
    if verbose and networks:
        print()
        print_table(
            ("MODEL", "NETWORK", "CALLS", "REASON"),
            ((name, n.network, "merged" if n.merged else "alone", n.reason) for name, n in networks),
        )


def _follow_with_bar(client: Client, job_id: str, timeout: float | None) -> None:
    """Wait for a job with a progress bar on standard error, which shows only in a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(JobState.QUEUED.value, total=1.0)
        for record in client.follow(job_id, timeout=timeout):
            progress.update(bar, completed=record.progress, description=record.state.value)
