"""Runs the examples of the documents as a reader would paste them, against a gateway and a worker on the demo model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from calotype.embedded import EmbeddedServers
from calotype.webhooks import tenant_secret
from tests.faults.harness import Forge
from tests.integration.gateway import Gateway, serving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)


MASTER = "what webhooks are signed with in the documents"


@pytest.fixture(scope="module")
def gateway(servers: EmbeddedServers, forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with serving(servers, forge, tmp_path_factory.mktemp("documents"), "demo", webhook_secret=MASTER) as gateway:
        yield gateway


@pytest.fixture
def environment(gateway: Gateway, servers: EmbeddedServers) -> dict[str, str]:
    """What a reader's terminal has, after pasting the lines that `calotype up` prints."""
    commands = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, **servers.environment, **gateway.settings.environment(), "PATH": commands}


def paste(document: str, gateway: Gateway, environment: dict[str, str], folder: Path) -> str:
    """Every block of shell and of Python, in order, each a process of its own; what they printed.

    A block of text right below one is what it prints, with … for what differs from run to run: a line of … alone stands
    for any number of lines, none included.
    """
    text = (ROOT / "docs" / document).read_text().replace("127.0.0.1:8000", f"127.0.0.1:{gateway.port}")
    text = text.replace("port=8000", f"port={gateway.port}")
    said = []
    for kind, code, printed in BLOCK.findall(text):
        command = ["bash", "-euo", "pipefail", "-c", code] if kind == "sh" else [sys.executable, "-c", code]
        ran = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # a terminal shows both
            text=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == 0, f"{code}\n{ran.stdout[-3000:]}"
        if printed:
            assert re.fullmatch(as_pattern(printed), ran.stdout), (
                f"{code}\nprints\n{ran.stdout}\nand the page says\n{printed}"
            )
        said.append(ran.stdout)
    return "\n".join(said)


def as_pattern(printed: str) -> str:
    lines = printed.splitlines(keepends=True)
    return "".join(
        "(?:[^\n]*\n)*" if line == "…\n" else "[^\n]*".join(map(re.escape, line.split("…"))) for line in lines
    )


def middle(file: Path) -> tuple[float, float, float]:
    with Image.open(file) as image:
        red, green, blue = image.convert("RGB").resize((8, 8)).getpixel((4, 4))  # type: ignore[misc]
    return red, green, blue


def test_batches(gateway: Gateway, environment: dict[str, str], tmp_path: Path) -> None:
    """Lines that succeed and one that cannot, from the command line and from Python."""
    said = paste("batches.md", gateway, environment, tmp_path)
    assert '"custom_id": "cover"' in said or '"custom_id":"cover"' in said
    assert "line 3: width=100" in said
    assert "completed 2 of 2" in said
    assert re.search(r"^batch_\w+ +cancell(ing|ed) .* 3000 ", said, re.MULTILINE), "the long one was cancelled in time"


def test_http_api(gateway: Gateway, environment: dict[str, str], tmp_path: Path) -> None:
    """By curl, by the openai package and by webuiapi; and the images show what was asked for."""
    said = paste("http-api.md", gateway, environment, tmp_path)
    assert "event: preview" in said
    assert "event: done" in said
    assert "image_generation.completed" in said
    for color in ("red", "green", "blue"):
        assert re.search(rf"^{color} http", said, re.MULTILINE)
    red, _, blue = middle(tmp_path / "heart.png")
    assert red > blue + 60
    red, _, blue = middle(tmp_path / "circle.png")
    assert red > blue + 60
    red, green, blue = middle(tmp_path / "star.png")
    assert min(red, green) > blue + 40, "yellow"


def test_tutorial(gateway: Gateway, environment: dict[str, str], tmp_path: Path) -> None:
    """Every output is what the page says, and the images show what was asked for."""
    paste("tutorial/first-image.md", gateway, environment, tmp_path)
    red, _, blue = middle(next((tmp_path / "out").glob("*.png")))
    assert red > blue + 60, "the heart"
    red, _, blue = middle(tmp_path / "square-circle-star-1.png")
    assert blue > red + 60, "the circle"
    red, _, blue = middle(tmp_path / "blue-square.png")
    assert blue > red + 60, "the red square turned blue"
    red, green, blue = middle(tmp_path / "star.png")
    assert min(red, green) > blue + 40, "yellow"


def test_a_million_images_in_small(gateway: Gateway, environment: dict[str, str], tmp_path: Path) -> None:
    """The commands of the how-to, on a dozen lines."""
    paste("how-to/million-images.md", gateway, environment, tmp_path)
    assert (tmp_path / "errors.jsonl").read_text() == ""
    red, _, blue = middle(tmp_path / "blue-circle.png")
    assert blue > red + 60


def test_each_way_in_leads_to_the_same_queue(gateway: Gateway, environment: dict[str, str], tmp_path: Path) -> None:
    """The examples of a batch, of asyncio, of OpenAI's client and of webhooks."""
    environment |= {"OPENAI_BASE_URL": f"{gateway.url}/v1", "WEBHOOK_SECRET": tenant_secret(MASTER, "default")}
    out = tmp_path / "out"
    for name in ("batch", "asyncio_client", "openai_client", "webhook_receiver"):
        command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
        ran = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150, check=False
        )
        assert ran.returncode == 0, f"{name}: {ran.stderr[-2000:]}"
        assert "out/" in ran.stdout
        if name == "batch":
            assert "completed: 3 of 4 lines" in ran.stdout
            assert "odd: line 4: width=100" in ran.stdout
    assert middle(out / "batch-0.png")[0] > middle(out / "batch-0.png")[2] + 60, "by name, whatever came first"
    assert middle(out / "batch-1.png")[2] > middle(out / "batch-1.png")[0] + 60
    red, green, blue = middle(out / "asyncio_client-2.png")
    assert min(red, green) > blue + 60, "yellow"
    assert middle(out / "openai_client-0.png")[0] > middle(out / "openai_client-0.png")[1] + 60
    event = json.loads((out / "webhook_receiver.json").read_text())
    assert event["type"] == "job.succeeded"
    assert event["data"]["images"][0]["seed"] == 7


def test_no_example_is_left_out() -> None:
    """A new one is run by a test: here, in test_examples.py, or in a test of its own."""
    tests = [Path(__file__), Path(__file__).with_name("test_examples.py"), ROOT / "tests/unit/test_model_adapter.py"]
    run = "".join(path.read_text() for path in tests)
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"sheet"}
    assert not [name for name in examples if f'"{name}"' not in run and f'"{name}.py"' not in run]
