"""Tables of what the benchmarks measured, between `<!-- results NAME -->` and `<!-- end of results -->` in a page."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.reference.markdown import table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results ([a-z-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

WAYS = {
    "sequential": "plain diffusers, one call per request",
    "static_padded": "plain diffusers, static batches of compatible requests, known in advance, padded to the longest",
    "celery_batches": "celery-batches (grouped Celery tasks): static batches of what arrives together",
    "litserve": "LitServe (a model server): the same",
}


def filled(page: str) -> Callable[[], str]:
    """Makes a page of the repository with its blocks as the results are now."""

    def make() -> str:
        def block(found: re.Match[str]) -> str:
            return f"{found[1]}\n{TABLES[found[2]]().strip()}\n\n{found[3]}"

        return BLOCK.sub(block, (ROOT / page).read_text())

    return make


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def provenance(result: dict[str, Any]) -> str:
    """What was run, and where."""
    hardware = result["hardware"]
    where = hardware.get("gpu") or f"{hardware['cores']} cores of an {hardware['processor']}"
    return f"`{result['command']}` on {where}, {result['date']}, torch {result['versions']['torch']}."


def throughput() -> str:
    result = read("latest")
    requests = int(re.findall(r"--requests (\d+)", result["command"])[0])
    seconds: dict[str, list[float]] = result["seconds"]
    rate = {way: f"{requests / statistics.median(values):.2f}" for way, values in seconds.items()}
    rows = []
    for way, text in WAYS.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds[way], seconds["calotype"], strict=True)]
        middle = f"{result['throughput_ratio'][way]:.2f}× as fast"
        rows.append([text, rate[way], middle, f"{min(ratios):.2f} to {max(ratios):.2f}"])
    rows.append(["**Calotype**, including queue, PNG, S3 and commit", f"**{rate['calotype']}**", "", ""])
    return table([f"{requests} requests submitted at once", "images/s", "Calotype is", "range over rounds"], rows)


def throughput_alone() -> str:
    result = read("latest")
    ratios = result["engine_ratio"]
    return (
        f"The engine alone, in process, is {ratios['sequential']:.2f}, {ratios['static_padded']:.2f}, "
        f"{ratios['celery_batches']:.2f} and {ratios['litserve']:.2f} times as fast as these. " + provenance(result)
    )


def efficiency() -> str:
    result = read("efficiency")
    shares = result["shares"]
    rows = [
        [
            "efficiency: time that the network and the decoder need at the knee, divided by wall time",
            percent(result["efficiency"]),
        ],
        ["steps: network, guidance, sampler, noise", percent(shares["steps"])],
        ["decoding", percent(shares["decode"])],
        ["text", percent(shares["text"])],
        ["idle", percent(shares["idle"])],
        ["mean rows per step (the knee is " + str(result["knee_rows"]) + ")", f"{result['mean_rows']:.1f}"],
        ["rows per second in deterministic mode, relative to normal mode", percent(result["deterministic_ratio"])],
    ]
    return table(["engine under sustained load", "share"], rows) + "\n" + provenance(result)


def latency() -> str:
    result = read("latency")
    rows = []
    for load in result["seconds"]:
        for way, text in (
            ("sequential", "plain diffusers, first in, first out"),
            ("dynamic", "dynamic static batches of up to 8"),
            ("engine", "**Calotype's engine**"),
        ):
            figures = load[way]
            rows.append([f"{load['load_that_came_of_it']:g}", text, f"{figures['mean']:.2f}", f"{figures['p95']:.2f}"])
        rows[-1] += [f"{load['p95_of_engine_over_best_other']:.2f}"]
    rows = [row if len(row) == 5 else [*row, ""] for row in rows]
    head = ["load, relative to sequential capacity", "server", "mean, s", "p95, s", "p95 relative to the best other"]
    return table(head, rows) + "\n" + provenance(result)


def queue_overhead() -> str:
    result = read("queue-overhead")
    room, full = result["redis_commands_with_room"], result["redis_commands_when_full"]
    rows = [
        [text, f"{result[name]['median']:g}", f"{result[name]['p95']:g}"]
        for name, text in (
            ("latency_ms", "one image with 4 steps on an idle system, from `submit` to a signed URL"),
            ("device_ms", "of which on the device"),
            ("bare_celery_ms", "an empty Celery task and its result, on the same Redis"),
            ("added_over_celery_ms", "**added by Calotype's queue**: claim, lease, PNG, S3, commit, URL"),
        )
    ]
    idle = result["redis_commands_a_second_idle"]
    commands = (
        f"Redis commands per job: {room['a_job']:.0f} when the worker has free capacity, {full['a_job']:.0f} when it "
        f"is full (at {full['jobs_a_second']:.1f} jobs per second). An idle worker and client together send {idle:.0f} "
        "commands per second. "
    )
    return table(["milliseconds", "median", "p95"], rows) + "\n" + commands + provenance(result)


def queue_length() -> str:
    result = read("queue-length")
    names = ("submit", "claim", "commit", "status", "depths")
    rows = [
        [
            f"{row['waiting']:,}",
            *(f"{row[name]['median_ms']:.2f}" for name in names),
            f"{row['bytes_a_job']:,}" if row["waiting"] >= 1000 else "",
        ]
        for row in result["table"]
    ]
    return (
        table(["jobs waiting", *names, "bytes per job"], rows) + "\nMedian times in milliseconds. " + provenance(result)
    )


def scale_out() -> str:
    result = read("scale-out")
    rows = [
        [
            f"{row['workers']:g}",
            f"{row['linear']:.1f}",
            f"{row['rate']:.1f}",
            percent(row["share"]),
            percent(row["redis_cpu"]),
        ]
        for row in result["table"]
    ]
    head = [
        "workers",
        "linear scaling, jobs/s",
        "measured, jobs/s",
        "measured / linear",
        "Redis CPU, share of one core",
    ]
    return table(head, rows) + "\n" + provenance(result)


def jitter() -> str:
    result = read("jitter")
    rows = [
        [
            row["beside"],
            f"{row['threads']:g}" if row["threads"] else "",
            f"{row['median_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            f"{row['slowdown']:.2f}×",
            f"{row['done_a_second']:.0f}" if row["threads"] else "",
        ]
        for row in result["table"]
    ]
    head = [
        "work beside the steps",
        "threads",
        "median step, ms",
        "p95, ms",
        "relative to none",
        "operations per second",
    ]
    return table(head, rows) + f"\nEach image: {result['image']}. " + provenance(result)


def growth() -> str:
    result = read("growth")
    rows = {int(jobs): (worker, redis) for jobs, worker, redis in result["table"]}
    last = max(rows)
    wanted = sorted({min(rows), last // 2, last * 7 // 10, last} & rows.keys())
    return (
        table(
            ["jobs finished", "worker, MiB resident", "Redis, MiB"],
            [[f"{jobs:,}", f"{rows[jobs][0]:,.0f}", f"{rows[jobs][1]:.1f}"] for jobs in wanted],
        )
        + "\n"
        + provenance(result)
    )


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}"


TABLES: dict[str, Callable[[], str]] = {
    "throughput": throughput,
    "throughput-alone": throughput_alone,
    "efficiency": efficiency,
    "latency": latency,
    "queue-overhead": queue_overhead,
    "queue-length": queue_length,
    "scale-out": scale_out,
    "jitter": jitter,
    "growth": growth,
}
