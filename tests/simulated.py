"""A worker whose model step is simulated, and which stores nothing: for tests of many jobs."""

from __future__ import annotations

from calotype import GenerationFailed
from calotype.testing import JobContext, ScriptedWorker
from calotype_shared.queue.job_store import Claim
from calotype_shared.schema.enums import Lane
from calotype_shared.schema.jobs import ImageRef
from calotype_shared.settings import Settings


def image_of(claim: Claim) -> ImageRef:
    config = claim.config
    return ImageRef(
        key=f"{claim.folder}/0.png",
        seed=config.seed,
        width=config.width,
        height=config.height,
        content_type="image/png",
        bytes=1,
        sha256="0" * 64,
    )


class SimulatedWorker(ScriptedWorker):
    """Works on one queue until the block ends. A job whose prompt is "fail" fails."""

    def __init__(self, settings: Settings, queue: str = "demo.bulk", *, limit: float = float("inf")) -> None:
        from tests.integration.test_fair_share import CARD

        model, _, lane = queue.rpartition(".")
        card = CARD.model_copy(update={"name": model})
        options = {"script": fail_as_asked, "store_images": False, "limit": limit, "name": f"simulated-{lane}"}
        super().__init__(settings, [card], lanes=[Lane(lane)], **options)  # type: ignore[arg-type]


def fail_as_asked(context: JobContext) -> None:
    if context.config.prompt == "fail":
        raise GenerationFailed("as asked")
