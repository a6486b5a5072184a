"""What must never be said: a real worker and a real gateway at log level debug, while all sorts of things go wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx2
import pytest

from calotype.api_keys import ApiKeys, Scope
from calotype.embedded.ports import free_ports
from calotype_shared.queue.connection import connect_redis
from calotype_shared.settings import Settings
from tests.faults.fuzzing import image_files
from tests.faults.harness import Site, until
from tests.faults.proxy import Proxy

WEBHOOK_SECRET = "s3cr3t-of-the-webhooks-0123456789abcdef"
PROMPT, NEGATIVE = "a zebra juggling marzipan", "no periwinkle anvils"
METADATA = "customer-quixotic-77"


@pytest.fixture
def gateway_url(own_site: Site) -> Iterator[str]:
    """A `calotype gateway` process with keys, its output in a file."""
    [port] = free_ports(1)
    log = own_site.folder / "gateway.log"
    command = [sys.executable, "-m", "calotype", "gateway", "--port", str(port), "--auth", "keys"]
    environment = {**own_site.environment(), "CALOTYPE_GATEWAY_LOG_LEVEL": "debug"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    until(lambda: process.poll() is not None or _answers(url), 60, why=log.read_text)
    yield url
    process.terminate()
    process.wait(120)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz").status_code == 200
    except httpx2.HTTPError:
        return False


@pytest.fixture
def proxy(corner: Callable[..., Settings]) -> Iterator[Proxy]:
    with Proxy.before(str(corner().s3_endpoint_url)) as proxy:
        yield proxy


@pytest.fixture
def own_site(corner: Callable[..., Settings], make_site: Callable[..., Site], proxy: Proxy) -> Site:
    settings = corner(webhook_secret=WEBHOOK_SECRET, webhook_allow_private=True)
    behind = settings.model_copy(update={"s3_endpoint_url": proxy.url(str(settings.s3_endpoint_url))})
    return make_site(settings, worker_settings=behind)


def test_no_log_and_no_answer_holds_a_secret_or_a_prompt(own_site: Site, gateway_url: str, proxy: Proxy) -> None:
    site, settings = own_site, own_site.settings
    worker = site.start_worker(stop="cursed", CALOTYPE_WORKER_LOG_LEVEL="debug")
    with connect_redis(settings) as redis:
        token, key = ApiKeys(redis, key_prefix=settings.key_prefix).create(name="zoo", tenant="zoo", scopes=list(Scope))
    http = httpx2.Client(base_url=gateway_url, headers={"Authorization": f"Bearer {token}"}, timeout=60)
    asked = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "model": "tiny", "num_inference_steps": 2, "seed": 1,
        "metadata": {"who": METADATA}, "preview_every": 1, "webhook_url": f"{gateway_url}/hidden-path-of-the-hook",
    }  # fmt: skip
    answers = []

    def ask(method: str, path: str, **options: object) -> httpx2.Response:
        answer = http.request(method, path, **options)  # type: ignore[arg-type]
        answers.append(answer)
        return answer

    upload = ask("POST", "/v1/uploads", content=image_files()[0], headers={"Content-Type": "image/png"})
    good = ask("POST", "/v1/jobs", json={**asked, "init_image": upload.json()["id"]}).json()["id"]
    failing = ask("POST", "/v1/jobs", json={**asked, "seed": 2, "prompt": f"{PROMPT} cursed"}).json()["id"]
    ask("POST", "/v1/jobs", json={**asked, "seed": 3, "width": 63})
    ask("POST", "/v1/images/generations", json={"prompt": PROMPT, "model": "tiny", "size": "64x64"})
    ask("POST", "/sdapi/v1/txt2img", json={"prompt": PROMPT, "steps": "many"})
    ask("GET", "/v1/jobs", headers={"Authorization": f"Bearer {token[:-3]}xyz"})
    ask("GET", f"/v1/jobs?api_key={token}&after=%00")
    site.wait([good, failing])
    proxy.set("forbidden")
    stuck = ask("POST", "/v1/jobs", json={**asked, "seed": 4}).json()["id"]
    until(lambda: "AccessDenied" in worker.text() or "403" in worker.text())
    proxy.set("pass")
    site.wait([stuck])
    ask("POST", f"/v1/jobs/{stuck}/cancel")

    s3_secret = settings.s3_secret_access_key
    assert s3_secret is not None
    secrets = {"S3 secret": s3_secret.get_secret_value(), "webhook secret": WEBHOOK_SECRET, "API key": token,
               "signature": "X-Amz-Signature"}  # fmt: skip
    words = {
        "prompt": "marzipan",
        "negative prompt": "periwinkle",
        "metadata": METADATA,
        "hook": "hidden-path-of-the-hook",
    }
    logs = {"worker": worker.text(), "gateway": (site.folder / "gateway.log").read_text()}
    for where, text in logs.items():
        assert len(text) > 150, f"the {where} has logged next to nothing"
        for what, value in {**secrets, **words}.items():
            line = next((line for line in text.splitlines() if value in line), "")
            assert not line, f"the {where}'s log holds the {what}: {line[:400]}"
    with connect_redis(settings) as redis:
        names = [str(name) for name in redis.scan_iter(f"{settings.key_prefix}*")]
    assert not [n for n in names if any(v in n for v in (*secrets.values(), "marzipan"))]
    refused = [answer.text for answer in answers if answer.status_code >= 400]
    assert len(refused) >= 4
    assert not [text for text in refused if any(value in text for value in secrets.values())]
    assert key.id in token


def test_another_tenants_key_finds_nothing_on_any_route(own_site: Site, gateway_url: str) -> None:
    """Every route of the schema that names something, and every list."""
    site, settings = own_site, own_site.settings
    site.start_worker()
    with connect_redis(settings) as redis:
        keys = ApiKeys(redis, key_prefix=settings.key_prefix)
        tokens = {name: keys.create(name=name, tenant=name, scopes=list(Scope))[0] for name in ("owner", "stranger")}
    owner, stranger = (
        httpx2.Client(base_url=gateway_url, headers={"Authorization": f"Bearer {token}"}, timeout=60)
        for token in tokens.values()
    )
    job = owner.post("/v1/jobs", json={"prompt": PROMPT, "model": "tiny", "seed": 1}).json()["id"]
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/images/generations",
        "body": {"prompt": PROMPT, "model": "tiny"},
    }
    data = json.dumps(line).encode()
    file = owner.post("/v1/files", files={"file": ("b.jsonl", data)}, data={"purpose": "batch"}).json()["id"]
    body = {"input_file_id": file, "endpoint": "/v1/images/generations", "completion_window": "24h"}
    batch = owner.post("/v1/batches", json=body).json()["id"]
    site.wait([job])
    until(lambda: owner.get(f"/v1/batches/{batch}").json()["status"] == "completed")
    known = {
        "job_id": job,
        "file_id": file,
        "batch_id": batch,
        "index": "0",
        "model": "tiny",
        "model_id": "tiny",
        "verb": "pause",
    }
    tried, found = [], []
    listed: set[str] = set()  # what its owner sees in lists
    for path, methods in owner.get("/openapi.json").json()["paths"].items():
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        assert set(names) <= set(known), f"{path} has a parameter that this test does not know"
        for method in methods:
            if set(names) & {"job_id", "file_id", "batch_id"}:
                url = path.format(**known)
                answer = stranger.request(method.upper(), url, json={})
                tried.append(f"{method} {path}")
                if answer.status_code != 404:
                    found.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
            elif method == "get" and not names:
                text, own = stranger.get(path).text, owner.get(path).text
                listed |= {secret for secret in (job, file, batch, "marzipan") if secret in own}
                tried.append(f"{method} {path}")
                found += [
                    f"{method} {path} shows {secret}" for secret in (job, file, batch, "marzipan") if secret in text
                ]
    assert not found, "\n".join(found)
    assert len(tried) >= 20
    assert listed == {job, file, batch, "marzipan"}, "lists that show nothing to their owner either"
    assert owner.get(f"/v1/jobs/{job}").json()["state"] == "succeeded", "a stranger changed it"
    assert owner.get(f"/v1/files/{file}").status_code == 200
