"""The real `webuiapi` package against a running gateway and a worker on the bundled model."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import requests
import webuiapi
from PIL import Image

from calotype.api_keys import Scope
from calotype.embedded import EmbeddedServers
from tests.faults.harness import Forge
from tests.integration.conftest import until
from tests.integration.gateway import Gateway, serving

SIZE = {"width": 128, "height": 128}


@pytest.fixture(scope="module")
def gateway(servers: EmbeddedServers, forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with serving(servers, forge, tmp_path_factory.mktemp("webui"), "demo", auth="keys") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def api(gateway: Gateway) -> webuiapi.WebUIApi:
    token, _ = gateway.app.state.services.keys.create(name="webui", tenant="acme", scopes=list(Scope))
    api = webuiapi.WebUIApi(host="127.0.0.1", port=gateway.port, sampler="Euler a", steps=12)
    api.set_auth("anyone", token)
    return api


def middle(image: Image.Image) -> np.ndarray:
    """The mean color of the middle."""
    return np.asarray(image.convert("RGB"))[56:72, 56:72].reshape(-1, 3).mean(0)


def test_txt2img(api: webuiapi.WebUIApi) -> None:
    """Two images by their parameters, readable by their tools, and the same again by the seed."""
    result = api.txt2img(
        prompt="a large red circle on a blue background",
        negative_prompt="green",
        seed=1003,
        cfg_scale=5,
        batch_size=2,
        **SIZE,
    )
    assert [image.size for image in result.images] == [(128, 128)] * 2
    for image in result.images:
        red, _, blue = middle(image)
        assert red > blue + 60, "red in the middle"
    assert result.info["all_seeds"] == [1003, 1004]
    assert (result.info["sampler_name"], result.info["steps"]) == ("Euler a", 12)
    assert "Sampler: Euler a" in str(api.png_info(result.image).info)
    again = api.txt2img(
        prompt="a large red circle on a blue background", negative_prompt="green", seed=1004, cfg_scale=5, **SIZE
    )
    difference = np.asarray(again.image).astype(int) - np.asarray(result.images[1])
    assert np.abs(difference).max() <= 1


def test_img2img_and_inpainting(api: webuiapi.WebUIApi) -> None:
    """Strength 0 gives the source back; outside the mask everything is kept."""
    source = Image.new("RGB", (128, 128), (30, 60, 200))
    same = api.img2img(images=[source], prompt="a red circle", denoising_strength=0.0, **SIZE)
    assert np.array_equal(np.asarray(same.image), np.asarray(source))
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (64, 0, 128, 128))
    painted = api.img2img(
        images=[source], mask_image=mask, prompt="a large yellow circle", denoising_strength=1.0, seed=3, **SIZE
    )
    assert np.array_equal(np.asarray(painted.image)[:, :64], np.asarray(source)[:, :64])
    assert not np.array_equal(np.asarray(painted.image)[:, 64:], np.asarray(source)[:, 64:])
    other = api.img2img(
        images=[source], mask_image=mask, inpainting_mask_invert=1, prompt="x", denoising_strength=1.0, **SIZE
    )
    assert np.array_equal(np.asarray(other.image)[:, 64:], np.asarray(source)[:, 64:])


def test_loras_and_controlnets(api: webuiapi.WebUIApi) -> None:
    """LoRAs are written into the prompt; a ControlNet's unit has a prepared image."""
    assert {"neon", "sticker"} <= {lora["name"] for lora in api.get_loras()}
    plain = api.txt2img(prompt="a red circle on a white background", seed=5, **SIZE)
    neon = api.txt2img(prompt="a red circle on a white background <lora:neon:1>", seed=5, **SIZE)
    corner = np.s_[4:20, 108:124]
    assert np.asarray(plain.image)[corner].mean() > 150 > np.asarray(neon.image)[corner].mean(), "neon is dark"
    drawn = Image.new("L", (128, 128), 0)
    drawn.paste(255, (30, 30, 98, 98))
    unit = webuiapi.ControlNetUnit(image=drawn, module="none", model="outline", weight=1.0)
    controlled = api.txt2img(prompt="a red square on a white background", seed=5, controlnet_units=[unit], **SIZE)
    # `alwayson_scripts` is a mutable default there: without it, this call would carry the unit of the one before.
    free = api.txt2img(prompt="a red square on a white background", seed=5, alwayson_scripts={}, **SIZE)
    assert not np.array_equal(np.asarray(controlled.image), np.asarray(free.image))


