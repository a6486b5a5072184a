"""The demo's parts that need no server: its prompts, its contact sheet, its figures."""

from __future__ import annotations

from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from calotype.contact_sheet import Print, contact_sheet
from calotype.demo import _quantile, read_prompts
from calotype_shared.errors import InvalidRequest

_EXAMPLES = Path(__file__).parents[2] / "examples" / "prompts.jsonl"


def test_the_examples_show_what_can_be_mixed() -> None:
    """At least 24 prompts over ten samplers, 10 to 50 steps, with and without guidance, in two sizes."""
    configs = read_prompts(_EXAMPLES, "demo")
    assert len(configs) >= 24
    assert len({config.sampler for config in configs}) >= 10
    steps = Counter(config.num_inference_steps for config in configs)
    assert (min(steps), max(steps)) == (10, 50)
    assert len(steps) >= 8
    assert {config.guided for config in configs} == {True, False}
    assert {(config.width, config.height) for config in configs} == {(128, 128), (160, 96)}


def test_an_installed_package_has_the_same_examples() -> None:
    """The copy that goes into the wheel is the file in `examples/`."""
    packaged = resources.files("calotype") / "assets" / "prompts.jsonl"
    assert packaged.read_bytes() == _EXAMPLES.read_bytes()


def test_prompts_name_the_model_only_where_they_do_not(tmp_path: Path) -> None:
    """A line's own model wins over the demo's; empty lines are skipped."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": "b", "model": "other"}\n')
    assert [config.model for config in read_prompts(file, "tiny")] == ["tiny", "other"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": "b", "steps": 3}\n', "line 2 .*: steps"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2 .*one JSON object per line"),
        ('["a"]\n', "line 1 .*is not a JSON object"),
        ("\n", "has no prompts"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, said: str) -> None:
    """The error says which line, and what would do."""
    file = tmp_path / ("a long name" * 9) / "prompts.jsonl"
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=said):
        read_prompts(file, "demo")


def test_a_contact_sheet_shows_every_image_enlarged_with_its_caption() -> None:
    """Each image's color fills its cell in reading order, and there is ink below each."""
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [
        Image.new("RGB", size, color) for size, color in zip([(128, 128), (160, 96), (64, 64)], colors, strict=True)
    ]
    sheet = contact_sheet(
        [Print(image=image, title="a caption of some words", details=("ddim",)) for image in images], columns=2
    )
    half = sheet.width // 2
    cells = [(half // 2, 150), (half + half // 2, 200), (half // 2, sheet.height // 2 + 150)]
    assert [sheet.getpixel(cell) for cell in cells] == colors
    for (x, _), top in zip(cells, (272, 272, sheet.height // 2 + 264), strict=True):
        below = sheet.crop((x - 120, top, x + 120, top + 60)).convert("L")
        darkest: Any = below.getextrema()[0]
        assert darkest < 90  # dark ink on light paper
    assert sheet.getpixel((half + half // 2, sheet.height - 150)) == (250, 249, 246)  # no fourth image


def test_a_long_caption_is_cut_to_its_cell() -> None:
    """However long the prompt, the sheet keeps its grid."""
    image = Image.new("RGB", (8, 8), (9, 9, 9))
    short = contact_sheet([Print(image=image, title="a")])
    assert contact_sheet([Print(image=image, title="many words " * 300, details=("x", "y"))]).size == short.size


def test_quantiles_are_nearest_ranks() -> None:
    """Of twenty values, half lie at or below the 10th and 95% at or below the 19th."""
    values = [float(value) for value in range(1, 21)]
    assert (_quantile(values, 50), _quantile(values, 95)) == (10.0, 19.0)
    assert _quantile([3.0], 95) == 3.0
