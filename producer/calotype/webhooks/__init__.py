"""Webhooks: notifies a submitter's address that a job or a batch is final. Signed, retried, at least once.

The script that makes a job or batch final leaves a delivery in Redis; any number of `Deliverer`s carry them out. They
only read the job, so a failed delivery never affects the job.
"""

from calotype.webhooks.addresses import check_webhook_url
from calotype.webhooks.deliverer import Deliverer
from calotype.webhooks.deliveries import Hooks
from calotype.webhooks.payload import Describe, describe_job
from calotype.webhooks.signing import tenant_secret

__all__ = ["Deliverer", "Describe", "Hooks", "check_webhook_url", "describe_job", "tenant_secret"]
