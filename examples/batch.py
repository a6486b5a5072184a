"""A batch: a file of jobs, submitted at once, followed as one thing, its results read as they come.

Needs a running `calotype up`, whose gateway leads batches; elsewhere `calotype dispatcher` does. Writes out/batch.png.
"""

import io
import json
from pathlib import Path

from PIL import Image
from sheet import save_sheet

from calotype import Client
from calotype_shared.storage.s3 import Storage

Path("out").mkdir(exist_ok=True)
manifest = Path("out/batch.jsonl")
lines = [
    {"custom_id": color, "prompt": f"a large {color} circle on a white background", "num_inference_steps": 12}
    for color in ("red", "blue", "green")
]
lines.append(
    {"custom_id": "odd", "prompt": "a red circle", "width": 100}
)  # reported by line number; the others are not affected
manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))

with Client() as client:
    batch = client.batches.submit(manifest, metadata={"campaign": "spring"}, idempotency_key="spring-1")
    record = batch.wait(timeout=120)
    print(f"{record.state}: {record.counts.succeeded} of {record.counts.total} lines")
    for error in batch.errors():
        print(f"{error['custom_id']}: {error['error']['message']}")
    storage = Storage(client.settings)
    made = {result["custom_id"]: storage.get(result["images"][0]["key"]) for result in batch.results()}
    names = [line["custom_id"] for line in lines if line["custom_id"] in made]  # results come as the jobs end
    save_sheet("batch", [(Image.open(io.BytesIO(made[name])), name) for name in names])
