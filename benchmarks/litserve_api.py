"""What LitServe serves for `baselines.py`: a module of its own, because LitServe sends the class to another process."""

from __future__ import annotations

from typing import Any

import litserve
from workload import BATCH, WARM_UP, Plain, Wanted


class Api(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(**options)
        self.model = model

    def setup(self, device: str) -> None:
        self.plain = Plain(self.model, device=device)
        self.plain.one(WARM_UP)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe evaluates an annotation here
        return Wanted(**request)

    def predict(self, x: Any) -> list[int]:
        batch = x if isinstance(x, list) else [x]
        self.plain.many(batch, size=BATCH)
        return [each.seed for each in batch]

    def batch(self, inputs: list[Wanted]) -> list[Wanted]:
        return inputs

    def unbatch(self, output: list[int]) -> list[int]:
        return output

    def encode_response(self, output: int) -> dict[str, int]:
        return {"seed": output}
