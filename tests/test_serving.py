"""The server on a tiny model: what it answers over HTTP, to many at once, and how it refuses."""

import asyncio
import base64
import contextlib
import json
import resource
import signal
import socket
import sys
import threading
import time
import urllib.parse

import httpx2
import jax
import numpy as np
import pytest

from r3jax import serve
from r3jax.corpus import documents as stored
from r3jax.corpus.saved_index import SavedIndex
from r3jax.data import beir
from r3jax.errors import UserError
from r3jax.search.index import VersionedIndex
from r3jax.search_r3 import SearchR3
from r3jax.serving import app, desk, schema, server
from r3jax.serving.guard import TOO_MANY, Guard
from r3jax.serving.limits import Limits
from r3jax.serving.model import Served
from r3jax.serving.refusal import overloaded
from tests import fixtures, http_clients
from tests.tiny_model import weights

LIMITS = Limits(body_bytes=20_000, inputs=40, tokens=1000, waiting=400, streams=1, hits=7, seconds=60)
COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILED.append(name) if "backend_compile" in name else None
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    return folder, fixtures.parts(folder, prompts__direct_system="Represent.", prompts__reasoning_system="Think.")


@pytest.fixture(scope="module")
def model(data):
    """Random weights, the embed token's row larger: some thoughts end in time."""
    _, parts = data
    params = weights(parts.model)
    params["embed"]["table"] = params["embed"]["table"].at[parts.chat.tokenizer.embed_id].multiply(3)
    return SearchR3(fixtures.placed(params, parts), parts.reader, parts.config.data.max_doc_tokens)


@pytest.fixture(scope="module")
def served(data, model):
    folder, parts = data
    texts = beir.load(folder / "data").doc_texts
    (folder / "index").mkdir()
    stored.write(((f"d{i}", text) for i, text in enumerate(texts)), folder / "index")
    index = VersionedIndex.build(model.encode_document(texts), 0, "exact")
    found_in = SavedIndex(folder, index, stored.StoredDocuments(folder / "index"), {})
    served = Served("tiny", model.params, model.reader, model.max_document, True, found_in)
    for step in served.warming(LIMITS.hits):
        step()
    return served


@contextlib.contextmanager
def running(served, limits=LIMITS, key=None, guard=None):
    """A server of its own, and its address."""
    bound = server.bind("127.0.0.1", 0)
    started = threading.Event()
    http = server.Server(guard or app.make_app(served, limits, key), started.set)
    thread = threading.Thread(target=http.run, args=([bound],))
    thread.start()
    assert started.wait(20)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        http.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(served):
    with running(served) as address, httpx2.Client(base_url=address, timeout=60) as client:
        yield client


def texts_of(count: int) -> list[str]:
    """Of other lengths, some longer than the model reads."""
    words = fixtures.VERBS + fixtures.NOUNS + fixtures.PLACES
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(words, size=rng.integers(0, 16))) for _ in range(count)]


def embed(client, texts, mode="document", **fields):
    answer = client.post("/v1/embeddings", json={"model": f"tiny:{mode}", "input": texts, **fields})
    assert answer.status_code == 200, answer.text
    return answer


def vectors(answer):
    found = schema.Embeddings.model_validate(answer.json()).data
    assert [e.index for e in found] == list(range(len(found)))
    return np.array([e.embedding for e in found], np.float32)


def wanted(model, texts, mode):
    if mode == "document":
        return model.encode_document(texts)
    return model.encode_query(texts, reasoning=mode == "query")


@pytest.mark.parametrize("mode", ["query", "query-direct", "document"])
def test_vectors_are_search_r3s(client, model, mode):
    texts = texts_of(40)
    np.testing.assert_allclose(vectors(embed(client, texts, mode)), wanted(model, texts, mode), atol=1e-5)
    alone = vectors(embed(client, texts[3], mode))
    np.testing.assert_allclose(alone, wanted(model, texts[3:4], mode), atol=1e-5)


def test_large_work_is_done_aside(client, model, monkeypatch):
    monkeypatch.setattr(desk, "SMALL", 0)
    np.testing.assert_allclose(
        vectors(embed(client, texts_of(3), "document")), wanted(model, texts_of(3), "document"), atol=1e-5
    )


