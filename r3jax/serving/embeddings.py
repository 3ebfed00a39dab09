"""The routes of OpenAI's API: vectors of texts, and the models that there are."""

import base64
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Response

from r3jax.serving.batching import Read
from r3jax.serving.desk import Desk, aside
from r3jax.serving.schema import Embeddings, Models, embedding_request

CUT = "X-Cut-Inputs"  # header: how many of the texts were longer than the model reads


def router(desk: Desk, problems: dict) -> APIRouter:
    """POST /v1/embeddings and GET /v1/models."""
    routes = APIRouter()
    body_type: Any = embedding_request(desk.served, desk.limits)[0]
    since = int(time.time())
    header = {CUT: {"description": "Inputs longer than the model reads, if any.", "schema": {"type": "integer"}}}

    @routes.post("/v1/embeddings", responses={200: {"model": Embeddings, "headers": header}, **problems})
    async def embeddings(body: body_type) -> Response:
        """Unit vectors of texts, as OpenAI's endpoint gives them. The end of a text that is too long is not read."""
        mode = desk.served.models[body.model]
        given = body.input
        inputs = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        async with desk.clock():
            rows = await desk.rows(mode, inputs, "input")
            found = await desk.read(mode, rows.rows)
        written = sum(len(read.thought) + read.emitted for read in found) if mode == "query" else 0
        usage = {"prompt_tokens": rows.tokens, "total_tokens": rows.tokens + written}
        numbers = len(found) * desk.served.width
        as_base64 = body.encoding_format == "base64"
        content = await aside(numbers, render, found, body.model, body.dimensions, as_base64, usage)
        headers = {CUT: str(rows.cut)} if rows.cut else {}
        return Response(content, media_type="application/json", headers=headers)

    @routes.get("/v1/models", responses={200: {"model": Models}, **problems})
    async def models() -> dict:
        """NAME:query thinks before it is read, NAME:query-direct does not; NAME:document is for what is searched."""
        about = {"object": "model", "created": since, "owned_by": "r3jax"}
        return {"object": "list", "data": [{"id": name, **about} for name in desk.served.models]}

    return routes


def render(found: Sequence[Read], model: str, dimensions: int | None, as_base64: bool, usage: dict) -> str:
    """The body of an answer. Vectors cut to `dimensions` become unit vectors again, as in `SearchR3`."""
    vectors = np.stack([read.vector for read in found])
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    vectors = vectors.astype("<f4")
    shown = [base64.b64encode(v.tobytes()).decode() for v in vectors] if as_base64 else vectors.tolist()
    data = [{"object": "embedding", "index": i, "embedding": x} for i, x in enumerate(shown)]
    return json.dumps({"object": "list", "data": data, "model": model, "usage": usage})
