"""The HTTP gateway: Calotype's own API, and the APIs of OpenAI and AUTOMATIC1111 for existing clients.

Reading order: `app.py` (what is served), `front.py` (what happens before a route), `auth.py` (who asks), `errors.py`
(how each API reports errors), then one module per API: `jobs.py`, `uploads.py`, `openai_images.py`, `openai_files.py`,
`openai_batches.py`, `a1111.py`.
"""
