"""/tokenize: the tokens of a prompt or of messages, in the shape that vLLM's server has."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from ruyi_flow.http.asking import Site, read_body
from ruyi_flow.http.events import JsonResponse
from ruyi_flow.http.schemas import tokenize_request
from ruyi_flow.http.usage import Record

__all__ = ["tokenize"]


async def tokenize(site: Site, request: Request, record: Record) -> Response:
    """Return the tokens of a prompt.

    Raises:
        HttpError: the request is not one that this server honours.
        RuyiFlowError: the prompt is refused, or the entry node cannot be asked.
    """
    asked = await read_body(request, tokenize_request)
    if asked.model is not None:
        record.model = site.models.find(asked.model).id
    found = await site.entry.tokenize(asked.prompt, raw=asked.raw)
    return JsonResponse(
        {
            "count": len(found.token_ids),
            "max_model_len": found.context,
            "tokens": found.token_ids,
            "token_strs": found.texts,
        }
    )
