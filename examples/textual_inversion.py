"""Textual inversion: a color that the model has no word for, learned as <lime>.

Needs a running `calotype up`, whose bundled model comes with the word. Writes out/textual_inversion.png.
"""

from sheet import save_sheet

from calotype import Client

with Client() as client:
    jobs = client.submit_many(
        [
            {
                "prompt": f"a {word} {shape} on a blue background",
                "seed": 4,
                "num_inference_steps": 25,
                "guidance_scale": 5,
            }
            for shape in ("circle", "square")
            for word in ("green", "<lime>")
        ]
    )
    save_sheet("textual_inversion", [(job.result()[0].image, job.status().config.prompt) for job in jobs])
