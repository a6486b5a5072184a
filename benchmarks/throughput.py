"""Images a second, of everything a user could take instead, on one model, one device and one list of requests.

    python benchmarks/throughput.py [--model NAME=SOURCE] [--device cpu] [--requests 48] [--rounds 3]

- sequential: one plain diffusers pipeline call a request;
- static_padded: everything known beforehand, in the best static batches there are, each padded to its longest request;
- litserve, celery_batches: servers that collect requests for a moment and run them as such batches, all asked at once
  (`baselines.py`);
- engine: all submitted to the engine in this process, batched at every step;
- calotype: all submitted to Redis, made by a worker process, encoded as PNG, stored in S3 and committed.

The last two have met every sampler and number of steps before, as a worker has that has run for a while: it reads a
sampler's table off diffusers once, which takes 20 to 200 ms.

`throughput_ratio` in the results is calotype's rate over each of the others', though none of these stores anything.
Rounds are interleaved, so that a busy moment of the machine hits all; ratios are medians of the rounds' ratios.
`efficiency` is the network's own time for the rows that were needed, at the knee's time a row, over the wall time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import baselines
import torch
from workload import BATCH, KINDS, PlainElsewhere, Wanted, quiet, surroundings, workload

from calotype import Client
from calotype.embedded import EmbeddedServers, LocalWorkers
from calotype.embedded.ports import free_ports
from calotype.embedded.process import ChildProcess
from calotype_shared.schema.enums import SamplerType
from calotype_worker.engine import Engine, EngineSettings, GenerationRequest
from calotype_worker.models import StepModel, load_model
from calotype_worker.models.base import Rows, Text
from calotype_worker.threads import apart

OURS = ("engine", "calotype")

Way = Callable[[Sequence[Wanted]], None]


def to_request(wanted: Wanted, request_id: str) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id, **{**dataclasses.asdict(wanted), "sampler": SamplerType(wanted.sampler)}
    )


def ask_engine(engine: Engine, wanted: Sequence[Wanted]) -> None:
    futures = [engine.submit(to_request(each, f"r{index}")) for index, each in enumerate(wanted)]
    for future in futures:
        future.result()


def ask_calotype(client: Client, model: str, wanted: Sequence[Wanted]) -> None:
    handles = client.submit_many([{**dataclasses.asdict(each), "model": model} for each in wanted])
    assert all(record.images for record in client.wait([handle.id for handle in handles], 900))


def conditioning(model: StepModel) -> dict[str, torch.Tensor]:
    """What one row's network call wants besides latents and timestep."""
    [wanted] = workload(1, *model.card.native_sizes[0])
    return {
        **model.encode([Text(wanted.prompt)])[0],
        **model.row_inputs(to_request(wanted, "one"), negative=False),
    }


def network_seconds_a_row(model: StepModel, rows: int) -> float:
    """Of one forward pass at that many rows, by itself; the median of five."""
    batch = Rows(
        latents=torch.randn(rows, *model.latent_shape(*model.card.native_sizes[0])).to(model.device),
        timesteps=torch.full((rows,), 500.0, device=model.device),
        conditioning={
            name: value.to(model.device).expand(rows, *value.shape).contiguous()
            for name, value in conditioning(model).items()
        },
    )

    def one() -> float:
        began = time.perf_counter()
        model.predict(batch)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    with torch.inference_mode():
        one()
        return statistics.median(one() for _ in range(5)) / rows


def alone(model: StepModel, rows: int) -> float:
    """`network_seconds_a_row`, in a thread that leaves none of OpenMP's behind."""
    return apart(lambda: network_seconds_a_row(model, rows))


