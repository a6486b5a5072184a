"""What a claim costs the Redis server, by how far it looks and how long the line is.

    python benchmarks/claim_costs.py --output benchmarks/results/claim-costs.json

Microseconds of the script by the server's own count (`INFO commandstats`), so that neither network nor client is in it:
medians. A claimed job is handed back each time, which leaves the line as it was.

- one size: the first in line is of the size that the worker runs;
- many sizes: eight at random, of which the worker runs one;
- no match: it runs a size that nobody wants, and looks as far as it may.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from affinity import SIZES
from redis import Redis
from workload import surroundings

from calotype.embedded import EmbeddedServers
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import JobStore
from calotype_shared.queue.submission import NewJob
from calotype_shared.schema.enums import Lane
from calotype_shared.schema.resolve import ResolvedConfig

QUEUE = "demo.bulk"
LINES = {"one size": (SIZES[:1], SIZES[0]), "many sizes": (SIZES, SIZES[0]), "no match": (SIZES, (8, 8))}


def fill(store: JobStore, sizes: list[tuple[int, int]], count: int) -> None:
    chance = random.Random(0)
    store.create(
        NewJob.of(
            ResolvedConfig(prompt="a red circle on a blue background", width=width, height=height, seed=number),
            lane=Lane.BULK,
        )
        for number, (width, height) in enumerate(chance.choices(sizes, k=count))
    )


def cost(redis: Redis, store: JobStore, size: tuple[int, int], look: int, claims: int) -> float:
    """Microseconds of a claim, by the server's own clock."""
    spent = []
    for _ in range(claims):
        redis.config_resetstat()
        claim = store.claim(QUEUE, worker="w", lease_seconds=600, look=look, shapes=["{}x{}".format(*size)])
        spent.append(float(redis.info("commandstats")["cmdstat_evalsha"]["usec"]))
        assert claim is not None
        store.release(claim)
        redis.hdel(store.keys.job(claim.job_id), "history")  # it would grow
        redis.delete(store.keys.orphans)
        for job_id in redis.zrange(store.keys.waiting(QUEUE), 0, 127):
            redis.hdel(store.keys.job(str(job_id)), "passed")  # else the first is due after `look` claims
    return round(statistics.median(spent), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="*", default=[10, 1000, 100_000])
    parser.add_argument("--looks", type=int, nargs="*", default=[0, 64, 128])
    parser.add_argument("--claims", type=int, default=60)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, EmbeddedServers.start(Path(folder)) as servers:
        settings = servers.settings()
        with connect_redis(settings) as redis:
            for count in options.lines:
                made: dict[int, JobStore] = {}  # by number of sizes
                for name, (sizes, size) in LINES.items():
                    if len(sizes) not in made:
                        made[len(sizes)] = JobStore(redis, key_prefix=f"{count}-{len(sizes)}:")
                        fill(made[len(sizes)], sizes, count)
                    for look in options.looks:
                        microseconds = cost(redis, made[len(sizes)], size, look, options.claims)
                        table.append({"line": name, "jobs": count, "look": look, "microseconds": microseconds})
                        print(table[-1], flush=True)
    result = {"command": f"benchmarks/claim_costs.py --claims {options.claims}", **surroundings("cpu"), "table": table}
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
