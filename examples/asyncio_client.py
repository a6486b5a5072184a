"""asyncio: jobs submitted, followed and fetched while the event loop does other things.

Needs a running `calotype up`. Writes out/asyncio_client.png.
"""

import asyncio

from sheet import save_sheet

from calotype import AsyncClient


async def make(client: AsyncClient, prompt: str) -> tuple:
    job = await client.submit(prompt, seed=3, num_inference_steps=15, guidance_scale=5)
    async for record in job.follow(timeout=120):
        print(f"{prompt}: {record.state} {record.progress:.0%}")
    [image] = await job.result()
    return image.image, prompt


async def main() -> None:
    async with AsyncClient() as client:
        prompts = [f"a large {color} square on a black background" for color in ("red", "green", "yellow")]
        save_sheet("asyncio_client", await asyncio.gather(*(make(client, prompt) for prompt in prompts)))


asyncio.run(main())
