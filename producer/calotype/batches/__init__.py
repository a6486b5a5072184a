"""Large batches: a manifest of up to a million lines in storage, a window of jobs in the queue, results in storage.

Reading order: `record.py` (what a batch is), `lines.py` (how it is written), `plan.py` (the manifest, validated),
`run.py` (one batch from its first line to its last), `dispatcher.py` (who runs which), `client.py` (what users call).
"""
