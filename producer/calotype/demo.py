"""`calotype demo`: starts all services, makes the example images and a contact sheet, and stops all services."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from calotype.client import Client
from calotype.contact_sheet import Print, contact_sheet
from calotype.embedded import EmbeddedServers, LocalWorkers
from calotype.job_image import JobImage
from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.schema.enums import JobState
from calotype_shared.schema.jobs import JobRecord
from calotype_shared.schema.worker_info import WorkerInfo

_READY_SECONDS = 300.0
_ALL_JOBS_SECONDS = 1800.0
_REPORT_SECONDS = 15.0  # workers report every few seconds
_PLAIN_SECONDS = 5.0  # between progress lines without a terminal
_ENGINE_PHASES = ("prepare", "wait", "encode", "denoise", "decode")
_OUTPUT_PHASES = ("encode_image", "upload")


def run_demo(
    *, prompts: Path | None, out: Path, model: str, devices: Sequence[str], console: Console | None = None
) -> int:
    """Run it; returns how many jobs did not succeed.

    Raises:
        InvalidRequest: a line of `prompts` is invalid. ServiceUnavailable: a server or worker did not start.
    """
    console = console or Console()
    configs = read_prompts(prompts, model.partition("=")[0])
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="calotype-demo-")))
        began = time.monotonic()
        console.print(f"Starting Valkey, SeaweedFS and {len(devices)} worker(s) on {', '.join(devices)} …")
        servers = stack.enter_context(EmbeddedServers.start(folder / "servers"))
        workers = stack.enter_context(
            LocalWorkers(
                model=model,
                devices=devices,
                environment=servers.environment,
                log_dir=folder / "logs",
                say=console.print,
            )
        )
        client = stack.enter_context(Client(settings=servers.settings()))
        workers.await_ready(client.workers, _READY_SECONDS)
        console.print(f"Ready after {time.monotonic() - began:.1f} s. Submitting {len(configs)} jobs.")
        began = time.monotonic()
        ids = [job.id for job in client.submit_many(configs)]
        submit_seconds = time.monotonic() - began
        records, images = follow(client, ids, workers, console)
        reports = final_reports(client, sum(len(record.images) for record in records))
        console.print("Stopping the worker and the servers …")
    save(records, images, out)
    console.print(summary(records, reports, submit_seconds))
    failed = [record for record in records if record.state is not JobState.SUCCEEDED]
    for record in failed:
        console.print(f"job {record.id} {record.state.value}: {record.error.message if record.error else ''}")
    if images:
        console.print(f"Images in {out}/, all of them on {out / 'contact-sheet.png'}")
    return len(failed)


def read_prompts(path: Path | None, model: str) -> list[GenerationConfig]:
    """Configs from JSON lines; by default the bundled examples. `model` is used where a line has none.

    Raises:
        InvalidRequest: names the line.
    """
    text = path.read_text() if path else (resources.files("calotype") / "assets" / "prompts.jsonl").read_text()
    configs = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path or 'the example prompts'}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidRequest(
                str(error), field=where, value=line, remedy="write one JSON object per line"
            ) from error
        if not isinstance(fields, Mapping):
            raise InvalidRequest(
                "is not a JSON object", field=where, value=line, remedy="write one JSON object per line"
            )
        try:
            configs.append(GenerationConfig.parse({"model": model, **fields}))
        except InvalidRequest as error:
            field = f"{where}: {error.field}"
            raise InvalidRequest(error.problem, field=field, value=error.value, remedy=error.remedy) from error
    if not configs:
        raise InvalidRequest(
            "has no prompts", field="prompts", value=str(path), remedy="write one JSON object per line"
        )
    return configs


def follow(
    client: Client, ids: Sequence[str], workers: LocalWorkers, console: Console
) -> tuple[list[JobRecord], dict[str, list[JobImage]]]:
    """Show progress until all jobs are final; images are downloaded as they appear."""
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    final: dict[str, JobRecord] = {}
    downloads: dict[str, Future[list[JobImage]]] = {}
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(4) as pool,
    ):
        whole = progress.add_task("jobs", total=len(ids), rate="")
        bars: dict[str, TaskID] = {}
        began = printed_at = time.monotonic()
        image_count = 0
        waiting = client.waiter.begin(ids, timeout=_ALL_JOBS_SECONDS)
        while not waiting.done:
            for record in client.waiter.look(waiting):
                if record.id not in bars:
                    bars[record.id] = progress.add_task(_label(record.config), total=None, visible=False, rate="")
                running = record.state is JobState.RUNNING
                progress.update(
                    bars[record.id], completed=record.step, total=record.total_steps or None, visible=running
                )
                if record.state.final:
                    final[record.id] = record
                    image_count += len(record.images)
                    if record.state is JobState.SUCCEEDED:
                        downloads[record.id] = pool.submit(client.images, record.id)
                    rate = f"{image_count / (time.monotonic() - began):.2f} images/s"
                    progress.update(whole, completed=len(final), rate=rate)
            workers.watch()
            if not console.is_terminal and (waiting.done or time.monotonic() - printed_at >= _PLAIN_SECONDS):
                printed_at = time.monotonic()
                console.print(f"{len(final)}/{len(ids)} jobs done, {image_count / (printed_at - began):.2f} images/s")
            if not waiting.done:
                time.sleep(client.waiter.pause(waiting))
        downloaded = {job_id: download.result() for job_id, download in downloads.items()}
    return [final[job_id] for job_id in ids], downloaded


def final_reports(client: Client, images: int) -> list[WorkerInfo]:
    """The workers' reports, once they include every image."""
    deadline = time.monotonic() + _REPORT_SECONDS
    while True:
        reports = client.workers()
        if sum(report.images for report in reports) >= images or time.monotonic() > deadline:
            return reports
        time.sleep(0.1)


