"""The wire format: configs, model cards, job records, worker reports. Imports nothing of Redis or S3."""
