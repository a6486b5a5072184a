"""The layouts in which repositories are published: variants, shards, parts that are not used, the hub's answers."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from calotype_shared.errors import ModelLoadError
from calotype_worker.models import Adapters, load_model
from calotype_worker.models import hub as hub_module
from tests.ldm_layout import ldm_controlnet_key
from tests.models import tiny_pipeline, write_tiny_controlnet, write_tiny_sd
from tests.unit.published import apart, draw

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("layouts") / "tiny")


@pytest.fixture(scope="module")
def expected(whole: Path) -> Any:
    return draw(load_model("m", source=str(whole)))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def as_variant(folder: Path, *parts: str, variant: str = "fp16") -> None:
    for part in parts:
        for file in (folder / part).glob("*.safetensors"):
            file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))


# ---- variants and shards


def test_the_variant_that_is_there_is_loaded_by_part(folder: Path, expected: Any) -> None:
    """Most repositories have only `*.fp16.safetensors`, or that of some parts."""
    as_variant(folder, "unet")
    assert apart(draw(load_model("m", source=str(folder))), expected) == 0
    as_variant(folder, "vae", "text_encoder")
    assert apart(draw(load_model("m", source=str(folder))), expected) == 0


def test_a_variant_can_be_chosen(folder: Path, expected: Any) -> None:
    """Of two, the one without a name is loaded, unless the other is asked for."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    other = tiny_pipeline(seed=7).unet
    other.save_pretrained(folder / "unet", variant="fp16", safe_serialization=True)
    assert file.is_file()
    plain, chosen = load_model("m", source=str(folder)), load_model("m", source=str(folder), variant="fp16")
    assert apart(draw(plain), expected) == 0
    assert apart(draw(chosen), expected) > 12
    assert plain.card.version != chosen.card.version


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_read_by_their_index(variant: str | None, folder: Path, expected: Any) -> None:
    """A missing shard, or an index that is gone, is named."""
    pipeline = tiny_pipeline()
    for part in ("unet", "text_encoder"):
        next((folder / part).glob("*.safetensors")).unlink()
        getattr(pipeline, part).save_pretrained(
            folder / part, max_shard_size="300KB", variant=variant, safe_serialization=True
        )
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    assert apart(draw(load_model("m", source=str(folder))), expected) == 0
    shards[0].rename(folder / "away")
    with pytest.raises(ModelLoadError, match=rf"'m': unet/ lacks {shards[0].name}, which .* names"):
        load_model("m", source=str(folder))
    next((folder / "unet").glob("*.index*.json")).unlink()
    with pytest.raises(ModelLoadError, match=r"unet/ should hold safetensors weights but holds only .* no index"):
        load_model("m", source=str(folder))


# ---- parts


def test_only_the_parts_of_the_index_count(folder: Path, expected: Any) -> None:
    """ONNX exports, a safety checker without weights and other sub-folders are no reason to refuse a model."""
    for name in ("vae_encoder", "safety_checker", "image_encoder"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        (folder / name / "model.onnx").write_bytes(b"")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert apart(draw(load_model("m", source=str(folder))), expected) == 0


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), r"names the part 'vae', and there is no vae/"),
        (
            lambda folder: next((folder / "vae").glob("*.safetensors")).rename(folder / "vae" / "model.bin"),
            "vae/ should hold safetensors weights but holds only a pickle",
        ),
        (
            lambda folder: next((folder / "unet").glob("*.safetensors")).write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
            ),
            "diffusion_pytorch_model.safetensors' is not a safetensors file; download it again",
        ),
        (
            lambda folder: (folder / "model_index.json").write_text(
                (folder / "model_index.json").read_text().replace("UNet2DConditionModel", "FutureModel")
            ),
            "class 'FutureModel' of unet/ is not in diffusers",
        ),
    ],
)
def test_an_incomplete_folder_is_refused(break_it: Callable[[Path], object], said: str, folder: Path) -> None:
    break_it(folder)
    with pytest.raises(ModelLoadError, match=rf"'m': .*{said}"):
        load_model("m", source=str(folder))


# ---- versions