def set_up(options: argparse.Namespace, stack: ExitStack) -> tuple[dict[str, Way], Engine, Any]:
    quiet()
    name, _, source = options.model.partition("=")
    model = apart(lambda: load_model(name, source=source or None, device=options.device))
    plain = PlainElsewhere(options.model, device=options.device)
    stack.callback(plain.stop)
    engine = Engine(model, EngineSettings(max_rows=options.max_rows, compile=options.compile))
    engine.profile(seconds=8)
    engine.start()
    stack.callback(engine.stop)
    ways: dict[str, Way] = {
        "sequential": plain.one_by_one,
        "static_padded": lambda some: plain.many(some, size=options.static_batch),
        "engine": lambda some: ask_engine(engine, some),
    }
    if options.in_process:
        return ways, engine, model
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    servers = stack.enter_context(EmbeddedServers.start(folder / "servers"))
    client = stack.enter_context(Client(settings=servers.settings()))
    [port] = free_ports(1)
    redis_url = f"{servers.valkey.url.rstrip('/').removesuffix('/0')}/7"
    children = []
    for rival in (["litserve", str(port)], ["celery", redis_url]):
        command = [sys.executable, str(Path(baselines.__file__)), *rival, options.model, options.device]
        children.append(ChildProcess(rival[0], command, log=folder / f"{rival[0]}.log"))
        stack.callback(children[-1].stop)
        stack.callback(baselines.kill, children[-1])
    baselines.await_litserve(port, children[0])
    baselines.ask_celery(redis_url, workload(1, *model.card.native_sizes[0]))
    environment = {
        **servers.environment,
        "CALOTYPE_WORKER_MAX_ROWS": str(options.max_rows),
        "CALOTYPE_WORKER_COMPILE": options.compile,
    }
    workers = stack.enter_context(
        LocalWorkers(
            model=options.model, devices=[options.device], environment=environment, log_dir=folder, say=lambda _: None
        )
    )
    workers.await_ready(client.workers, 600)
    ways["litserve"] = lambda some: baselines.ask_litserve(port, some)
    ways["celery_batches"] = lambda some: baselines.ask_celery(redis_url, some)
    ways["calotype"] = lambda some: ask_calotype(client, name, some)
    return ways, engine, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="NAME or NAME=SOURCE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-rows", type=int, default=32)
    parser.add_argument("--static-batch", type=int, default=BATCH)
    parser.add_argument("--compile", choices=["off", "default", "reduce-overhead"], default="off")
    parser.add_argument("--in-process", action="store_true", help="only what needs no servers")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latest.json"))
    options = parser.parse_args()
    with ExitStack() as stack:
        ways, engine, model = set_up(options, stack)
        result = measure(ways, engine, model, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(ways: dict[str, Way], engine: Engine, model: StepModel, options: argparse.Namespace) -> dict[str, Any]:
    size = model.card.native_sizes[0]
    for way, run in ways.items():  # warm-up: kernels and the allocator; for ours also every sampler's tables
        run(workload(KINDS if way in OURS else 6, *size))
    knee = engine.profiles[0].knee.rows
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    efficiencies = []
    for number in range(options.rounds):
        wanted = workload(options.requests, *size, start=number * options.requests)
        for way, run in ways.items():
            rows, at_knee = engine.stats().rows, alone(model, knee) if way == "engine" else 0.0
            began = time.perf_counter()
            run(wanted)
            seconds[way].append(time.perf_counter() - began)
            if way == "engine":
                at_knee = (at_knee + alone(model, knee)) / 2
                efficiencies.append((engine.stats().rows - rows) * at_knee / seconds[way][-1])
    ours = "calotype" if "calotype" in ways else "engine"

    def ratios(of: str) -> dict[str, float]:
        return {
            way: round(statistics.median(s / e for s, e in zip(seconds[way], seconds[of], strict=True)), 3)
            for way in ways
            if way not in OURS
        }

    print(f"{'way':16} {'images/s':>10} {ours + ' is':>14}")
    for way in ways:
        rate = options.requests / statistics.median(seconds[way])
        ratio = statistics.median(s / e for s, e in zip(seconds[way], seconds[ours], strict=True))
        print(f"{way:16} {rate:10.2f} {ratio:13.2f}x")
    print(f"{options.requests} requests, medians of {options.rounds} rounds; ", end="")
    print(f"engine efficiency {statistics.median(efficiencies):.0%} at a knee of {knee} rows")
    return {
        "command": "benchmarks/throughput.py "
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(options).items() if name != "out"),
        **surroundings(options.device),
        "throughput_ratio": ratios(ours),
        "throughput_ratio_of": ours,
        "engine_ratio": ratios("engine"),
        "efficiency": round(statistics.median(efficiencies), 3),
        "knee_rows": knee,
        "seconds": {way: [round(value, 3) for value in values] for way, values in seconds.items()},
    }


if __name__ == "__main__":
    main()
