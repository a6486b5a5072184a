"""Submitted jobs: `Jobs`, the client's methods that take an id or handle; and `JobHandle`, one job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

from calotype.connections import Connections
from calotype.handle import AnyJobHandle, JobRef, ids_of, one_id
from calotype.job_image import JobImage
from calotype.waiter import JobWaiter
from calotype_shared.errors import InvalidRequest, JobCancelled, JobFailed, JobNotFound
from calotype_shared.schema.enums import JobState
from calotype_shared.schema.jobs import JobRecord, Preview


class Jobs:
    """The part of `Client` for existing jobs."""

    def __init__(self, connections: Connections, *, on_warning: Callable[[str], None]) -> None:
        self.settings = connections.settings
        self._redis = connections.redis
        self._store = connections.store
        self._storage = connections.storage
        self._clock = connections.clock
        self.job_changes = connections.job_changes
        self.waiter = JobWaiter(connections.store, on_warning=on_warning, clock=connections.clock)

    def job(self, job_id: str) -> JobHandle:
        """A handle of the job, without a round trip: a missing job raises an error at the first use."""
        return JobHandle(self, job_id)

    def status(self, job: JobRef) -> JobRecord:
        """The job as it is now. Raises JobNotFound."""
        return self._store.get(one_id(job, AnyJobHandle))

    def follow(self, jobs: JobRef | Iterable[JobRef], *, timeout: float | None = None) -> Iterator[JobRecord]:
        """Yield each job's record now and whenever it has changed, until all are final.

        Raises:
            JobNotFound: a job has no record.
            WaitTimeout: after `timeout` seconds; the jobs go on.
        """
        return self._follow(ids_of(jobs, AnyJobHandle)[0], timeout)

    def _follow(self, ids: Sequence[str], timeout: float | None) -> Iterator[JobRecord]:
        waiting = self.waiter.begin(ids, timeout=timeout)
        with self.job_changes.watch() as watch:
            while True:
                yield from self.waiter.look(waiting)
                if waiting.done:
                    return
                watch.set_jobs(waiting.subscribed_ids)
                watch.wait(self.waiter.pause(waiting, live=watch.live), at_least=waiting.min_interval)

    @overload
    def wait(self, jobs: JobRef, timeout: float | None = None, *, check: bool = True) -> JobRecord: ...  # type: ignore[overload-overlap]
    @overload
    def wait(self, jobs: Iterable[JobRef], timeout: float | None = None, *, check: bool = True) -> list[JobRecord]: ...
    def wait(
        self, jobs: JobRef | Iterable[JobRef], timeout: float | None = None, *, check: bool = True
    ) -> JobRecord | list[JobRecord]:
        """Wait until the job, or all of the jobs, are final; returns the record or records, in order.

        Raises:
            JobFailed, JobCancelled: for the first job that did not succeed, once all are final, unless `check=False`.
            JobNotFound, WaitTimeout: as `follow`.
        """
        ids, one = ids_of(jobs, AnyJobHandle)
        records = finals(ids, self._follow(ids, timeout), check=check)
        return records[0] if one else records

    @overload
    def cancel(self, jobs: JobRef) -> JobState: ...  # type: ignore[overload-overlap]
    @overload
    def cancel(self, jobs: Iterable[JobRef]) -> list[JobState]: ...
    def cancel(self, jobs: JobRef | Iterable[JobRef]) -> JobState | list[JobState]:
        """Cancel immediately and permanently. Returns `cancelled`, or the final state that was reached before.

        Raises:
            JobNotFound: a job has no record. The others are cancelled nevertheless.
        """
        ids, one = ids_of(jobs, AnyJobHandle)
        states, missing = [], None
        for job_id in ids:
            try:
                states.append(self._store.cancel(job_id))
            except JobNotFound as error:
                missing = missing or error
        if missing is not None:
            raise missing
        return states[0] if one else states

    @overload
    def images(self, jobs: JobRef) -> list[JobImage]: ...  # type: ignore[overload-overlap]
    @overload
    def images(self, jobs: Iterable[JobRef]) -> list[list[JobImage]]: ...
    def images(self, jobs: JobRef | Iterable[JobRef]) -> list[JobImage] | list[list[JobImage]]:
        """Download the images of a finished job; of many jobs, a list for each, in order.

        Raises:
            JobFailed, JobCancelled: the job has no images.
            InvalidRequest: the job is not finished yet.
        """
        ids, one = ids_of(jobs, AnyJobHandle)
        found = [self._images(self._succeeded(job_id)) for job_id in ids]
        return found[0] if one else found

    def _images(self, record: JobRecord) -> list[JobImage]:
        return [
            JobImage(job_id=record.id, index=index, ref=ref, data=self._storage.get(ref.key, sha256=ref.sha256))
            for index, ref in enumerate(record.images)
        ]

    def urls(self, job: JobRef, *, expires_seconds: int | None = None) -> list[str]:
        """Links to a finished job's images that work without keys, for a while. Raises as `images`."""
        seconds = expires_seconds or self.settings.url_expires_seconds
        record = self._succeeded(one_id(job, AnyJobHandle))
        return [self._storage.presigned_url(ref.key, expires_seconds=seconds) for ref in record.images]

    def previews(self, job: JobRef) -> list[Preview]:
        """The newest preview of each image of a running job that was submitted with `preview_every`."""
        return self._store.previews(one_id(job, AnyJobHandle))

    def follow_previews(self, job: JobRef, *, timeout: float | None = None) -> Iterator[Preview]:
        """Yield each new preview of a job's images until it is final. Some may be skipped: only the newest is kept.

        Raises:
            JobNotFound, WaitTimeout: as `follow`.
        """
        job_id = one_id(job, AnyJobHandle)
        return self._follow_previews(job_id, timeout)

    def _follow_previews(self, job_id: str, timeout: float | None) -> Iterator[Preview]:
        seen = SeenPreviews()
        for _ in self._follow([job_id], timeout):
            yield from seen.new(self._store.previews(job_id))

    def _succeeded(self, job_id: str) -> JobRecord:
        record = self._store.get(job_id)
        if not record.state.final:
            raise InvalidRequest(
                f"the job is still {record.state.value} and has no images yet",
                field="job_id",
                value=job_id,
                remedy="wait for it first",
            )
        require_success(record)
        return record


