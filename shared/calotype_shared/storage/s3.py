"""Images in S3-compatible storage. Any endpoint that boto3 can talk to will do.

Where objects are in the bucket: `layout.py`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from calotype_shared.backoff import delays
from calotype_shared.errors import StorageUnavailable
from calotype_shared.forking import reset_in_children
from calotype_shared.storage.s3_errors import BATCH_DELETION_REFUSED, error_code, is_transient, unavailable

if TYPE_CHECKING:
    from calotype_shared.settings import Settings

SAFE_SECONDS = 3_600.0  # younger objects may be about to be used, so no clean-up removes them
_BACKOFF_SECONDS = (0.4, 5.0)

P = ParamSpec("P")
R = TypeVar("R")


def _retried(method: Callable[Concatenate[Storage, P], R]) -> Callable[Concatenate[Storage, P], R]:
    """Retries a call on transient errors, and turns other errors into StorageUnavailable with a remedy."""

    @functools.wraps(method)
    def wrapped(self: Storage, *args: P.args, **kwargs: P.kwargs) -> R:
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - slow, and producers may not need it

        for attempt, pause in enumerate(delays(*_BACKOFF_SECONDS), start=1):
            try:
                return method(self, *args, **kwargs)
            except (BotoCoreError, ClientError) as error:
                if attempt == self._attempts or not is_transient(error):
                    raise self._unavailable(error) from error
                time.sleep(pause)
        raise AssertionError("unreachable")

    return wrapped  # type: ignore[return-value]  # mypy names the first argument, nothing else differs


class StoredObject(NamedTuple):
    """An object as it is listed. Times are the storage's, in seconds since the epoch."""

    key: str
    bytes: int
    modified: float


class UnfinishedUpload(NamedTuple):
    """A multipart upload that has not been completed."""

    key: str
    id: str
    begun: float


