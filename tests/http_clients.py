"""What real clients must get from a server, wherever it runs: OpenAI's, LangChain's, and schemathesis."""

import asyncio
import base64
import itertools

import numpy as np
import openai
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from langchain_openai import OpenAIEmbeddings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as promised

from r3jax.serving.schema import Error
from tests import fixtures

MODES = ("query", "query-direct", "document")
PROMISES = [
    not_a_server_error,
    promised.status_code_conformance,
    promised.content_type_conformance,
    promised.response_headers_conformance,
    promised.response_schema_conformance,
    promised.negative_data_rejection,
    promised.positive_data_acceptance,
]


def texts_of(count: int) -> list[str]:
    """Of other lengths, some longer than the model reads."""
    words = fixtures.VERBS + fixtures.NOUNS + fixtures.PLACES
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(words, size=rng.integers(1, 16))) for _ in range(count)]


def wanted(model, texts, mode):
    """SearchR3's vectors."""
    if mode == "document":
        return model.encode_document(texts)
    return model.encode_query(texts, reasoning=mode == "query")


def check(found, right):
    np.testing.assert_allclose(np.array(found, np.float32), right, atol=1e-5)


def openai_agrees(address, name, model):
    """OpenAI's client in all modes and forms (by default it asks for base64 and unpacks it), and its exceptions."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == [f"{name}:{mode}" for mode in MODES]
    texts = texts_of(40)
    for mode in MODES:
        right = wanted(model, texts, mode)
        for encoding in (openai.NOT_GIVEN, "float"):
            answer = client.embeddings.create(model=f"{name}:{mode}", input=texts, encoding_format=encoding)
            check([e.embedding for e in answer.data], right)
            assert answer.model == f"{name}:{mode}" and answer.usage.prompt_tokens > 0
        raw = client.embeddings.create(model=f"{name}:{mode}", input=texts, encoding_format="base64").data
        check([np.frombuffer(base64.b64decode(e.embedding), "<f4") for e in raw], right)
    ids = model.reader.chat.tokens(texts[:1])
    for form in (texts[0], ids[0], ids):
        check([client.embeddings.create(model=f"{name}:document", input=form).data[0].embedding], right[:1])
    short = client.embeddings.create(model=f"{name}:document", input=texts[0], dimensions=5).data[0].embedding
    check([short], model.encode_document(texts[:1], truncate_dim=5))
    with pytest.raises(openai.NotFoundError, match=f"there is no model 'gpt'; it must be one of {name}:query"):
        client.embeddings.create(model="gpt", input="text")
    with pytest.raises(openai.BadRequestError, match="dimensions must be a whole number from 1 to 32"):
        client.embeddings.create(model=f"{name}:document", input="text", dimensions=33)


def langchain_agrees(address, name, model):
    texts = texts_of(5)
    for mode in MODES:
        embeddings = OpenAIEmbeddings(
            model=f"{name}:{mode}", base_url=f"{address}/v1", api_key="none", check_embedding_ctx_length=False
        )
        right = wanted(model, texts, mode)
        check(embeddings.embed_documents(texts), right)
        check(embeddings.embed_query(texts[0]), right[0])


def many_agree(address, name, model, count=64):
    """So many at once, of all modes, some with several texts, in both encodings."""
    texts = texts_of(count)
    right = {mode: wanted(model, texts, mode) for mode in MODES}

    async def ask(client, i):
        mode, asked = MODES[i % 3], texts[i : i + 1 + i % 4]
        form = ("float", openai.NOT_GIVEN)[i % 2]
        answer = await client.embeddings.create(model=f"{name}:{mode}", input=asked, encoding_format=form)
        return [e.embedding for e in answer.data], right[mode][i : i + len(asked)]

    async def everyone():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(count)))

    for found, good in asyncio.run(everyone()):
        check(found, good)


def schema_is_kept(address, cases):
    """schemathesis: what the schema allows is answered, what it does not is refused in a sentence, nothing fails."""
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    session, asked, refused = requests.Session(), 0, 0
    posts = [schema["/v1/embeddings"]["POST"], schema["/search"]["POST"]]
    for operation, mode in itertools.product(posts, GenerationMode):

        @settings(
            max_examples=cases // 4,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case):
            nonlocal asked, refused
            answer = case.call(session=session)
            case.validate_response(answer, checks=PROMISES)
            asked += 1
            if 400 <= answer.status_code < 500:
                message = Error.model_validate(answer.json()).error.message
                assert message.endswith(".") and "\n" not in message
                refused += 1

        ask()
    for path in ("/v1/models", "/healthz", "/metrics"):
        schema[path]["GET"].Case().call_and_validate(checks=PROMISES)
    assert asked >= cases * 0.9 and refused > cases / 4
    assert requests.get(f"{address}/healthz", timeout=20).json() == {"status": "ok"}
