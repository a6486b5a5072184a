"""Importing the producer is cheap, and what needs no torch does not load it."""

from __future__ import annotations

import subprocess
import sys

_BLOCKED = ("torch", "diffusers", "transformers", "accelerate", "numpy", "celery", "kombu", "calotype_worker")
_IMPORT_WITHOUT = f"""
import importlib.abc, sys, time
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {_BLOCKED!r}:
            raise ImportError(name + " must not be imported by the producer")
        return None
sys.meta_path.insert(0, Refuse())
for name in {_BLOCKED!r}:
    try:
        __import__(name)
    except ImportError as error:
        assert "must not be imported by the producer" in str(error), error
    else:
        raise AssertionError(name + " can be imported, so nothing is shown")
began = time.process_time()
import pydantic_settings, redis.asyncio
between = time.process_time()
import calotype
from calotype import Client, GenerationConfig
share = (time.process_time() - between) / (between - began)
client = Client("redis://127.0.0.1:1/0")
for name in calotype.__all__:
    getattr(calotype, name)
import calotype.cli, calotype.demo, calotype.embedded
print(share, "boto3" in sys.modules)
"""


def test_the_producer_imports_as_fast_as_its_dependencies_without_the_workers_packages() -> None:
    """In a fresh interpreter where those packages cannot be imported.

    Its own part takes half as long as pydantic's and redis' do. Processor time, and of one process, so that a slow or
    busy machine passes.
    """
    least = 99.0
    for _ in range(3):  # the first run may also compile bytecode
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT_WITHOUT], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        share, boto3 = done.stdout.split()
        assert boto3 == "False"
        least = min(least, float(share))
        if least < 1:
            break
    assert least < 1


def test_a_request_and_the_schema_load_no_torch() -> None:
    """In a fresh interpreter, by what is loaded afterwards: also an import inside a function that runs would show."""
    heavy = ("torch", "diffusers", "transformers", "numpy", "celery", "redis", "boto3")
    code = f"""
import sys
import calotype_worker.request, calotype_shared.schema.jobs
from calotype_shared.schema.config import GenerationConfig
from calotype_shared.schema.model_card import ModelCard
from calotype_shared.schema.resolve import resolve
card = ModelCard(name="demo", family="sd", version="1", size_multiple=8, native_sizes=((64, 64),), max_pixels=4096,
                 max_prompt_tokens=77, samplers=("ddim",))
config = resolve(GenerationConfig(prompt="x"), {{"demo": card}})
request = calotype_worker.request.GenerationRequest.from_config(config, request_id="r")
print(request.width, *(name for name in {heavy!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "64\n", "")


def test_unknown_names_are_refused_as_usual() -> None:
    """The package's lazy names do not swallow typing errors."""
    import calotype

    assert "Client" in dir(calotype)
    assert not hasattr(calotype, "Cleint")