def save(records: Sequence[JobRecord], downloaded: Mapping[str, Sequence[JobImage]], out: Path) -> None:
    """Each image under a name that sorts as submitted, and the contact sheet."""
    prints = []
    for number, record in enumerate(records, start=1):
        for image in downloaded.get(record.id, ()):
            extension = record.config.output_format.value
            image.save(out / f"{number:02}-{image.index}.{extension}")
            config = record.config
            guidance = f"guidance {config.guidance_scale:g}" if config.guided else "no guidance"
            details = (
                f"{config.sampler.value}, {config.num_inference_steps} steps",
                f"{guidance}, seed {image.ref.seed}",
            )
            prints.append(Print(image=image.image, title=config.prompt, details=details))
    if prints:
        contact_sheet(prints).save(out / "contact-sheet.png")


def summary(records: Sequence[JobRecord], reports: Sequence[WorkerInfo], submit_seconds: float) -> Table:
    """The measurements of the run."""
    done = [record for record in records if record.state is JobState.SUCCEEDED]
    table = Table(title="Demo", show_header=False)
    table.add_row("images", f"{sum(len(record.images) for record in done)} from {len(done)} of {len(records)} jobs")
    times = [(record.created_at, record.started_at, record.finished_at, record.timings) for record in done]
    whole = [(made, begun, ended, timings) for made, begun, ended, timings in times if begun and ended]
    if not whole:
        return table
    seconds = max(ended for _, _, ended, _ in whole) - min(made for made, *_ in whole)
    table.add_row("rate", f"{sum(len(record.images) for record in done) / seconds:.2f} images/s over {seconds:.1f} s")
    passes = sum(report.forward_passes for report in reports)
    if passes:
        mean_rows = sum(report.rows for report in reports) / passes
        table.add_row("step batch", f"{mean_rows:.1f} rows a step on average, {passes} forward passes")
    latencies = sorted(ended - made for made, _, ended, _ in whole)
    table.add_row(
        "latency, submit to done", f"p50 {_quantile(latencies, 50):.1f} s, p95 {_quantile(latencies, 95):.1f} s"
    )
    output = [sum(timings.get(phase, 0.0) for phase in _OUTPUT_PHASES) for *_, timings in whole]
    queue = [
        max(0.0, ended - begun - sum(timings.get(phase, 0.0) for phase in (*_ENGINE_PHASES, *_OUTPUT_PHASES)))
        for _, begun, ended, timings in whole
    ]
    table.add_row("PNG and upload", f"{1000 * statistics.median(output):.0f} ms a job (p50), beside the engine")
    table.add_row(
        "queue overhead",
        f"{1000 * submit_seconds / len(records):.1f} ms a job to submit, {1000 * statistics.median(queue):.1f} ms "
        "from claim to commit (p50)",
    )
    return table


def _quantile(ordered: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile of values in ascending order."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def _label(config: GenerationConfig) -> str:
    label = f"{config.sampler.value} {config.num_inference_steps}: {config.prompt}"
    return label if len(label) <= 44 else f"{label[:43]}…"
