"""Interprets boto3's errors: whether to retry, and what the operator should do."""

from __future__ import annotations

from calotype_shared.errors import ObjectMissing, StorageUnavailable

_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "403", "401", "InvalidToken"}

# Codes of servers that know no deletion of several objects, or want it in a form that boto3 does not send.
BATCH_DELETION_REFUSED = {"NotImplemented", "MethodNotAllowed", "MissingContentMD5", "InvalidRequest", "501", "405"}


def error_code(error: Exception) -> str:
    """S3's code for it; empty if there was no answer."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def is_transient(error: Exception) -> bool:
    """Whether a retry may succeed: there was no response, or the server reported that it was busy."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return type(error).__name__ not in ("NoCredentialsError", "ParamValidationError", "InvalidEndpoint")
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return status >= 500 or status == 429 or error_code(error) in ("SlowDown", "RequestTimeout", "RequestTimeTooSkewed")


def unavailable(error: Exception, *, endpoint: str | None, bucket: str) -> StorageUnavailable:
    """The error to raise, with a remedy; ObjectMissing if the object does not exist."""
    where = endpoint or "Amazon S3"
    code = error_code(error)
    if type(error).__name__ == "NoCredentialsError":
        problem = "no access keys are set"
        remedy = "set CALOTYPE_S3_ACCESS_KEY_ID and CALOTYPE_S3_SECRET_ACCESS_KEY"
    elif code in _REFUSED:
        problem = f"the access keys were refused ({code})"
        remedy = "check CALOTYPE_S3_ACCESS_KEY_ID and CALOTYPE_S3_SECRET_ACCESS_KEY, and the key's permissions"
    elif code == "NoSuchKey":
        return ObjectMissing(f"storage at {where}: the object does not exist; it was deleted or never written")
    elif code in ("404", "NoSuchBucket"):
        problem = f"bucket {bucket!r} does not exist"
        remedy = "create it, or set CALOTYPE_S3_BUCKET to an existing one"
    else:
        problem, remedy = f"{error}", "check CALOTYPE_S3_ENDPOINT_URL and that the server runs"
    return StorageUnavailable(f"storage at {where}: {problem}; {remedy}")