class JobHandle(AnyJobHandle[Jobs]):
    """A job's id with the client's verbs on it. Holds no state: every answer is fresh from Redis."""

    __slots__ = ()

    def status(self) -> JobRecord:
        """The job as it is now. Raises JobNotFound."""
        return self._client.status(self.id)

    def done(self) -> bool:
        """Whether the job is final, however it ended. Raises JobNotFound."""
        return self.status().state.final

    def wait(self, timeout: float | None = None, *, check: bool = True) -> JobRecord:
        """Wait until the job is final. Raises as `Client.wait`."""
        return self._client.wait(self.id, timeout, check=check)

    def result(self, timeout: float | None = None) -> list[JobImage]:
        """Wait until the job has succeeded, then download its images. Raises as `Client.wait` and `Client.images`."""
        self.wait(timeout)
        return self.images()

    def follow(self, *, timeout: float | None = None) -> Iterator[JobRecord]:
        """Yield the job's record now and whenever it changes, the final one last. Raises as `Client.follow`."""
        return self._client.follow(self.id, timeout=timeout)

    def cancel(self) -> JobState:
        """Cancel the job immediately. Raises JobNotFound."""
        return self._client.cancel(self.id)

    def images(self) -> list[JobImage]:
        """Download the images of the finished job. Raises as `Client.images`."""
        return self._client.images(self.id)

    def urls(self, *, expires_seconds: int | None = None) -> list[str]:
        """Links to the finished job's images that work without keys, for a while. Raises as `Client.images`."""
        return self._client.urls(self.id, expires_seconds=expires_seconds)

    def previews(self) -> list[Preview]:
        """The newest preview of each image while it runs, if it was submitted with `preview_every`."""
        return self._client.previews(self.id)

    def follow_previews(self, *, timeout: float | None = None) -> Iterator[Preview]:
        """Yield each new preview until it is final. Raises as `Client.follow`."""
        return self._client.follow_previews(self.id, timeout=timeout)


class SeenPreviews:
    """Which previews of one job have been shown. Owned by the loop that follows it."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, int]] = {}  # by image: attempt and step

    def new(self, previews: Iterable[Preview]) -> list[Preview]:
        """Those that have not been seen."""
        found = [p for p in previews if self._seen.get(p.index) != (p.attempt, p.step)]
        self._seen.update((preview.index, (preview.attempt, preview.step)) for preview in found)
        return found


def finals(ids: Sequence[str], followed: Iterable[JobRecord], *, check: bool) -> list[JobRecord]:
    """The final records of the jobs, in their order, out of all that a wait saw. Raises as `require_success`."""
    final = {record.id: record for record in followed if record.state.final}
    records = [final[job_id] for job_id in ids]
    if check:
        for record in records:
            require_success(record)
    return records


def require_success(record: JobRecord) -> None:
    """Raise JobFailed or JobCancelled unless the job succeeded."""
    if record.state is JobState.FAILED:
        error = record.error
        reason = f"{error.code}: {error.message}" if error else "no reason was recorded"
        raise JobFailed(f"job {record.id} failed after {record.attempt} attempt(s): {reason}")
    if record.state is JobState.CANCELLED:
        raise JobCancelled(f"job {record.id} was cancelled; submit it again if you want its images")
