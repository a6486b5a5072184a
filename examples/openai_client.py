"""OpenAI's client against the gateway: only the address changes. Our own parameters go into `extra_body`.

Needs a running `calotype up` and `pip install openai`; OPENAI_BASE_URL for a gateway elsewhere.
Writes out/openai_client.png.
"""

import base64
import io
import os

from openai import OpenAI
from PIL import Image
from sheet import save_sheet

client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none on loopback")
images = []
for color in ("red", "green"):
    answer = client.images.generate(
        model="demo",
        prompt=f"a large {color} heart on a white background",
        size="128x128",
        extra_body={"num_inference_steps": 15, "guidance_scale": 5, "sampler": "euler", "seed": 7},
    )
    [made] = answer.data or []
    images.append((Image.open(io.BytesIO(base64.b64decode(made.b64_json or ""))), color))
save_sheet("openai_client", images)
