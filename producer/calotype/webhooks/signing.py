"""Signatures of webhooks, by Standard Webhooks (https://www.standardwebhooks.com), which many languages verify."""

from __future__ import annotations

import base64
import hmac

from calotype_shared.errors import SettingsError

SECRET_PREFIX = "whsec_"  # noqa: S105 - what secrets begin with
MIN_MASTER_CHARACTERS = 16


def tenant_secret(master: str, tenant: str) -> str:
    """The secret with which one tenant verifies its webhooks: `whsec_` and 32 bytes in base64.

    It is derived from the operator's `master`, so nothing is stored, and no tenant can compute another's.

    Raises:
        SettingsError: the master is so short that it could be guessed.
    """
    if len(master) < MIN_MASTER_CHARACTERS:
        raise SettingsError(
            f"CALOTYPE_WEBHOOK_SECRET has {len(master)} characters, and at least {MIN_MASTER_CHARACTERS} "
            "are required; create one with: openssl rand -hex 32"
        )
    derived = hmac.digest(master.encode(), f"calotype-webhook:{tenant}".encode(), "sha256")
    return SECRET_PREFIX + base64.b64encode(derived).decode()


def signed_headers(secret: str, *, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of a signed message. `secret` is a tenant's, `timestamp` in seconds since the epoch."""
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    signature = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, "sha256")
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }
