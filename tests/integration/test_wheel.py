"""A built wheel holds everything and works outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.unit.test_release import load_release

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

_USE = """
import sys
from pathlib import Path
import calotype, calotype_shared, calotype_worker
here = Path(sys.argv[1])
for package in (calotype, calotype_shared, calotype_worker):
    assert Path(package.__file__).is_relative_to(here), package.__file__
    assert (Path(package.__file__).parent / "py.typed").exists()
from calotype_shared.queue.scripts import script_source
assert "EDGES" in script_source("create")
from calotype.demo import read_prompts
assert len(read_prompts(None, "demo")) >= 24
from calotype.gateway.web_ui import web_files
assert {"index.html", "style.css", "app.js", "icon.svg"} <= set(web_files())
from calotype_worker.models import demo_folder, load_model
assert demo_folder().is_relative_to(here)
model = load_model("demo")
print(model.card.native_sizes[0])
"""


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    """Scripts, prompts, the page and the demo model come with it; its dependencies are those of this environment."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)  # an sdist, and the wheel from that
    release = load_release()
    assert len(release.check_distributions(tmp_path, version=release.version())) == 2
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]
    assert wheel.stat().st_size < 16_000_000
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "-c", _USE, str(site)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(site), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(128, 128)"
