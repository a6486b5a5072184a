"""Video: an AnimateDiff clip as MP4, through the same queue.

Needs a worker with such a model under the name clip:

    AnimateDiffPipeline.from_pretrained(SD, motion_adapter=…).save_pretrained("clip-model")  # once, with diffusers
    calotype worker --model clip=clip-model

Writes out/video.mp4.
"""

from calotype import Client

with Client() as client:
    job = client.submit(
        "waves at sunset", model="clip", num_frames=8, num_inference_steps=8, seed=1, output_format="mp4"
    )
    print(job.result()[0].save("out/video.mp4"))
