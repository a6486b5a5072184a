"""`PromptWeights`: weighted prompts for pipelines whose text encoders are those of Stable Diffusion or SDXL.

The embeddings are computed by `ClipText`, as for the step models, and given to the pipeline instead of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch

from calotype_shared.errors import InvalidRequest
from calotype_shared.schema.prompt import parse_weights
from calotype_worker.models.clip_text import ClipText
from calotype_worker.models.pipeline.probe import Recording
from calotype_worker.models.pipeline.signature import CallSignature
from calotype_worker.models.pipeline.tree import leaves

_NEEDED = ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds")
_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_FIRST, _SECOND = "CLIPTextModel", "CLIPTextModelWithProjection"


class PromptWeights:
    """Created once per model. `embed` runs the text encoders, so in a request's greenlet their calls are merged."""

    @classmethod
    def of(
        cls, pipeline: Any, signature: CallSignature, recording: Recording, prompt: str, device: torch.device
    ) -> Self | None:
        """None: the pipeline does not read prompts this way, as its recorded run with this prompt shows.

        `pipeline` has stand-ins for its networks, which run on `device`.
        """
        names = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipeline, name, None)]
        kinds = [type(getattr(pipeline, name)).__name__ for name in names]
        if kinds not in ([_FIRST], [_FIRST, _SECOND]) or any(name not in signature for name in _NEEDED):
            return None
        if len(kinds) > 1 and any(name not in signature for name in _POOLED):
            return None
        found = cls([_text(pipeline, name, device, penultimate=len(kinds) > 1) for name in names])
        try:
            own = found.embedded(prompt)
        except Exception:  # an encoder or tokenizer that cannot be used so
            return None
        return found if all(_was_given(recording, part) for part in own) else None

    def __init__(self, texts: list[ClipText]) -> None:
        self._texts = texts

    def applied(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with embeddings instead of weighted prompts; brackets of other prompts are read as well.

        Raises:
            InvalidRequest: a weight is out of range, or cannot be combined with `clip_skip`.
        """
        changed = dict(arguments)
        for field, embeds, pooled in (
            ("prompt", "prompt_embeds", _POOLED[0]),
            ("negative_prompt", "negative_prompt_embeds", _POOLED[1]),
        ):
            prompt = arguments.get(field)
            fragments = parse_weights(prompt, field=field) if isinstance(prompt, str) else []
            if all(weight == 1.0 for _, weight in fragments):
                changed |= {field: "".join(text for text, _ in fragments)} if fragments else {}
                continue
            if arguments.get("clip_skip"):
                raise InvalidRequest(
                    "cannot be combined with prompt weights",
                    field="parameters.clip_skip",
                    value=arguments["clip_skip"],
                    remedy="leave out either",
                )
            del changed[field]
            changed |= dict(zip((embeds, pooled), self.embedded(str(prompt)), strict=False))
        return changed

    def embedded(self, prompt: str) -> list[torch.Tensor]:
        """Embeddings (1, tokens, features), of all encoders, and of two encoders the pooled ones (1, features).

        Of a prompt that is too long the first window is used, as the pipelines do.
        """
        with torch.no_grad():
            parts = [text.encode(prompt)[: text.window_tokens] for text in self._texts]
            found = [torch.cat(parts, dim=-1).unsqueeze(0)]
            if len(self._texts) > 1:
                last = self._texts[-1]
                found.append(last.encoder(last.tokens(prompt), output_hidden_states=True)[0])
        return found


def _text(pipeline: Any, name: str, device: torch.device, *, penultimate: bool) -> ClipText:
    tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
    return ClipText(tokenizer, getattr(pipeline, name), penultimate=penultimate, device=device)


def _was_given(recording: Recording, wanted: torch.Tensor) -> bool:
    """Whether a network got these embeddings (1, …) as a row of an argument."""
    return any(
        isinstance(value, torch.Tensor)
        and value.shape[1:] == wanted.shape[1:]
        and any(torch.allclose(row, wanted[0].to(row), rtol=1e-2, atol=1e-3) for row in value)
        for call in recording.calls
        for _, value in leaves([list(call.args), call.kwargs])
    )
