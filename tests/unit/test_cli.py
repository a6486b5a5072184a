"""The command's manners: one clear line for an error, and exit statuses that mean something."""

from __future__ import annotations

import json
import re

import pytest

from calotype.cli.app import main
from calotype.cli.exit_codes import MEANINGS, ExitCode


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