def test_a_version_is_that_of_what_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files beside the parts change nothing and are not read; what was hashed once is not hashed again."""
    hashed: list[str] = []
    digest = hashlib.file_digest

    def counted(file: Any, kind: Any) -> Any:
        hashed.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    first = load_model("m", source=str(folder)).card.version
    assert hashed
    assert first.startswith("sha256:")
    hashed.clear()
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "v1-5-pruned.safetensors")
    shutil.copy(
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        folder / "unet" / "diffusion_pytorch_model.fp16.safetensors",
    )
    assert load_model("m", source=str(folder)).card.version == first
    assert hashed == []
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("epsilon", "v_prediction"))
    assert load_model("m", source=str(folder)).card.version != first
    assert hashed == ["scheduler_config.json"]


# ---- the hub


class Hub(http.server.ThreadingHTTPServer):
    """The parts of the hub's protocol that a download needs, over a folder `owner/name`."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.status = 200
        self.code = ""
        self.sent: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if self.server.status != 200:
            return self._send(self.server.status, b"{}", {"X-Error-Code": self.server.code}, body=body)
        if path.startswith("/api/models/owner/tiny"):
            if "revision" in path and path.rpartition("/")[2] not in ("main", "v1", COMMIT):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
            names = [
                file.relative_to(self.server.root).as_posix() for file in self.server.root.rglob("*") if file.is_file()
            ]
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": own, "size": (self.server.root / own).stat().st_size, "oid": "0"}
                    for own in names
                ]
                return self._send(200, json.dumps(tree).encode(), {}, body=body)
            info = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": own} for own in names]}
            return self._send(200, json.dumps(info).encode(), {}, body=body)
        start = f"/owner/tiny/resolve/{COMMIT}/"
        if path.startswith(start) and (self.server.root / path.removeprefix(start)).is_file():
            data = (self.server.root / path.removeprefix(start)).read_bytes()
            if body:
                self.server.sent.append(path.removeprefix(start))
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self._send(200, data, headers, body=body)
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the repository owner/tiny, and an empty cache."""
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    point_at(server.url, tmp_path / "hub-cache", monkeypatch)
    yield server
    server.shutdown()
    server.server_close()


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_hub_repository_is_loaded_by_revision(
    hub: Hub, folder: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is loaded is downloaded; the commit is the card's version; afterwards no hub is needed."""
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "v1-5-pruned.safetensors")
    as_variant(folder, "unet", "vae")
    model = load_model("m", source="owner/tiny@v1")
    assert apart(draw(model), expected) == 0
    assert model.card.version == f"owner/tiny@{COMMIT[:12]}"
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.sent
    assert "v1-5-pruned.safetensors" not in hub.sent
    hub.sent.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_model("m", source=f"owner/tiny@{COMMIT}").card.version == model.card.version
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.status = 503
    assert load_model("m", source=f"owner/tiny@{COMMIT}").card.version == model.card.version
    assert not hub.sent


def test_the_class_is_read_before_the_weights(hub: Hub, folder: Path) -> None:
    """An unsupported class costs no download."""
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FuturePipeline"))
    with pytest.raises(ModelLoadError, match="pipeline class 'FuturePipeline' is not in diffusers"):
        load_model("m", source="owner/tiny")
    assert not [name for name in hub.sent if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("source", "status", "code", "said"),
    [
        ("owner/none", 404, "RepoNotFound", "owner/none is neither a folder here nor a repository on the hub"),
        ("owner/tiny@nope", 200, "", "owner/tiny@nope: the repository has no such revision"),
        ("owner/tiny", 403, "GatedRepo", "owner/tiny is gated on the hub: accept its conditions.*HF_TOKEN"),
        ("owner/tiny", 500, "", "nor in the hub's cache, and the hub answered: .*500"),
        ("./models/none", 200, "", r"folder './models/none' does not exist"),
        ("~/no-such-model", 200, "", r"folder '~/no-such-model' does not exist"),
    ],
)
def test_the_hubs_answers_are_said(source: str, status: int, code: str, said: str, hub: Hub) -> None:
    hub.status, hub.code = status, code
    with pytest.raises(ModelLoadError, match=rf"'m': .*{said}"):
        load_model("m", source=source)