def test_forms_of_input_and_output(client, model):
    texts = ["list files", "delete the folder"]
    right = model.encode_document(texts)
    ids = model.reader.chat.tokens(texts)
    np.testing.assert_allclose(vectors(embed(client, ids)), right, atol=1e-5)
    np.testing.assert_allclose(vectors(embed(client, ids[1])), right[1:], atol=1e-5)
    answer = embed(client, texts, encoding_format="base64", dimensions=5, user="me").json()
    raw = [np.frombuffer(base64.b64decode(e["embedding"]), "<f4") for e in answer["data"]]
    np.testing.assert_allclose(raw, model.encode_document(texts, truncate_dim=5), atol=1e-5)
    assert answer["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
    assert answer["model"] == "tiny:document"


def test_usage_and_cut_texts(client, model):
    long = " ".join(fixtures.VERBS)
    answer = embed(client, [long, "list"], "query")
    found = model.encode_query([long, "list"], return_details=True)
    read = model.reader.max_query + len(model.reader.chat.tokens(["list"])[0])
    usage = answer.json()["usage"]
    assert usage["prompt_tokens"] == read and found.truncated.tolist() == [True, False]
    assert read < usage["total_tokens"] <= read + 2 * model.reader.max_new
    assert answer.headers["X-Cut-Inputs"] == "1"
    assert "X-Cut-Inputs" not in embed(client, "list", "query").headers


def test_nothing_is_left_to_compile_once_it_is_warm(served, model):
    """Whatever the length of a text, or of a thought that did not end in time; alone or with another."""
    jax.clear_caches()
    for step in served.warming(LIMITS.hits):
        step()
    COMPILED.clear()
    chat, pad = served.chat, [served.chat.tokenizer.pad_id]
    rows = [chat.direct(pad * n) for n in range(max(model.reader.max_query, model.max_document) + 1)]
    longest = model.reader.max_query + model.reader.max_new
    rows += [chat.direct_after(chat.to_reason([]) + pad * n) for n in range(longest + 1)]
    for row in rows:
        served.read(False, [row])
        served.read(False, [row] * 2)
    for n in range(model.reader.max_query + 1):
        served.read(True, [chat.to_reason(pad * n)] * 2)
    assert COMPILED == []


def test_64_clients_at_once(client, model):
    """Of all modes, some with several texts: nobody gets another's vector, nothing is compiled, batches are shared."""
    texts = texts_of(64)
    modes = ["query", "query-direct", "document"]
    asks = [(modes[i % 3], texts[i : i + 1 + i % 4]) for i in range(64)]
    right = {mode: wanted(model, texts, mode) for mode in modes}

    async def ask(http, mode, asked):
        answer = await http.post("/v1/embeddings", json={"model": f"tiny:{mode}", "input": asked})
        return vectors(answer)

    async def everyone():
        limits = httpx2.Limits(max_connections=64)
        async with httpx2.AsyncClient(base_url=client.base_url, timeout=60, limits=limits) as http:
            return await asyncio.gather(*(ask(http, mode, asked) for mode, asked in asks))

    def batches():
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith("r3jax_batch_rows_count"))

    before = batches()
    COMPILED.clear()
    found = asyncio.run(everyone())
    assert COMPILED == []
    assert batches() - before < 40
    for i, (mode, asked) in enumerate(asks):
        np.testing.assert_allclose(found[i], right[mode][i : i + len(asked)], atol=1e-5)


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_search(client, served, model, data, reasoning, stream):
    """The hits and the thought are those of SearchR3; a stream's pieces are the thought."""
    documents = model.encode_document(beir.load(data[0] / "data").doc_texts)
    details = model.encode_query(texts_of(40), return_details=True)
    ends, cut = (np.flatnonzero(details.emitted == told)[:2] for told in (True, False))
    assert len(ends) and len(cut)  # both ways of ending are seen
    COMPILED.clear()
    for query in (texts_of(40)[i] or "x" for i in (*ends, *cut)):
        body = {"query": query, "reasoning": reasoning, "stream": stream, "k": 5}
        answer = client.post("/search", json=body)
        assert answer.status_code == 200
        details = model.encode_query([query] * 2, reasoning=reasoning, return_details=True)
        pieces = None
        if stream:
            assert answer.headers["content-type"].startswith("text/event-stream")
            events = [e.split("\n") for e in answer.text.split("\n\n")[:-1]]
            *told, (name, last) = [(kind[7:], json.loads(data[6:])) for kind, data in events]
            assert name == "answer" and {kind for kind, _ in told} <= {"thought"}
            pieces = "".join(event["text"] for _, event in told)
        else:
            last = answer.json()
        found = schema.Answer.model_validate(last)
        assert found.cut == (len(model.reader.chat.tokens([query])[0]) > model.reader.max_query)
        assert found.thought == (details.thoughts[0] if reasoning else None)
        if pieces is not None:
            assert (found.thought or "").startswith(pieces) and (len(told) > 1 or not reasoning or len(pieces) < 2)
        scores = documents @ details.vectors[0]
        assert [hit.id for hit in found.hits] == [f"d{i}" for i in np.argsort(-scores, kind="stable")[:5]]
        np.testing.assert_allclose([hit.score for hit in found.hits], np.sort(scores)[::-1][:5], atol=1e-5)
    assert COMPILED == []
    assert client.get("/healthz").json() == {"status": "ok"}


