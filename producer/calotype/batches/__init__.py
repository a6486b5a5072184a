"""Large batches: a manifest of up to a million lines in storage, a window of jobs in the queue, results in storage.

Reading order: `record.py` (a batch), `lines.py` (its file formats), `plan.py` (the validated manifest),
`run.py` (one batch from start to end), `dispatcher.py` (which process runs which batch), `client.py` (the public API).
"""
