"""3D: a Shap-E object as a mesh with colors, and its turntable as GIF.

Needs a worker with such a model: `calotype worker --model shape=openai/shap-e`. Writes out/shape.ply and out/shape.gif.
"""

from calotype import Client

with Client() as client:
    jobs = {
        kind: client.submit("a chair", model="shape", num_inference_steps=8, seed=1, output_format=kind)
        for kind in ("ply", "gif")
    }
    for kind, job in jobs.items():
        print(job.result()[0].save(f"out/shape.{kind}"))
