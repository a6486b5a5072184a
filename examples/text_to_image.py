"""Text to image: four prompts with settings of their own, in one step batch.

Needs a running `calotype up`. Writes out/text_to_image.png.
"""

from sheet import save_sheet

from calotype import Client

with Client() as client:
    jobs = client.submit_many(
        [
            {"prompt": "a red circle on a blue background", "seed": 3, "num_inference_steps": 20, "sampler": "ddim"},
            {
                "prompt": "a yellow star on a purple background",
                "seed": 4,
                "num_inference_steps": 25,
                "sampler": "euler",
            },
            {"prompt": "a green heart on a pink background", "seed": 5, "num_inference_steps": 15, "sampler": "unipc"},
            {
                "prompt": "a white ring on a black background",
                "seed": 6,
                "quality": "fast",
                "sampler": "dpmpp_2m_karras",
            },
        ]
    )
    save_sheet("text_to_image", [(job.result()[0].image, job.status().config.prompt) for job in jobs])
