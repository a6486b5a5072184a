"""What people do on the page, done in Chromium on real jobs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect

from calotype.jobs import JobHandle
from calotype_shared.schema.enums import JobState
from tests.browser.conftest import PATIENCE, Visit
from tests.integration.conftest import until
from tests.integration.gateway import Gateway

VIEWS = ("create", "gallery", "batches", "fleet")
PROMPT = "a large red heart on a yellow background"

expect.set_options(timeout=PATIENCE)


def decoded(image: Locator) -> list[int]:
    """The size of an image that the browser has decoded, in pixels."""
    size: list[int] = image.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")
    return size


def finished(page: Page, number: int = 1) -> None:
    expect(page.locator(".job[data-state=succeeded]")).to_have_count(number)


@pytest.fixture(scope="module")
def images(site: Gateway) -> list[JobHandle]:
    """More jobs than a page of the gallery holds, and a few with more than one image."""
    configs = [{"prompt": f"a circle, number {n}", "num_inference_steps": 2, "seed": n} for n in range(24)]
    configs += [{"prompt": "a green star", "num_inference_steps": 3, "seed": 900, "num_images": 2}]
    # One after the other, so that the newest comes last.
    jobs = [site.client.submit(config) for config in configs]
    site.client.wait([job.id for job in jobs], timeout=120)
    return jobs


def test_a_prompt_becomes_an_image(visit: Visit, hold: Path) -> None:
    """Submitted with its parameters; previews and steps while it runs; then the image, whole and of its size."""
    page = visit.open()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Negative prompt").fill("green")
    page.get_by_label("Steps").fill("24")
    page.get_by_label("Guidance").fill("4.5")
    page.get_by_label("Sampler").select_option("euler")
    page.get_by_role("textbox", name="Seed").fill("7")
    page.get_by_label("Images", exact=True).fill("2")
    page.get_by_label("Preview").select_option("every step")
    page.get_by_role("button", name="Make it").click()
    card = page.get_by_role("article", name=PROMPT)
    preview = card.locator("img.preview").first
    expect(preview).to_have_attribute("alt", re.compile(r"Preview after step \d+"))
    assert preview.evaluate("image => image.naturalWidth > 0")
    expect(card).to_contain_text(re.compile(r"step \d+ of 48"))
    hold.unlink()
    finished(page)
    for number, seed in ((1, 7), (2, 8)):
        opening = card.get_by_role("button", name=f"Image {number} of 2, seed {seed}")
        assert decoded(opening.locator("img")) == [128, 128]
    expect(page.locator("#announcer")).to_contain_text("Done: 2 images")
    record = visit.site.client.status(str(card.get_attribute("data-job")))
    config = record.config
    assert (config.prompt, config.negative_prompt, config.num_inference_steps) == (PROMPT, "green", 24)
    assert (config.guidance_scale, config.sampler, config.seed, config.preview_every) == (4.5, "euler", 7, 1)
    card.get_by_role("button", name="Again with changes").click()
    assert page.get_by_label("Negative prompt").input_value() == "green"


def test_a_refusal_is_told_beside_its_field(visit: Visit) -> None:
    """What the page can tell itself, and what only the gateway knows, with its remedy."""
    visit.expected = ["400"]
    page = visit.open()
    page.get_by_role("button", name="Make it").click()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    expect(page.locator("#prompt-problem")).to_have_text("Say what the image should show.")
    page.get_by_label("Prompt", exact=True).fill("x")
    expect(page.locator("#prompt-problem")).to_have_count(0)
    page.get_by_label("Sampler").select_option("lcm")
    page.get_by_label("Steps").fill("60")
    page.get_by_role("button", name="Make it").click()
    expect(page.locator("#num_inference_steps-problem")).to_contain_text("use at most 50, or another sampler")
    expect(page.get_by_label("Steps")).to_have_attribute("aria-invalid", "true")
    expect(page.locator(".job")).to_have_count(0)


def test_the_keyboard_is_enough(visit: Visit) -> None:
    """From the address bar to the image's details and back, with visible focus on the way."""
    page = visit.open()
    expect(page.locator("#model option")).to_have_count(1)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "prompt":
            break
    field = page.get_by_label("Prompt", exact=True)
    expect(field).to_be_focused()
    assert field.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
    page.keyboard.type("a blue square")
    page.keyboard.press("Control+Enter")
    finished(page)
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "frame-button":
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Image 1 of 1")).to_be_visible()
    for _ in range(6):
        page.keyboard.press("Tab")
        inside = page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
        assert inside, "the focus left an open dialog"
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert page.evaluate("document.activeElement.className") == "frame-button"