def base64_of(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_mask_of_strokes_on_transparent_repaints_the_strokes(api: webuiapi.WebUIApi) -> None:
    """White strokes on a transparent canvas, as editors send them, in base64 with line breaks."""
    source = Image.new("RGB", (128, 128), (30, 60, 200))
    mask = Image.new("RGBA", (128, 128), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (64, 0, 128, 128))
    encoded = base64_of(mask)
    result = api.post_and_get_api_result(
        f"{api.baseurl}/img2img",
        {
            "prompt": "a red circle", "steps": 4, "init_images": [base64_of(source)], **SIZE,
            "mask": "\n".join(encoded[start : start + 76] for start in range(0, len(encoded), 76)) + "\n",
        },
        False,
    )  # fmt: skip
    shown = np.asarray(result.image)
    assert np.array_equal(shown[:, :64], np.asarray(source)[:, :64])
    assert not np.array_equal(shown[:, 64:], np.asarray(source)[:, 64:])


def test_scripts_that_are_off_and_those_that_repeat_fields(api: webuiapi.WebUIApi) -> None:
    """What the web UI's own pages send with each request."""
    scripts = {
        "Refiner": {"args": [False, "", 0.8]},
        "Soft Inpainting": {"args": [False, 1, 0.5, 4, 0, 0.5, 2]},
        "Extra options": {"args": []},
        "Sampler": {"args": [3, "DDIM", "Automatic"]},
        "Seed": {"args": [77, False, -1, 0.5, 0, 0]},
    }
    result = api.txt2img(prompt="a red circle", alwayson_scripts=scripts, **SIZE)
    assert (result.info["steps"], result.info["sampler_name"], result.info["seed"]) == (3, "DDIM", 77)


def test_the_parameters_of_webp_and_jpeg_are_read(api: webuiapi.WebUIApi, gateway: Gateway) -> None:
    job = gateway.client.submit("a red ☃ circle", model="demo", num_inference_steps=3, output_format="webp")
    [image] = job.result(120)
    answer = gateway.http.post(
        "/sdapi/v1/png-info", json={"image": base64.b64encode(image.data).decode()}, auth=("any", api.session.auth[1])
    )
    assert answer.json()["info"].startswith("a red ☃ circle\nSteps: 3, Sampler: ")


def test_a_wait_that_ends_before_its_job_is_answered_504(api: webuiapi.WebUIApi, gateway: Gateway) -> None:
    services = gateway.app.state.services
    usual = services.gateway
    services.gateway = usual.model_copy(update={"max_wait_seconds": 0.2})
    try:
        with pytest.raises(RuntimeError) as late:
            api.txt2img(prompt="x", steps=150, **SIZE)
    finally:
        services.gateway = usual
    status, body = late.value.args
    job_id = gateway.client.jobs(limit=1)[0].id
    assert (status, f"job {job_id} is still" in body) == (504, True)
    gateway.client.cancel(job_id)


def test_progress_and_interrupt(api: webuiapi.WebUIApi, gateway: Gateway) -> None:
    """How far a request is, with a preview; and its end, at once."""
    assert api.get_progress()["progress"] == 0.0
    found: list[webuiapi.WebUIApiResult] = []
    asking = threading.Thread(
        target=lambda: found.append(api.txt2img(prompt="long", steps=900, sampler_name="DDIM", batch_size=2, **SIZE))
    )
    asking.start()
    until(lambda: 0 < api.get_progress()["progress"] < 1)
    until(lambda: api.get_progress()["current_image"] is not None)
    state = api.get_progress()
    assert Image.open(io.BytesIO(base64.b64decode(state["current_image"]))).size == (128, 128)
    assert state["eta_relative"] > 0
    assert state["state"]["sampling_steps"] == 1800
    api.interrupt()
    asking.join(120)
    assert found[0].images == []
    api.util_wait_for_ready(check_interval=0.1)


def test_lists_and_options(api: webuiapi.WebUIApi) -> None:
    """What its helpers ask for."""
    assert api.util_get_model_names() == ["demo"]
    api.util_set_model("demo")
    assert api.util_get_current_model() == "demo"
    assert {"Euler a", "DPM++ 2M", "UniPC"} <= set(api.util_get_sampler_names())
    assert "karras" in api.util_get_scheduler_names()
    assert [upscaler["name"] for upscaler in api.get_upscalers()] == ["None"]
    assert "<lime>" in api.get_embeddings()["loaded"]
    for listed in (api.get_sd_vae, api.get_hypernetworks, api.get_face_restorers, api.get_prompt_styles):
        assert listed() == []
    api.refresh_checkpoints()
    assert "controlnet" in api.get_scripts()["txt2img"]


def test_what_cannot_be_done_is_said(api: webuiapi.WebUIApi, gateway: Gateway) -> None:
    """Instead of another image than the one asked for."""
    for options, said in (
        ({"enable_hr": True}, "enable_hr=True: is not available here"),
        ({"sampler_name": "DPM adaptive"}, "sampler_name='DPM adaptive'"),
        ({"scheduler": "exponential"}, "scheduler='exponential'"),
        ({"subseed_strength": 0.5}, "variation seeds"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, "{'CLIP_stop_at_last_layers': 2}: is not available"),
        ({"override_settings": {"sd_vae": "anime.pt"}}, "{'sd_vae': 'anime.pt'}: is not available"),
        ({"override_settings": {"sd_model_checkpoint": "v1-5"}}, "use one of: demo"),
        ({"width": 131}, "width=131"),
    ):
        with pytest.raises(RuntimeError) as refused:
            api.txt2img(prompt="x", alwayson_scripts={}, **{**SIZE, **options})
        status, body = refused.value.args
        assert (status, said in json.loads(body)["detail"]) == (400, True)
    with pytest.raises(RuntimeError, match=r"refiner_checkpoint=.*xl-refiner.* is not available here"):
        api.post_and_get_api_result(
            f"{api.baseurl}/txt2img", {"prompt": "x", "refiner_checkpoint": "xl-refiner"}, use_async=False
        )
    answer = requests.post(f"{gateway.url}/sdapi/v1/txt2img", json={"prompt": "x"}, timeout=10)
    assert answer.status_code == 401
