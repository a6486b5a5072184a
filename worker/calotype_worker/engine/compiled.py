"""`CompiledStep`: a denoising step's network, guidance and sampler product as one compiled graph.

Only the model's native sizes are compiled, while the model is profiled at start: compiling a graph takes up to a
minute, during which no steps run. Other sizes run eagerly, and so do rows with LoRAs, ControlNets or masked text, and
everything after a failed compilation: a bug of the compiler costs speed, but never an image.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch

from calotype_worker.engine.batch_row import Layout
from calotype_worker.engine.failure_isolation import is_fatal
from calotype_worker.engine.memory_limit import is_out_of_memory
from calotype_worker.models.base import Conditioning, StepModel
from calotype_worker.sampling.table import product

log = logging.getLogger(__name__)

# "default" compiles once for any number of rows; "reduce-overhead" once for each bucket, as a CUDA graph.
CompileMode = Literal["off", "default", "reduce-overhead"]
REMEMBERED = 6  # tensors, as PNDM has: a graph is for one number of them, and those that a sampler lacks are zero
MAX_BUCKETS = 8  # of a size


def buckets_up_to(rows: int) -> tuple[int, ...]:
    """Numbers of rows to compile for, the last one at least `rows`: doubling, at most `MAX_BUCKETS` of them."""
    found = [rows]
    while found[0] > 2 and len(found) < MAX_BUCKETS:
        found.insert(0, 1 << (found[0] - 1).bit_length() - 1)
    return tuple(found)


class CompiledStep:
    """Of one model on its device. Owned by the engine's thread."""

    def __init__(self, model: StepModel, mode: CompileMode) -> None:
        self._model = model
        self.static = mode == "reduce-overhead"  # one graph for each number of rows
        self.broken = False
        self._shapes = {model.latent_shape(*size) for size in model.card.native_sizes}

        def whole(  # noqa: PLR0917 - the compiler sees tensors, one by one
            state: torch.Tensor,
            matrices: torch.Tensor,
            input_scale: torch.Tensor,
            timesteps: torch.Tensor,
            noise: torch.Tensor,
            source: torch.Tensor,
            unconditional: torch.Tensor,
            guidance: torch.Tensor,
            shape: tuple[int, int, int],
            conditioning: Conditioning,
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            inputs = (state[:, 0] * input_scale[:, None]).reshape(-1, *shape)
            outputs = model.forward(inputs[source], timesteps[source], conditioning)
            base = outputs[unconditional]
            guided = base + guidance * (outputs - base)
            stacked = torch.cat([state, guided.flatten(1).unsqueeze(1), noise], dim=1)
            return product(matrices, stacked), guided, inputs

        self._step = torch.compile(
            whole, dynamic=False if self.static else None, mode=mode if self.static else None, fullgraph=True
        )
        # PyTorch treats the steps of all models as one function, and compiles at most eight graphs per function. The
        # setting is per thread, so this is created in the thread that calls it.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, limits.accumulated_recompile_limit)

    def can(self, rows: Layout, shape: tuple[int, int, int]) -> bool:
        """Whether these rows, of latents (C, h, w), can take this way."""
        plain = not (rows.loras or rows.control_images or any(name.endswith("_mask") for name in rows.conditioning))
        # A single row would need its own compilation, and is not slower without.
        return plain and shape in self._shapes and not self.broken and len(rows.owners) > 1

    def __call__(
        self,
        rows: Layout,
        shape: tuple[int, int, int],
        *,
        state: torch.Tensor,
        matrices: torch.Tensor,
        input_scale: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """New state (n, K+1, L), guided model output and scaled inputs, both (n, C, h, w); or None if it failed.

        Everything except `rows` describes the n members, each at its own step; `noise` is (n, 1, L).
        """
        count, padded = len(state), len(rows.owners)

        def pad(tensor: torch.Tensor) -> torch.Tensor:
            """A row for every row of the forward pass: those without a row of their own repeat the first one."""
            grown = torch.cat([tensor, tensor[:1].expand(padded - count, *tensor.shape[1:])])
            if not self.static:
                torch._dynamo.mark_dynamic(grown, 0)
            return grown

        conditioning = dict(rows.conditioning)
        if not self.static:
            for tensor in (*conditioning.values(), rows.source, rows.unconditional, rows.scales):
                torch._dynamo.mark_dynamic(tensor, 0)
        try:
            results = self._step(
                pad(state),
                pad(matrices),
                pad(input_scale),
                pad(timesteps),
                pad(noise),
                rows.source,
                rows.unconditional,
                rows.scales,
                shape,
                conditioning,
            )
        except Exception as error:
            if is_fatal(error) or is_out_of_memory(error):
                raise
            self.broken = True
            log.exception(
                "compiled step failed; the model continues without compilation", extra={"model": self._model.card.name}
            )
            return None
        # Clones, because a CUDA graph overwrites these with its next results.
        state_, guided, inputs = (result[:count].clone() for result in results)
        return state_, guided, inputs
