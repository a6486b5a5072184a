"""The worker: a step-batching diffusion engine and the Celery process around it."""
