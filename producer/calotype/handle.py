"""`JobHandle`: one job, as the code that submitted it holds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from calotype_shared.schema.enums import JobState
from calotype_shared.schema.jobs import JobRecord, Preview

if TYPE_CHECKING:
    from calotype.client import Client
    from calotype.job_image import JobImage


class JobHandle:
    """A job's id with the client's verbs on it. Holds no state: every answer is fresh from Redis."""

    __slots__ = ("_client", "id")

    def __init__(self, client: Client, job_id: str) -> None:
        self._client = client
        self.id = job_id

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"

    def status(self) -> JobRecord:
        return self._client.status(self.id)

    @property
    def progress(self) -> float:
        """Done share, 0 to 1."""
        return self.status().progress

    def wait(self, timeout: float | None = None) -> JobRecord:
        """Wait until the job has succeeded. Raises JobFailed, JobCancelled, WaitTimeout, JobNotFound."""
        return self._client.wait(self.id, timeout)

    def get(self, timeout: float | None = None) -> list[JobImage]:
        """Wait, then download the images. Raises as `wait`."""
        self.wait(timeout)
        return self._client.images(self.id)

    def images(self, timeout: float | None = None) -> list[JobImage]:
        """The same as `get`."""
        return self.get(timeout)

    def urls(self, timeout: float | None = None) -> list[str]:
        """Wait, then make links to the images that work without keys for a while."""
        self.wait(timeout)
        return self._client.urls(self.id)

    def iter_events(self, timeout: float | None = None) -> Iterator[JobRecord]:
        """The job's record now and whenever it changes, the final one last. Never raises for a failed job."""
        return self._client.follow([self.id], timeout=timeout)

    def iter_previews(self, timeout: float | None = None) -> Iterator[Preview]:
        """Each new preview while it runs, if it was submitted with `preview_every`."""
        return self._client.follow_previews(self.id, timeout=timeout)

    def cancel(self) -> JobState:
        return self._client.cancel(self.id)
