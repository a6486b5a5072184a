"""What a fuzzer throws: values of every wrong kind, and bytes that were almost right."""

from __future__ import annotations

import io
import json
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from calotype_shared.queue.message import message
from calotype_shared.schema.config import GenerationConfig

GOOD: dict[str, Any] = {
    "prompt": "a cat",
    "model": "tiny",
    "seed": 1,
    "num_inference_steps": 2,
    "width": 64,
    "height": 64,
    "guidance_scale": 4.0,
    "sampler": "ddim",
    "num_images": 1,
}

HUGE = b'{"prompt": "a cat", "seed": ' + b"9" * 5000 + b"}"  # more digits than Python reads

# Text with what breaks programs: NUL, lone surrogates, control characters, astral planes, very long, format strings.
texts = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(categories=["Cs", "Cc", "Cf", "Co"]), max_size=8),
    st.sampled_from(["", "\x00", "\ud800", "A" * 100_000, "%s%n{0}${7*7}", "../../etc/passwd", "file:///etc/passwd"]),
)
numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 2**63, -1, 0, 1e308, float("nan"), float("inf"), 64.5, True]),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
junk = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
nested = st.integers(1, 3).map(lambda power: json.loads("[" * 10**power + "]" * 10**power) if power < 3 else [[[]]])


@st.composite
def configs(draw: st.DrawFn) -> dict[Any, Any]:
    """A good config with one to three fields of it, or fields there are not, replaced."""
    names = st.one_of(st.sampled_from(sorted(GenerationConfig.model_fields)), texts)
    wrong = draw(st.dictionaries(names, st.one_of(junk, nested), min_size=1, max_size=3))
    return {**GOOD, **wrong}


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut, flipped, repeated, with something put in, in one to four places."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        what = draw(st.sampled_from(["cut", "flip", "drop", "repeat", "insert", "number"]))
        if what == "cut":
            del found[at:]
        elif what == "flip" and found:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "drop":
            del found[at : at + draw(st.integers(1, 16))]
        elif what == "repeat":
            found[at:at] = found[at : at + 16] * draw(st.integers(1, 8))
        elif what == "insert":
            found[at:at] = draw(st.binary(max_size=8))
        else:
            found[at : at + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"]))
    return bytes(found)


def dump(value: Any) -> bytes:
    """As JSON, as far as it can be."""
    return json.dumps(value).encode()


def lines(number: int) -> st.SearchStrategy[bytes]:
    """A line of a manifest that is probably wrong. No newlines: it is one line."""
    start = dump({"custom_id": f"bad-{number}", **GOOD, "seed": number})
    wrong = st.one_of(mutated(start), configs().map(dump), st.binary(max_size=60), junk.map(dump), st.just(HUGE))
    return wrong.map(lambda line: line.replace(b"\n", b"").replace(b"\r", b"") or b"{")


def image_files() -> list[bytes]:
    """Good images of every format that may be sent, and of some that may not."""
    found = []
    image = Image.radial_gradient("L").resize((48, 40)).convert("RGB")
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        found.append(buffer.getvalue())
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    return [*found, svg, b"GIF89a" + b"\x00" * 64, b"%PDF-1.4", b"PK\x03\x04"]


uploads = st.one_of(st.sampled_from(image_files()).flatmap(mutated), st.binary(max_size=200))


@st.composite
def messages(draw: st.DrawFn, queue: str) -> bytes:
    """Something in a queue's list that Celery never put there."""
    good = message("fuzz-1", queue)
    kind = draw(st.sampled_from(["bytes", "mutated", "json", "fields", "body"]))
    if kind == "bytes":
        return draw(st.binary(max_size=80))
    if kind == "mutated":
        return draw(mutated(good.encode()))
    if kind == "json":
        return dump(draw(junk))
    envelope = json.loads(good)
    if kind == "body":
        envelope["body"] = draw(st.one_of(junk, junk.map(json.dumps)))
        return dump(envelope)
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from(["", "headers", "properties"]))
        target = envelope.get(part, envelope)
        if not isinstance(target, dict) or not target:
            continue
        name = draw(st.one_of(st.sampled_from(sorted(target)), texts))
        if draw(st.booleans()):
            target.pop(name, None)
        else:
            pickles = st.sampled_from(["application/x-python-serialize", "pickle", "application/data", "binary"])
            target[name] = draw(st.one_of(junk, pickles))
    return dump(envelope)