def test_a_batch_with_a_bad_line(visit: Visit) -> None:
    """A file is dropped, watched to its end, and gives its images, its results and its errors."""
    lines = [{"custom_id": f"star-{n}", "prompt": "a star", "num_inference_steps": 2, "seed": n} for n in range(3)]
    manifest = "\n".join(map(json.dumps, [*lines, {"custom_id": "odd", "prompt": "x", "width": 7}]))
    page = visit.open("batches")
    expect(page.get_by_text("No batch yet.")).to_be_visible()
    transfer = page.evaluate_handle(
        """text => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([text], "stars.jsonl", { type: "application/jsonl" }));
            return transfer;
        }""",
        manifest,
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    card = page.locator(".batch")
    expect(card.get_by_role("heading")).to_have_text("stars.jsonl")
    expect(card).to_have_attribute("data-status", "completed")
    expect(card.locator(".batch-words")).to_have_text("3 of 4 lines done · 1 failed")
    card.get_by_role("button", name="Show errors").click()
    expect(card.get_by_role("cell").nth(0)).to_have_text("4")
    expect(card.get_by_role("cell").nth(1)).to_have_text("odd")
    expect(card.get_by_role("cell").nth(2)).to_contain_text("use 8 or 16")
    card.get_by_role("button", name="Show images").click()
    expect(card.locator("img")).to_have_count(3)
    assert decoded(card.locator("img").first) == [128, 128]
    with page.expect_download() as download:
        card.get_by_role("button", name="Output file").click()
    results = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert {result["custom_id"] for result in results} == {line["custom_id"] for line in lines}


def test_a_batch_is_cancelled(visit: Visit) -> None:
    """By its button, while it runs."""
    lines = [{"prompt": "a ring", "num_inference_steps": 900, "seed": n} for n in range(3)]
    page = visit.open("batches")
    data = "\n".join(map(json.dumps, lines)).encode()
    page.set_input_files("#batch-file", {"name": "long.jsonl", "mimeType": "application/jsonl", "buffer": data})
    card = page.locator(".batch").filter(has_text="long.jsonl")
    expect(card).to_have_attribute("data-status", "in_progress")
    card.get_by_role("button", name="Cancel").click()
    expect(card).to_have_attribute("data-status", "cancelled")


def test_the_gallery_goes_back_page_by_page(visit: Visit, images: list[JobHandle]) -> None:
    """Newest first, each image once, the focus at what is new; and any of them says all that made it."""
    page = visit.open("gallery")
    tiles = page.locator(".tile")
    expect(tiles).to_have_count(25)  # of 24 jobs
    more = page.get_by_role("button", name="Show older ones")
    more.click()
    expect(tiles.nth(25)).to_be_visible()
    assert page.evaluate("document.activeElement.closest('.tile').dataset.id") == tiles.nth(25).get_attribute("data-id")
    shown = tiles.evaluate_all("tiles => tiles.map((tile) => tile.dataset.id)")
    assert len(shown) == len(set(shown))
    assert shown[:3] == [f"{images[-1].id}-0", f"{images[-1].id}-1", f"{images[-2].id}-0"]

    tiles.nth(1).get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("dl").first).to_contain_text("a green star")
    expect(dialog.locator("dl").first).to_contain_text("901")
    dialog.get_by_text("Where it comes from").click()
    reported = json.loads(dialog.locator("pre").inner_text())
    image = visit.site.client.images(images[-1].id)[1]
    assert reported == json.loads(image.image.text["calotype"])  # type: ignore[attr-defined]
    dialog.get_by_role("button", name="Again with changes").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a green star")
    assert page.get_by_role("textbox", name="Seed").input_value() == "901"
    assert page.get_by_label("Steps").input_value() == "3"
    assert page.get_by_label("Preview").input_value() == "0"


