"""What the span of a request says about it, by the names of OpenTelemetry's conventions for generative AI. No torch.

It says nothing of the prompt's or the answer's text.
"""

from __future__ import annotations

from pathlib import PurePath

from ruyi_flow.requests import GenerateRequest, SamplingParams
from ruyi_flow.telemetry import spans
from ruyi_flow.telemetry.spans import Attribute
from ruyi_flow.types import Final

__all__ = ["about_answer", "about_request", "model_name"]


def model_name(family: str) -> str:
    """Return the name of a family that a topology names, which may be a folder."""
    return PurePath(family).name


def about_request(request: GenerateRequest, params: SamplingParams, model: str) -> dict[str, Attribute]:
    """Return what is known when a request begins.

    Args:
        request: the request.
        params: its sampling options, completed.
        model: the family's name.
    """
    is_chat = not request.raw and not (request.prompt and isinstance(request.prompt[0], int))
    found: dict[str, Attribute] = {
        spans.OPERATION: "chat" if is_chat else "text_completion",
        spans.PROVIDER: "ruyi-flow",
        spans.REQUEST_MODEL: model,
        spans.RESPONSE_MODEL: model,
        spans.MAX_TOKENS: params.max_new_tokens,
        spans.TEMPERATURE: params.temperature,
        spans.TOP_P: params.top_p,
        spans.TOP_K: params.top_k,
    }
    return found if params.seed is None else found | {spans.SEED: params.seed}


def about_answer(final: Final) -> dict[str, Attribute]:
    """Return what is known when an answer is complete."""
    stats = final.stats
    return {
        spans.INPUT_TOKENS: stats.prompt_tokens,
        spans.OUTPUT_TOKENS: stats.new_tokens,
        spans.FINISH_REASONS: (final.finish_reason.value,),
        spans.FIRST_TOKEN_S: stats.first_token_s,
        spans.BYTES_UP: sum(hop.bytes_up for hop in stats.hops),
        spans.ESCALATIONS: stats.escalations,
        spans.DRAFTED: stats.drafted,
        spans.ACCEPTED: stats.accepted,
    }