class Storage:
    """One bucket. Safe to share between threads and to use after a fork; connects at the first call."""

    def __init__(self, settings: Settings, *, attempts: int | None = None) -> None:
        """`attempts` per call before a transient error is raised. None: as many as the settings say."""
        self._settings = settings
        self._attempts = attempts or settings.s3_attempts
        self._bucket = settings.s3_bucket
        self.after_fork()
        reset_in_children(self)

    def after_fork(self) -> None:
        """Connections are by process: a child that used its parent's would read what the parent had asked for."""
        self._lock = threading.Lock()
        self._clients: dict[str | None, Any] = {}

    def check(self, *, create: bool = False) -> None:
        """Check that the bucket exists and can be used; with `create`, create it if it is missing.

        Raises:
            StorageUnavailable: unreachable, refused, or the bucket does not exist; with the remedy.
        """
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

        client = self._client()
        try:
            try:
                client.head_bucket(Bucket=self._bucket)
            except ClientError as error:
                if error_code(error) not in ("404", "NoSuchBucket") or not create:
                    raise
                client.create_bucket(Bucket=self._bucket, **self._location())
        except (BotoCoreError, ClientError) as error:
            if error_code(error) in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                return  # another worker was faster
            raise self._unavailable(error) from error

    @_retried
    def put(self, key: str, data: bytes, content_type: str) -> None:
        self._client().put_object(Bucket=self._bucket, Key=key, Body=data, ContentType=content_type)

    def get(self, key: str, *, sha256: str | None = None) -> bytes:
        """An object's bytes. Give `sha256` (hex) wherever it is known: no other check is made of what arrives.

        Raises:
            ObjectMissing: it does not exist.
            StorageUnavailable: the bytes are not those that `sha256` names, or storage cannot be used.
        """
        data = self._get(key)
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise StorageUnavailable(
                f"object {key!r} is not what was stored ({len(data)} bytes arrived, with another SHA-256); "
                "the object was overwritten: make it again"
            )
        return data

    @_retried
    def _get(self, key: str) -> bytes:
        data: bytes = self._client().get_object(Bucket=self._bucket, Key=key)["Body"].read()
        return data

    @_retried
    def get_range(self, key: str, start: int, size: int) -> bytes:
        """At most `size` bytes from `start` on; fewer at the object's end, none after it."""
        from botocore.exceptions import ClientError  # noqa: PLC0415

        try:
            window = f"bytes={start}-{start + size - 1}"
            data: bytes = self._client().get_object(Bucket=self._bucket, Key=key, Range=window)["Body"].read()
        except ClientError as error:
            if error_code(error) in ("InvalidRange", "416"):
                return b""
            raise
        return data

    @_retried
    def size(self, key: str) -> int:
        """Bytes of an object."""
        return int(self._client().head_object(Bucket=self._bucket, Key=key)["ContentLength"])

    @_retried
    def content_type(self, key: str) -> str:
        return str(self._client().head_object(Bucket=self._bucket, Key=key)["ContentType"])

    def exists(self, key: str) -> bool:
        return self._head(key) is not None

    @_retried
    def now(self) -> float:
        """The storage's clock, to the second."""
        return _date(self._client().head_bucket(Bucket=self._bucket))

    def age(self, key: str) -> float | None:
        """Seconds since an object was written, by the storage's clock; None if there is none."""
        answer = self._head(key)
        return None if answer is None else _date(answer) - float(answer["LastModified"].timestamp())

    @_retried
    def _head(self, key: str) -> Any:
        """What the storage says of an object; None if there is none."""
        from botocore.exceptions import ClientError  # noqa: PLC0415

        try:
            return self._client().head_object(Bucket=self._bucket, Key=key)
        except ClientError as error:
            if error_code(error) in ("404", "NoSuchKey"):
                return None
            raise

    @_retried
    def delete(self, key: str) -> None:
        """Delete an object, if it exists."""
        self._client().delete_object(Bucket=self._bucket, Key=key)

    @_retried
    def delete_many(self, keys: Sequence[str]) -> None:
        """Delete up to a thousand objects, if they exist: in one call, or one by one where that is refused."""
        if not keys:
            return
        from botocore.exceptions import ClientError  # noqa: PLC0415

        objects = [{"Key": key} for key in keys]
        try:
            answer = self._client().delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})
        except ClientError as error:
            if error_code(error) not in BATCH_DELETION_REFUSED:
                raise
            for key in keys:
                self.delete(key)
            return
        for problem in answer.get("Errors", ()):
            raise StorageUnavailable(
                f"storage: {problem.get('Key')} could not be removed: {problem.get('Code')} {problem.get('Message')}; "
                "check that the access key may delete objects in this bucket"
            )

    @_retried
    def begin_upload(self, key: str, content_type: str) -> str:
        """Start a multipart upload; returns its id."""
        answer = self._client().create_multipart_upload(Bucket=self._bucket, Key=key, ContentType=content_type)
        return str(answer["UploadId"])

    @_retried
    def upload_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        """One part, from number 1 on, at least 5 MiB unless it is the last; returns its tag."""
        part = {"Bucket": self._bucket, "Key": key, "UploadId": upload, "PartNumber": number, "Body": data}
        return str(self._client().upload_part(**part)["ETag"])

    @_retried
    def complete_upload(self, key: str, upload: str, tags: Sequence[str]) -> None:
        parts = {"Parts": [{"ETag": tag, "PartNumber": number} for number, tag in enumerate(tags, 1)]}
        self._client().complete_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload, MultipartUpload=parts)

    @_retried
    def abort_upload(self, key: str, upload: str) -> None:
        self._client().abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload)

    def unfinished_uploads(self) -> Iterator[UnfinishedUpload]:
        """Multipart uploads that have not been completed."""
        marker: Mapping[str, str] = {}
        while True:
            page = self._uploads_page(marker)
            for item in page.get("Uploads", ()):
                yield UnfinishedUpload(item["Key"], item["UploadId"], item["Initiated"].timestamp())
            if not page.get("IsTruncated"):
                return
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}

    @_retried
    def _uploads_page(self, marker: Mapping[str, str]) -> Any:
        return self._client().list_multipart_uploads(Bucket=self._bucket, **marker)

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that begin with `prefix`, in order."""
        for page in self.pages(prefix):
            yield from (item.key for item in page)

    def pages(self, prefix: str = "") -> Iterator[Sequence[StoredObject]]:
        """Objects whose keys begin with `prefix`, in order, up to a thousand at a time."""
        token: Mapping[str, str] = {}
        while True:
            page = self._list_page(prefix, token)
            yield [
                StoredObject(item["Key"], int(item["Size"]), item["LastModified"].timestamp())
                for item in page.get("Contents", ())
            ]
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    @_retried
    def _list_page(self, prefix: str, token: Mapping[str, str]) -> Any:
        return self._client().list_objects_v2(Bucket=self._bucket, Prefix=prefix, **token)

    def presigned_url(self, key: str, *, expires_seconds: int | None = None) -> str:
        """A presigned link to download one object. Computed locally, without a request."""
        endpoint = self._settings.s3_public_endpoint_url or self._settings.s3_endpoint_url
        expires = expires_seconds or self._settings.url_expires_seconds
        parameters = {"Bucket": self._bucket, "Key": key}
        return str(self._client(endpoint).generate_presigned_url("get_object", Params=parameters, ExpiresIn=expires))

    def presigned_put(self, key: str, *, expires_seconds: int) -> str:
        """A presigned link to upload one object."""
        endpoint = self._settings.s3_public_endpoint_url or self._settings.s3_endpoint_url
        parameters = {"Bucket": self._bucket, "Key": key}
        client = self._client(endpoint)
        return str(client.generate_presigned_url("put_object", Params=parameters, ExpiresIn=expires_seconds))

    def longest_url(self, key: str) -> str:
        """A link that works for as long as S3 allows: a week."""
        return self.presigned_url(key, expires_seconds=604_800)

    # ----

    def _client(self, endpoint: str | None = None) -> Any:
        endpoint = endpoint or self._settings.s3_endpoint_url
        with self._lock:
            if endpoint not in self._clients:
                self._clients[endpoint] = self._connect(endpoint)
            return self._clients[endpoint]

    def _connect(self, endpoint: str | None) -> Any:
        # A tenth of a second to import, which a process that only submits never pays.
        import boto3  # noqa: PLC0415
        from botocore.config import Config  # noqa: PLC0415

        secret = self._settings.s3_secret_access_key
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint,
            region_name=self._settings.s3_region,
            aws_access_key_id=self._settings.s3_access_key_id,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            config=Config(
                connect_timeout=min(5.0, self._settings.s3_timeout_seconds),
                read_timeout=self._settings.s3_timeout_seconds,
                retries={"total_max_attempts": 1},  # our own retries have jitter and a clear error
                max_pool_connections=32,
                signature_version="s3v4",
                # Virtual-host addressing needs a DNS name a bucket, which self-hosted servers do not have.
                s3={"addressing_style": "path" if endpoint else "auto"},
                # Checksum trailers, new in boto3 1.36, are refused by several S3-compatible servers.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        # Required by S3, and by servers that know no newer checksum; boto3 no longer sends it.
        client.meta.events.register("before-call.s3.DeleteObjects", _add_content_md5)
        return client

    def _location(self) -> dict[str, Any]:
        if self._settings.s3_region == "us-east-1":
            return {}
        return {"CreateBucketConfiguration": {"LocationConstraint": self._settings.s3_region}}

    def _unavailable(self, error: Exception) -> StorageUnavailable:
        return unavailable(error, endpoint=self._settings.s3_endpoint_url, bucket=self._bucket)


def _add_content_md5(params: dict[str, Any], **_: Any) -> None:
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def _date(answer: Any) -> float:
    """When the server answered, by its own clock."""
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
