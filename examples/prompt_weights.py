r"""Prompt weights: (word:1.3), nesting, [less], \(escapes\); prompts longer than one window; a negative prompt.

Needs a running `calotype up`. Writes out/prompt_weights.png.
"""

from sheet import save_sheet

from calotype import Client

PROMPTS = [
    ("a red star and a blue star on a white background", ""),
    ("a (red:1.6) star and a (blue:0.2) star on a white background", ""),
    ("a [red] star and a ((blue)) star on a white background", ""),
    ("a star on a white background", "red"),
    (r"a red star, \[large\], on a white background", ""),
    ("a large red heart on a blue background, " * 5, ""),  # two windows of the bundled model's text encoder
]

with Client() as client:
    jobs = [
        client.submit(prompt, negative_prompt=negative, seed=8, num_inference_steps=25, guidance_scale=5)
        for prompt, negative in PROMPTS
    ]
    captions = [
        f"{prompt[:60]}{' … ' if len(prompt) > 60 else ''}{negative and f' / not: {negative}'}"
        for prompt, negative in PROMPTS
    ]
    save_sheet("prompt_weights", [(job.result()[0].image, text) for job, text in zip(jobs, captions, strict=True)])
