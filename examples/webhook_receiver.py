"""A receiver of webhooks that checks their signatures, and a job that tells it when it is done.

Needs `pip install standardwebhooks`, and a running `calotype up` that signs webhooks and may send them to this machine:

    export CALOTYPE_WEBHOOK_SECRET=$(openssl rand -hex 32) CALOTYPE_WEBHOOK_ALLOW_PRIVATE=true
    calotype up
    WEBHOOK_SECRET=$(calotype keys webhook-secret default) python examples/webhook_receiver.py

Writes out/webhook_receiver.json, the events received.
"""

import json
import os
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from standardwebhooks import Webhook, WebhookVerificationError

from calotype import Client

signatures = Webhook(os.environ["WEBHOOK_SECRET"])
events: queue.Queue[dict] = queue.Queue()


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        try:
            events.put(signatures.verify(body, dict(self.headers)))  # refuses what is forged, changed or old
            self.send_response(204)
        except WebhookVerificationError:
            self.send_response(401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server, Client() as client:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    job = client.submit("a red circle on a blue background", num_inference_steps=10, seed=7, webhook_url=url)
    event = events.get(timeout=120)  # deliveries may come twice: a real receiver remembers the webhook-id
    server.shutdown()
    assert event["data"]["id"] == job.id
    Path("out").mkdir(exist_ok=True)
    Path("out/webhook_receiver.json").write_text(json.dumps(event, indent=1))
    print(f"{event['type']} {job.id}: out/webhook_receiver.json")