def test_a_hub_out_of_reach_is_said_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No route, and a hub that accepts and never answers."""
    monkeypatch.setattr(hub_module, "TIMEOUT_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        point_at(f"http://127.0.0.1:{port}", tmp_path / "hub-cache", monkeypatch)
        with pytest.raises(ModelLoadError, match=r"owner/tiny is neither .* and the hub did not answer in time"):
            load_model("m", source="owner/tiny")
    with pytest.raises(ModelLoadError, match="and the hub is not within reach"):
        load_model("m", source="owner/tiny")


def test_a_tilde_is_the_home(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(whole.parent))
    assert load_model("m", source=f"~/{whole.name}").card.version.startswith("sha256:")


# ---- ControlNets


def controlled(model: Any) -> Any:
    from calotype_worker.request import ControlInput
    from tests.models import sample_image

    return draw(model, controls=(ControlInput(name="lines", image=sample_image(3), scale=1.0),))


def with_control(folder: Path, source: Path) -> Any:
    return load_model("m", source=str(folder), adapters=Adapters(controls={"lines": str(source)}))


def test_a_controlnet_in_one_file_or_with_a_variant_is_that_of_the_folder(whole: Path, tmp_path: Path) -> None:
    """In diffusers' names and in those of the original code; the config is made from the U-Net."""
    from safetensors.torch import load_file, save_file

    source = write_tiny_controlnet(tmp_path / "lines", seed=21)
    expected = controlled(with_control(whole, source))
    file = source / "diffusion_pytorch_model.safetensors"
    single = Path(shutil.copy(file, tmp_path / "lines.safetensors"))
    assert apart(controlled(with_control(whole, single)), expected) <= 1
    file.rename(source / "diffusion_pytorch_model.fp16.safetensors")
    assert apart(controlled(with_control(whole, source)), expected) <= 1
    ldm = {f"control_model.{ldm_controlnet_key(key)}": value for key, value in load_file(single).items()}
    save_file(ldm, single)
    assert apart(controlled(with_control(whole, single)), expected) <= 1


def test_other_kinds_of_controlnets_are_refused_by_name(whole: Path, tmp_path: Path) -> None:
    """When the model is loaded: a union, another depth, a pooled one, a lost or foreign tensor."""
    from safetensors.torch import load_file, save_file

    source = write_tiny_controlnet(tmp_path / "lines", seed=21)
    config, file = source / "config.json", source / "diffusion_pytorch_model.safetensors"
    written, weights = json.loads(config.read_text()), load_file(file)
    for change, said in (
        ({"_class_name": "ControlNetUnionModel"}, "is a ControlNetUnionModel, which is not supported"),
        ({"layers_per_block": 2}, "lacks|could not be loaded: .*controlnet_down_blocks.3.bias"),
        ({"cross_attention_dim": 48}, "cross_attention_dim|other shapes|could not be loaded"),
        ({"global_pool_conditions": True}, "pools its residuals"),
    ):
        config.write_text(json.dumps(written | change))
        with pytest.raises(ModelLoadError, match=rf"ControlNet 'lines'.*({said})"):
            with_control(whole, source)
    config.write_text("{")
    with pytest.raises(ModelLoadError, match=r"ControlNet 'lines'.*config.json' is not a JSON object"):
        with_control(whole, source)
    deep = tiny_pipeline(layers_per_block=2)
    from diffusers import ControlNetModel

    ControlNetModel.from_unet(deep.unet, conditioning_embedding_out_channels=(8, 8, 16, 16)).save_pretrained(source)
    with pytest.raises(ModelLoadError, match=r"layers per block 2, the model has 1 \(layers_per_block\)"):
        with_control(whole, source)
    single = tmp_path / "other.safetensors"
    for state, said in (
        (weights | {"task_embedding": torch.zeros(6, 32)}, "is a ControlNetUnion"),
        ({"lllite_unet_x.down.0.weight": torch.zeros(2)}, "is a ControlNet-LLLite"),
        ({"adapter.body.0.in_conv.weight": torch.zeros(2)}, "is a T2I-Adapter"),
        ({"ip_adapter.1.to_k_ip.weight": torch.zeros(2)}, "is an IP-Adapter"),
        ({"double_blocks.0.img_attn.proj.weight": torch.zeros(2)}, "is a ControlNet for Flux"),
        (weights | {"extra.weight": torch.zeros(2)}, "holds more than its layers: extra.weight"),
        ({key: value for key, value in weights.items() if key != "conv_in.bias"}, "lacks conv_in.bias"),
    ):
        save_file(state, single)
        with pytest.raises(ModelLoadError, match=rf"ControlNet 'lines': 'other.safetensors' .*{said}"):
            with_control(whole, single)
    with pytest.raises(ModelLoadError, match=r"ControlNet 'lines': .*does not exist"):
        with_control(whole, tmp_path / "nowhere")


def test_a_controlnet_of_the_hub_is_that_of_the_folder(hub: Hub, whole: Path, tmp_path: Path) -> None:
    hub.root = write_tiny_controlnet(tmp_path / "lines", seed=21)
    expected = controlled(with_control(whole, hub.root))
    model = load_model("m", source=str(whole), adapters=Adapters(controls={"lines": "owner/tiny@v1"}))
    assert apart(controlled(model), expected) == 0
