"""For tests of code that submits jobs: real Redis and S3 servers, and a worker without GPU and torch.

Needs the extra `calotype[embedded]`. The how-to is docs/how-to/test-your-producer.md.
"""

from calotype.testing.job_context import ClaimLost, JobContext, WorkerCrash
from calotype.testing.sandbox import Sandbox, demo_card
from calotype.testing.worker import Script, ScriptedWorker

__all__ = [
    "ClaimLost",
    "GenerationFailed",
    "JobContext",
    "Sandbox",
    "Script",
    "ScriptedWorker",
    "WorkerCrash",
    "demo_card",
]
