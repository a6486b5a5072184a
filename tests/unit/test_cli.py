"""The command's manners: one clear line for an error, and exit statuses that mean something."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import calotype
from calotype.cli.app import build_app, main
from calotype.cli.exit_codes import MEANINGS, ExitCode
from calotype_shared.schema.config import GenerationConfig
from calotype_train.__main__ import build_app as training_app
from calotype_train.__main__ import main as train_main
from calotype_train.__main__ import parse
from calotype_train.options import RECIPES, ControlNetOptions, TextualInversionOptions
from calotype_worker.__main__ import build_app as worker_app
from calotype_worker.__main__ import main as worker_main
from calotype_worker.settings import WorkerSettings


def options_of(app: typer.Typer, command: str | None = None) -> dict[str, set[str]]:
    """By parameter, the options that set it."""
    found: Any = typer.main.get_command(app)
    found = found.commands[command] if command else found
    return {parameter.name: set(parameter.opts) for parameter in found.params if parameter.param_type_name == "option"}


def test_options_are_named_as_what_they_set() -> None:
    """Of a job, the fields of a config, with the shorter names as aliases; of a worker, its settings."""
    of_a_job = options_of(build_app(), "submit")
    for field in set(GenerationConfig.model_fields) - {"prompt"}:
        assert f"--{field.replace('_', '-')}" in of_a_job[field]
    shorter = {"steps", "guidance", "negative", "mask", "lora", "control", "also", "frames", "format"}
    assert {f"--{name}" for name in shorter} <= set().union(*of_a_job.values())
    of_a_worker = options_of(worker_app())
    assert of_a_worker.keys() - {"profile", "devices", "help"} == WorkerSettings.model_fields.keys()
    for kind in RECIPES:
        assert options_of(training_app(), kind.recipe).keys() - {"help"} == kind.model_fields.keys()


@pytest.mark.parametrize("run", [main, worker_main, train_main])
@pytest.mark.parametrize("arguments", [["--nothing"], ["lora", "--steps"], ["--device"], ["lora", "one", "two"]])
def test_what_is_wrong_with_options_is_one_line(
    run: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every command, whichever process it is."""
    assert run(arguments) == ExitCode.USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) == 1
    assert "--help" in shown.err


@pytest.mark.parametrize(
    ("run", "arguments", "said"),
    [
        (worker_main, ["--max-rows", "1"], "CALOTYPE_WORKER_MAX_ROWS=1: Input should be greater than or equal to 2"),
        (worker_main, ["--model", "a,b", "--model", "c,d,e"], "CALOTYPE_WORKER_MODEL='a,b,c,d,e'"),
        (
            train_main,
            ["lora", "--data", "x", "--out", "y", "--steps", "0"],
            "--steps=0: Input should be greater than 0",
        ),
        (
            train_main,
            ["controlnet", "--data", "x", "--out", "y", "--embedding-channels", "4,b"],
            "--embedding-channels='b': Input should be a valid integer",
        ),
    ],
)
def test_values_that_are_not_allowed_are_named(
    run: Callable[[list[str]], int], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the model of settings that the options are made from."""
    assert run(arguments) == ExitCode.USAGE
    assert said in capsys.readouterr().err


def test_the_options_of_training_arrive() -> None:
    """Converted, and with the recipe's own defaults where nothing was given."""
    given = ["textual-inversion", "--data", "x", "--out", "y", "--token", "<x>", "--initialize-from", "a", "--resume"]
    options = parse([*given, "--learning-rate", "0.25"])
    assert isinstance(options, TextualInversionOptions)
    assert (options.data, options.resume, options.learning_rate, options.batch_size) == (Path("x"), True, 0.25, 4)
    wider = parse(["controlnet", "--data", "x", "--out", "y", "--embedding-channels", "4,8"])
    assert isinstance(wider, ControlNetOptions)
    assert wider.embedding_channels == (4, 8)
    assert parse(["lora", "--help"]) is None


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The one of the package, and nothing else is done."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"calotype {calotype.__version__}\n"


def test_help_needs_no_torch() -> None:
    """Of no command; it would take seconds."""
    for command in (["calotype", "--help"], ["calotype_worker", "--help"], ["calotype_train", "lora", "--help"]):
        program = f"import sys, runpy; sys.argv = {command!r}\ntry: runpy.run_module({command[0]!r}, None, '__main__')"
        program += "\nexcept SystemExit as end: print('status', end.code, 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout.endswith("status 0 False\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    "command", [[], ["up"], ["demo"], ["submit"], ["status"], ["cancel"], ["jobs"], ["models"], ["top"]]
)
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` works without any server."""
    assert main([*command, "--help"]) == 0
    assert "Usage: calotype" in capsys.readouterr().out


def test_the_exit_statuses_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    """Each one, in `calotype --help`."""
    main(["--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert set(MEANINGS) == set(ExitCode)
    for code, meaning in MEANINGS.items():
        assert f"{code.value} {meaning}" in shown


@pytest.mark.parametrize(
    ("arguments", "variables", "status", "said"),
    [
        (["paint"], {}, ExitCode.USAGE, "No such command 'paint'"),
        (["submit"], {}, ExitCode.USAGE, "'prompt'"),
        (["submit", "x", "--lane", "express"], {}, ExitCode.USAGE, "express"),
        (["jobs"], {"CALOTYPE_REDIS_URL": "redis://127.0.0.1:1/0"}, ExitCode.UNAVAILABLE, "CALOTYPE_REDIS_URL"),
        (["jobs"], {"CALOTYPE_REDIS_URL": "mysql://h"}, ExitCode.USAGE, "CALOTYPE_REDIS_URL"),
        (["jobs"], {"CALOTYPE_REDDIS_URL": "x"}, ExitCode.USAGE, "CALOTYPE_REDDIS_URL is not a setting"),
        (["submit", "x", "--steps", "0"], {}, ExitCode.USAGE, "num_inference_steps=0"),
        (["submit", "x", "--sampler", "best"], {}, ExitCode.USAGE, "use one of: ddpm"),
        (["submit", "x", "--guidance", "nan"], {}, ExitCode.USAGE, "guidance_scale=nan"),
        (["submit", "x", "--quality", "superb"], {}, ExitCode.USAGE, "quality='superb'"),
        (["submit", "x", "--num-inference-steps", "0"], {}, ExitCode.USAGE, "num_inference_steps=0"),
        (["submit", "x", "--loras", "Neon"], {}, ExitCode.USAGE, "loras.0.name='Neon'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_with_their_own_status(
    arguments: list[str],
    variables: dict[str, str],
    status: ExitCode,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Known before anything is queued; as JSON where asked for."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(arguments) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert main([*arguments, "--json"]) == status
    assert said in json.loads(capsys.readouterr().err)["error"]["message"]
