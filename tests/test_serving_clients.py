"""Real clients against a real server, which drains when it is told to stop."""

import threading
import urllib.request

import jax
import openai
import pytest

from r3jax.model.sharding import make_mesh
from r3jax.search_r3 import SearchR3
from tests import http_clients
from tests.serving_process import encoded, serving, stop, tiny_run, wait_for

pytestmark = pytest.mark.slow  # test_serving.py has the same clients ask a server in its own process


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


def test_openai(address, model):
    http_clients.openai_agrees(address, "run", model)


def test_langchain(address, model):
    http_clients.langchain_agrees(address, "run", model)


def test_64_clients_at_once(address, model):
    http_clients.many_agree(address, "run", model)


def test_the_published_schema_is_kept(address):
    http_clients.schema_is_kept(address, 2000)


def test_mteb(address, model, monkeypatch):
    """Both of its wrappers: the one for servers of OpenAI's form, and the one around OpenAI's own client."""
    import mteb
    import tiktoken
    from mteb.models import OpenAIAPIEncodeWrapper
    from mteb.models.model_implementations.openai_models import OpenAIModel

    texts = http_clients.texts_of(40)
    batches = [{"text": texts[:32]}, {"text": texts[32:]}]
    about = {"task_metadata": mteb.get_task("NFCorpus").metadata, "hf_split": "test", "hf_subset": "default"}
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    # It cuts texts by OpenAI's own vocabulary, which it would fetch: bytes do as well.
    ranks = {bytes([i]): i for i in range(256)}
    pieces = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: pieces)
    for mode in http_clients.MODES:
        name, right = f"run:{mode}", http_clients.wanted(model, texts, mode)
        plain = OpenAIAPIEncodeWrapper(address, name, use_chat_template=False, modalities=["text"])
        http_clients.check(plain.encode(batches, **about, show_progress_bar=False), right)
        wrapped = OpenAIModel(name, max_tokens=8191, embed_dim=32, client=client)
        http_clients.check(wrapped.encode(batches, **about), right)


def test_sigterm_drains(run):
    """A request in flight, of many batches, gets its answer; a new one finds nobody; the process exits with 0."""
    texts = http_clients.texts_of(2000)
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
