"""The life of a job in a worker: Celery, claims, leases, inputs, delivery, drain."""