def test_the_seed_is_copied(visit: Visit, images: list[JobHandle]) -> None:
    """To the clipboard."""
    page = visit.open("gallery")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".tile").first.get_by_role("button").click()
    page.get_by_role("button", name="Copy seed").click()
    expect(page.get_by_role("status").filter(has_text="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "900"


def test_images_side_by_side(visit: Visit, images: list[JobHandle]) -> None:
    """With what differs between them said in words."""
    page = visit.open("gallery")
    boxes = page.get_by_role("checkbox")
    boxes.nth(0).check()
    expect(page.get_by_role("button", name="Compare")).to_be_disabled()
    boxes.nth(2).check()
    boxes.nth(3).check()
    page.get_by_role("button", name="Compare").click()
    table = page.get_by_role("dialog").get_by_role("table")
    assert [decoded(image) for image in table.locator("img").all()] == [[128, 128]] * 3
    rows = {row.get_by_role("rowheader").inner_text(): row for row in table.locator("tbody tr").all()}
    assert {label.split("\n")[0] for label in rows if "differs" in label} == {"Prompt", "Steps", "Seed"}
    assert rows["Model"].get_by_role("cell").all_inner_texts() == ["demo"] * 3


def test_the_workers_rows_are_drawn_as_they_run(visit: Visit, hold: Path) -> None:
    """Which job, which step of how many, guided or not; and they move."""
    client = visit.site.client
    hold.unlink()
    guided = client.submit("a guided one", num_inference_steps=700, guidance_scale=5.0)
    plain = client.submit("a plain one", num_inference_steps=800, guidance_scale=1.0)
    try:
        until(lambda: all(job.status().step > 0 for job in (guided, plain)))
        hold.touch()  # with both of them in the batch
        page = visit.open("fleet")
        rows = {job.id: page.locator(f'.row[data-key="{job.id}/0"]') for job in (guided, plain)}
        expect(rows[guided.id].locator(".row-step")).to_contain_text(re.compile(r"\d+/700"))
        expect(rows[plain.id].locator(".row-step")).to_contain_text(re.compile(r"\d+/800"))
        assert [rows[job.id].locator(".track").count() for job in (guided, plain)] == [2, 1]
        expect(rows[guided.id]).to_contain_text("guided")
        expect(page.locator(".group .hint")).to_contain_text("3 of 8 rows · 2 images")
        expect(page.locator('[data-key="In step batches"] .figure')).to_have_text("2")
        step = step_of(rows[plain.id])
        hold.unlink()
        until(lambda: step_of(rows[plain.id]) > step)
        hold.touch()
        expect(page.locator(".spark path")).to_have_attribute("d", re.compile("^M"))
        rows[plain.id].get_by_role("button").click()
        expect(page.get_by_role("dialog", name="Job, running")).to_contain_text("a plain one")
    finally:
        for job in (guided, plain):
            job.cancel()
    hold.unlink()
    page.keyboard.press("Escape")
    expect(page.locator(".row")).to_have_count(0)


def step_of(row: Locator) -> int:
    return int(str(row.locator(".row-step").get_attribute("data-said")).partition("/")[0])


def test_a_dead_letter_is_tried_again(visit: Visit) -> None:
    """As a new job with the same config; the old one leaves the list."""
    client = visit.site.client
    old = client.submit("x" * 600, num_inference_steps=2, metadata={"order": 7})  # more text than the model takes
    assert client.wait(old.id, timeout=120, check=False).state is JobState.FAILED
    page = visit.open("fleet")
    letter = page.locator(f'.dead[data-key="{old.id}"]')
    expect(letter.locator(".problem")).to_contain_text("windows")
    letter.get_by_role("button", name="Retry").click()
    expect(letter).to_have_count(0)
    until(client.dead_jobs.list)  # the new one can be no better
    [record] = client.dead_jobs.list()
    assert (record.config, record.metadata) == (client.status(old.id).config, {"order": 7})
    expect(page.locator(f'.dead[data-key="{record.id}"]')).to_be_visible()
    page.locator(".dead").get_by_role("button", name="Drop").click()
    expect(page.get_by_text("No job has failed for good.")).to_be_visible()
    assert client.dead_jobs.list() == []


def test_a_key_is_asked_for_where_one_is_needed(visit: Visit, site: Gateway) -> None:
    """Until it is right; kept by this tab alone, and sent with every request."""
    visit.expected = ["401"]
    guarded = Gateway(site.settings, auth="keys", dispatch=False)
    visit.allow(guarded.url)
    token, _ = guarded.app.state.services.keys.create(name="page")
    try:
        page = visit.open("gallery", guarded.url)
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_contain_text("an API key is required")
        dialog.get_by_label("Key").fill("ct_wrong")
        dialog.get_by_role("button", name="Use it").click()
        expect(dialog.get_by_label("Key")).to_have_value("")
        expect(dialog).to_be_visible()
        dialog.get_by_label("Key").fill(token)
        dialog.get_by_role("button", name="Use it").click()
        expect(dialog).to_have_count(0)
        expect(page.locator("#gallery-note, .tile").first).to_be_visible()
        assert page.evaluate("[sessionStorage.getItem('calotype-key'), JSON.stringify(localStorage)]")[0] == token
        assert token not in page.evaluate("JSON.stringify(localStorage)")
        expect(page.get_by_role("button", name="API key")).to_be_visible()
    finally:
        guarded.stop()


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_everyone_can_use_it(
    browser: Browser, site: Gateway, images: list[JobHandle], colors: Any, request: pytest.FixtureRequest
) -> None:
    """axe finds nothing in any view or dialog, contrast included; and at 375 pixels nothing leaves the screen."""
    visit = Visit(browser, site, viewport={"width": 375, "height": 760}, color_scheme=colors, reduced_motion="reduce")
    request.getfixturevalue("hold")  # once the images are made
    long = site.client.submit("a long one", num_inference_steps=900)
    try:
        wrong = {}
        for view in VIEWS:
            page = visit.open(view)
            expect(page.locator(f"#{view} {READY[view]}").first).to_be_visible()
            wrong[view] = found_by_axe(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= 375, view
        page = visit.open("gallery")
        page.get_by_role("checkbox").nth(0).check()
        page.get_by_role("checkbox").nth(1).check()
        for name, opening in {
            "Image": page.locator(".tile-button").first,
            "Side": page.locator("#tray-compare"),
        }.items():
            opening.click()
            expect(page.get_by_role("dialog", name=re.compile(name))).to_be_visible()
            wrong[name] = found_by_axe(page)
            page.keyboard.press("Escape")
        assert not any(wrong.values()), wrong
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 17, 14)"
        assert dark == (colors == "dark")
        page.get_by_role("button", name=re.compile("Colors: auto")).click()
        page.get_by_role("button", name=re.compile("Colors: light")).click()
        page.reload()
        expect(page.get_by_role("button", name=re.compile("Colors: dark"))).to_be_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 17, 14)"
    finally:
        long.cancel()
    visit.close()


READY = {"create": "#model", "gallery": ".tile img", "batches": "#drop", "fleet": ".row"}


def found_by_axe(page: Page) -> list[str]:
    results = Axe().run(page).response
    return [f"{found['id']}: {found['nodes'][0]['html']}" for found in results["violations"]]


def test_scripts_from_elsewhere_do_not_run(visit: Visit) -> None:
    """Neither in the page itself nor from another address: a prompt could not be one either."""
    visit.expected = ["Content Security Policy", "left for", "TrustedScript", "Trusted"]
    page = visit.open()
    page.evaluate("const s = document.createElement('script'); s.append('window.ran = 1'); document.head.append(s)")
    assert page.evaluate("window.ran") is None
    assert page.evaluate("fetch('http://127.0.0.1:1/').catch((error) => error.name)") == "TypeError"
    assert any("connect-src" in line for line in visit.complaints)
