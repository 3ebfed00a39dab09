"""Real clients against a real server: OpenAI's, LangChain's and mteb's get the vectors of `SearchR3`."""

import asyncio
import base64
import itertools
import os
import threading
import urllib.request

import jax
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

from r3jax.model.sharding import make_mesh
from r3jax.search_r3 import SearchR3
from r3jax.serving.schema import Error
from tests import fixtures
from tests.serving_process import encoded, serving, stop, tiny_run, wait_for

MODES = ("query", "query-direct", "document")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def model(run):
    return SearchR3.from_pretrained(run, mesh=make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def address(run):
    with serving(run, encoded(run)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def texts_of(count: int) -> list[str]:
    """Of other lengths, some longer than the model reads."""
    words = fixtures.VERBS + fixtures.NOUNS + fixtures.PLACES
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(words, size=rng.integers(1, 16))) for _ in range(count)]


def wanted(model, texts, mode):
    if mode == "document":
        return model.encode_document(texts)
    return model.encode_query(texts, reasoning=mode == "query")


def check(found, right):
    np.testing.assert_allclose(np.array(found, np.float32), right, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_openai(client, model, mode):
    """By default it asks for base64 and unpacks it."""
    texts = texts_of(5)
    name, right = f"run:{mode}", wanted(model, texts, mode)
    for encoding in (openai.NOT_GIVEN, "float"):
        answer = client.embeddings.create(model=name, input=texts, encoding_format=encoding)
        check([e.embedding for e in answer.data], right)
        assert answer.model == name and answer.usage.prompt_tokens > 0
    raw = client.embeddings.create(model=name, input=texts, encoding_format="base64").data
    check([np.frombuffer(base64.b64decode(e.embedding), "<f4") for e in raw], right)


def test_openai_forms_and_errors(client, model):
    text = texts_of(1)[0]
    ids = model.reader.chat.tokens([text])
    for given in (text, ids[0], ids):
        check([client.embeddings.create(model="run:document", input=given).data[0].embedding], wanted(model, [text], "document"))
    short = client.embeddings.create(model="run:document", input=text, dimensions=5).data[0].embedding
    check([short], model.encode_document([text], truncate_dim=5))
    assert [m.id for m in client.models.list()] == [f"run:{mode}" for mode in MODES]
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; it must be one of run:query"):
        client.embeddings.create(model="gpt", input=text)
    with pytest.raises(openai.BadRequestError, match="dimensions must be a whole number from 1 to 32"):
        client.embeddings.create(model="run:document", input=text, dimensions=33)


def test_langchain(address, model):
    texts = texts_of(5)
    for mode in MODES:
        embeddings = OpenAIEmbeddings(
            model=f"run:{mode}", base_url=f"{address}/v1", api_key="none", check_embedding_ctx_length=False
        )
        check(embeddings.embed_documents(texts), wanted(model, texts, mode))
        check(embeddings.embed_query(texts[0]), wanted(model, texts[:1], mode)[0])


def test_64_clients_at_once(address, model):
    """Of all modes, some with several texts, in both encodings."""
    texts = texts_of(64)
    right = {mode: wanted(model, texts, mode) for mode in MODES}

    async def ask(client, i):
        mode, asked = MODES[i % 3], texts[i : i + 1 + i % 4]
        form = ("float", openai.NOT_GIVEN)[i % 2]
        answer = await client.embeddings.create(model=f"run:{mode}", input=asked, encoding_format=form)
        return [e.embedding for e in answer.data], right[mode][i : i + len(asked)]

    async def everyone():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    for found, good in asyncio.run(everyone()):
        check(found, good)


CHECKS = [
    not_a_server_error,
    promised.status_code_conformance,
    promised.content_type_conformance,
    promised.response_headers_conformance,
    promised.response_schema_conformance,
    promised.negative_data_rejection,
    promised.positive_data_acceptance,
]


@pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_published_schema_is_kept(address, cases):
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
            case.validate_response(answer, checks=CHECKS)
            asked += 1
            if 400 <= answer.status_code < 500:
                message = Error.model_validate(answer.json()).error.message
                assert message.endswith(".") and "\n" not in message
                refused += 1

        ask()
    for path in ("/v1/models", "/healthz", "/metrics"):
        schema[path]["GET"].Case().call_and_validate(checks=CHECKS)
    assert asked >= cases * 0.9 and refused > cases / 4
    assert requests.get(f"{address}/healthz", timeout=20).json() == {"status": "ok"}


@pytest.mark.slow
def test_mteb(address, client, model, monkeypatch):
    """Both of its wrappers: the one for servers of OpenAI's form, and the one around OpenAI's own client."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    mteb = pytest.importorskip("mteb")
    import tiktoken
    from mteb.models import OpenAIAPIEncodeWrapper
    from mteb.models.model_implementations.openai_models import OpenAIModel

    texts = texts_of(40)
    batches = [{"text": texts[:32]}, {"text": texts[32:]}]
    about = {"task_metadata": mteb.get_task("NFCorpus").metadata, "hf_split": "test", "hf_subset": "default"}
    # It cuts texts by OpenAI's own vocabulary, which it would fetch: bytes do as well.
    pieces = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pieces)
    for mode in MODES:
        name, right = f"run:{mode}", wanted(model, texts, mode)
        plain = OpenAIAPIEncodeWrapper(address, name, use_chat_template=False, modalities=["text"])
        check(plain.encode(batches, **about, show_progress_bar=False), right)
        check(OpenAIModel(name, 8191, embed_dim=32, client=client).encode(batches, **about), right)


@pytest.mark.slow
def test_sigterm_drains(run):
    """A request in flight, of many batches, gets its answer; a new one finds nobody; the process exits with 0."""
    texts = texts_of(2000)
    with serving(run) as (address, process):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        found: list = []
        asking = threading.Thread(
            target=lambda: found.append(client.embeddings.create(model="run:query", input=texts, timeout=60))
        )
        asking.start()

        def waiting():
            with urllib.request.urlopen(f"{address}/metrics") as answer:
                return "r3jax_waiting_rows 0.0" not in answer.read().decode()

        wait_for(waiting)
        assert stop(process) == ""
        asking.join()
        assert [e.index for e in found[0].data] == list(range(2000))
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