GOOD = {"model": "tiny:document", "input": "text"}


def test_models_and_metrics(client):
    found = client.get("/v1/models").json()
    assert [m["id"] for m in found["data"]] == ["tiny:query", "tiny:query-direct", "tiny:document"]
    embed(client, ["one", "two"])
    said = client.get("/metrics").text
    assert 'r3jax_requests_total{path="/v1/embeddings",status="200"}' in said
    assert "r3jax_waiting_rows 0.0" in said and 'path="/nothing"' not in said


def test_the_page_loads_nothing(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not any(word in page.text for word in ("http://", "https://", " src=", "@import", "url("))


@pytest.fixture(scope="module")
def roomy(served):
    """The address of a server with the limits of `serve`."""
    with running(served, Limits(hits=LIMITS.hits)) as address:
        yield address


def test_openais_client(roomy, model):
    http_clients.openai_agrees(roomy, "tiny", model)


def test_langchain(roomy, model):
    http_clients.langchain_agrees(roomy, "tiny", model)


def test_the_published_schema_is_kept(roomy):
    http_clients.schema_is_kept(roomy, 100)


def test_the_schema_is_of_this_model(client):
    said = client.get("/openapi.json").json()
    fields = said["components"]["schemas"]["EmbeddingRequest"]["properties"]
    assert fields["model"]["enum"] == ["tiny:query", "tiny:query-direct", "tiny:document"]
    assert fields["dimensions"]["anyOf"][0]["maximum"] == 32
    text, texts, ids, several = fields["input"]["anyOf"]
    assert texts["maxItems"] == several["maxItems"] == 40
    assert ids["items"]["maximum"] == 511 and 511 in ids["items"]["not"]["enum"]
    for path in said["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
    assert "security" not in said["paths"]["/v1/models"]["get"]


def test_a_key(served):
    with running(served, key="secret") as address, httpx2.Client(base_url=address, timeout=60) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/search"), ("GET", "/x")):
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
                assert "send Authorization: Bearer KEY" in answer.json()["error"]["message"]
        assert client.get("/").status_code == client.get("/healthz").status_code == 200
        client.headers["Authorization"] = "Bearer secret"
        assert len(client.get("/v1/models").json()["data"]) == 3
        said = client.get("/openapi.json").json()
        assert said["paths"]["/v1/models"]["get"]["security"] == [{"HTTPBearer": []}]


OPENED: list[str] = []  # by this process, the server's included, while a test looks
LOOKING = threading.Event()
sys.addaudithook(lambda event, given: OPENED.append(str(given[0])) if event == "open" and LOOKING.is_set() else None)


def test_no_request_names_a_file(client, tmp_path):
    """Whatever a client writes, wherever it may: no file of such a name is opened, and the server goes on."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    up = "../" * len(tmp_path.parts)
    LOOKING.set()
    try:
        for name in (str(secret), up + str(secret), f"file://{secret}", f"{secret}\0.html"):
            quoted = urllib.parse.quote(name, safe="")
            for path in (f"/{quoted}", f"/v1/models/{quoted}", f"/?file={quoted}", f"/openapi.json?config={quoted}"):
                assert "secret\n" not in client.get(path, headers={"X-File": quoted}).text
            for path, body in (
                ("/v1/embeddings", {"model": name, "input": "x"}),
                ("/v1/embeddings", {"model": f"{name}:document", "input": "x"}),
                ("/v1/embeddings", GOOD | {"input": name, "user": name}),
                ("/search", {"query": name, "index": name}),
                ("/search", {"query": name, "k": 1}),
            ):
                assert client.post(path, json=body).status_code in (200, 400, 404)
    finally:
        LOOKING.clear()
    assert OPENED and not any("secret" in path for path in OPENED)  # the page itself is read


class Slow(Served):
    """Reads only when it is told to."""

    def __init__(self, served):
        self.__dict__.update(served.__dict__)
        self.go, self.begun = threading.Event(), threading.Event()

    def read(self, think, rows):
        self.begun.set()
        assert self.go.wait(20)
        return super().read(think, rows)


def ask(address, body, found):
    answer = httpx2.post(f"{address}/v1/embeddings", json=body, timeout=60)
    found.append((answer.status_code, answer.json()))


def test_a_full_queue_and_a_late_answer(served):
    slow = Slow(served)
    limits = Limits(waiting=2, seconds=2.0)
    found: list = []
    with running(slow, limits) as address:
        first = threading.Thread(target=ask, args=(address, GOOD, found))
        first.start()
        assert slow.begun.wait(20)
        ask(address, GOOD | {"input": ["a", "b", "c"]}, found)
        assert found[0][0] == 503 and "too many texts are waiting" in found[0][1]["error"]["message"]
        first.join()
        assert found[1][0] == 503 and "not done within 2 s" in found[1][1]["error"]["message"]
        slow.go.set()
        ask(address, GOOD, found)
        assert found[2][0] == 200
        gone = httpx2.post(f"{address}/v1/embeddings", content=iter([b"{"] * 30), timeout=60)
        assert gone.status_code == 400


def test_more_requests_than_are_answered_at_once(served):
    """They are refused before their bodies are read; whoever watches the server is not."""
    slow = Slow(served)
    found: list = []
    with running(slow, Limits(requests=1)) as address:
        first = threading.Thread(target=ask, args=(address, GOOD, found))
        first.start()
        assert slow.begun.wait(20)
        refused = httpx2.post(f"{address}/search", json={"query": "x"}, timeout=60)
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        assert "too many requests are being answered" in refused.json()["error"]["message"]
        # Not even the head is read to its end.
        with socket.create_connection(address.removeprefix("http://").split(":")) as opened:
            opened.sendall(b"POST /search HTT")
            assert opened.makefile("rb").read() == overloaded(TOO_MANY).raw()
        assert httpx2.get(f"{address}/healthz").status_code == httpx2.get(f"{address}/metrics").status_code == 200
        slow.go.set()
        first.join()
        assert found[0][0] == 200 and httpx2.post(f"{address}/search", json={"query": "x"}).status_code == 200


class Napping(Guard):
    """Holds the loop up at /nap, so that what comes meanwhile is read in one round."""

    async def __call__(self, scope, receive, send):
        if scope.get("path") == "/nap":
            time.sleep(1)
        await super().__call__(scope, receive, send)


def test_many_that_come_in_one_round_of_the_loop(served):
    """Heads count when they are read, not when the application is called: all but one are turned away unread."""
    made = app.make_app(served, Limits(requests=2))
    guard = Napping(made.app, made.limits, None, made.metrics)
    head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with running(served, guard=guard) as address, contextlib.ExitStack() as opened:
        where = address.removeprefix("http://").split(":")
        connections = [opened.enter_context(socket.create_connection(where)) for _ in range(9)]
        for connection in connections:  # taken by the loop, not only by the system
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            while not (answer := connection.recv(4096)).endswith(b'"ok"}'):
                assert answer
        connections[0].sendall(head.replace(b"/v1/models", b"/nap"))
        time.sleep(0.3)
        for connection in connections[1:]:
            connection.sendall(head)
        answers = [connection.makefile("rb").read() for connection in connections[1:]]
        turned_away = answers.count(overloaded(TOO_MANY).raw())
        assert 6 <= turned_away < 8 and sum(answer.startswith(b"HTTP/1.1 200") for answer in answers) == 8 - turned_away
        # What a client does wrong is no request for ever.
        for sent in (
            b"GET / HTTP/1.1\r\nX",
            b"\0\r\n\r\n",
            head + b"?",
            head * 3,
            b"POST /search HTTP/1.1\r\nHost: x\r\n",
        ):
            with socket.create_connection(where) as connection:
                connection.sendall(sent)
        deadline = time.monotonic() + 20
        while (guard.begun or guard.active) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert guard.begun == guard.active == 0


POSTED = b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"


@pytest.mark.parametrize(
    "sent, dripped, said",
    [
        (b"", b"", "head did not arrive within 0.5 s"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ", b"x", "head did not arrive within 0.5 s"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /", b"x", "head did not arrive within 0.5 s"),
        (POSTED, b" ", "body did not arrive within 1 s"),
    ],
)
def test_clients_that_dawdle(served, sent, dripped, said):
    """A byte now and then keeps no connection open, the first request of one or the second."""
    with running(served, Limits(seconds=1.0, head_seconds=0.5)) as address:
        with socket.create_connection(("127.0.0.1", int(address.split(":")[-1])), timeout=0.1) as client:
            client.sendall(sent)
            answer, end = b"", time.monotonic() + 20
            while b" 408 " not in answer or not answer.endswith(b"}"):
                assert time.monotonic() < end
                with contextlib.suppress(TimeoutError):
                    answer += client.recv(4096)
                with contextlib.suppress(ConnectionError):
                    client.sendall(dripped)
        assert said in answer.decode()
        assert httpx2.get(f"{address}/healthz").status_code == 200


def test_bodies_that_do_not_come_keep_nobody_out(served):
    """Not by their number, while they are waited for, and not by their size."""
    limits = Limits(requests=2, bodies_bytes=190_000, body_seconds=3.0)
    large = POSTED.replace(b"99", b"150000") + b" " * 100_000
    with running(served, limits) as address, contextlib.ExitStack() as opened:

        def send(sent):
            connection = socket.create_connection(address.removeprefix("http://").split(":"), timeout=20)
            connection.sendall(sent)
            return opened.enter_context(connection)

        def ask() -> int:
            return httpx2.post(f"{address}/search", json={"query": "x"}, timeout=20).status_code

        silent = [send(POSTED) for _ in range(5)] + [send(large)]
        assert ask() == 200
        assert b" 503 " in (refused := send(large).makefile("rb").read()) and b"too much is being sent" in refused
        assert ask() == 200
        for connection in silent:
            answer = connection.makefile("rb").read()
            assert b" 408 " in answer and b"or none of it for 3 s" in answer
        begun = send(large)  # there is room again
        assert ask() == 200
        begun.sendall(b" " * 50_000)
        assert b" 400 " in begun.recv(4096)


def test_the_system_allows_as_many_connections_as_it_can(served):
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few - 1, most))
    with running(served):
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)


def test_without_an_index_or_a_head(served, model):
    bare = Served("bare", model.params, model.reader, model.max_document, False, None)
    with running(bare) as address, httpx2.Client(base_url=address, timeout=60) as client:
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["bare:query-direct", "bare:document"]
        answer = client.post("/search", json={"query": "x"})
        assert answer.status_code == 404 and "start it with an INDEX" in answer.json()["error"]["message"]
        assert "/search" not in client.get("/openapi.json").json()["paths"]


def test_stopping_answers_what_was_taken(served):
    """A request that is being read when the server is told to stop is answered; new ones find nobody."""
    slow = Slow(served)
    found: list = []
    with running(slow) as address:
        asking = threading.Thread(target=ask, args=(address, GOOD | {"input": ["a"] * 40}, found))
        asking.start()
        assert slow.begun.wait(20)
        threading.Timer(0.5, slow.go.set).start()
    asking.join()
    assert found[0][0] == 200 and len(found[0][1]["data"]) == 40
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{address}/healthz")


DRAIN = """
import asyncio, sys
from r3jax.run.config import run_main
from r3jax.serving import server
from r3jax.serving.guard import Guard
from r3jax.serving.limits import Limits
from r3jax.serving.metrics import Metrics

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        for said in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{said}.complete"})
        print("closed", flush=True)
        return
    print("asked", flush=True)
    await asyncio.sleep(1)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"done"})

def main(argv):
    socket = server.bind("127.0.0.1", 0)
    started = lambda: print(socket.getsockname()[1], flush=True)
    server.Server(Guard(app, Limits(), None, Metrics(lambda: 0)), started).run([socket])

run_main(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_with_0(number):
    process = fixtures.run_python("-c", DRAIN)
    port = int(process.stdout.readline())
    found: list = []
    asking = threading.Thread(target=lambda: found.append(httpx2.get(f"http://127.0.0.1:{port}/", timeout=20)))
    asking.start()
    assert process.stdout.readline() == "asked\n"
    process.send_signal(number)
    asking.join()
    said, errors = process.communicate(timeout=20)
    assert found[0].text == "done" and said == "closed\n"
    assert process.returncode == 0 and errors == ""


def test_an_address_that_cannot_be_had_is_told_before_anything_is_loaded():
    with server.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        for flag, said in ((f"--port={port}", f"--port={port}"), ("--host=nobody.invalid", "--host=nobody.invalid")):
            with pytest.raises(UserError, match=f"{said}.* cannot be bound"):
                serve.main(["nowhere", flag])
