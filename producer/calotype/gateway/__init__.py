"""The HTTP gateway: Calotype's own API, and those of OpenAI and AUTOMATIC1111 for clients that exist already.

Reading order: `app.py` (what is served), `auth.py` (who asks), `errors.py` (how each API says no), then one module an
API: `jobs.py`, `uploads.py`, `openai_images.py`, `openai_files.py`, `openai_batches.py`, `a1111.py`.
"""
