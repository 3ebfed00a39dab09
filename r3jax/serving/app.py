"""The web application: routes, what is said when one fails, and the published schema."""

import contextlib
import logging
import pathlib
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

import r3jax
from r3jax.serving import answers, embeddings
from r3jax.serving.desk import Desk
from r3jax.serving.guard import Guard
from r3jax.serving.limits import Limits
from r3jax.serving.model import Served
from r3jax.serving.refusal import Refusal, of_validation
from r3jax.serving.schema import Error, Health, embedding_request, search_request

log = logging.getLogger("r3jax")
PAGE = pathlib.Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; " + (
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PROMETHEUS = "text/plain; version=1.0.0; charset=utf-8"


def make_app(served: Served, limits: Limits | None = None, key: str | None = None) -> Guard:
    """The ASGI application. With a `key` everything but the page, /healthz and /openapi.json asks for it.

    Its shutdown reads what still waits in the queue.
    """
    desk = Desk(served, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        desk.batcher.close()

    # FastAPI's own pages about the schema load scripts from the network.
    app = FastAPI(
        title="r3jax",
        version=r3jax.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    problems: dict = {"4XX": {"model": Error, "description": "The request is at fault; one sentence says how."}}
    problems |= {503: {"model": Error, "description": "Too much at once; try again."}}
    # `Guard` has checked the key: this only tells the schema.
    locked = [Security(HTTPBearer(auto_error=False))] if key is not None else []
    app.include_router(embeddings.router(desk, problems), dependencies=locked)
    if served.found_in is not None:
        app.include_router(answers.router(desk, problems), dependencies=locked)
    _add_small_routes(app, desk, problems, locked)
    _add_failures(app, served, desk.limits)
    return Guard(app, desk.limits, key, desk.metrics)


def _add_small_routes(app: FastAPI, desk: Desk, problems: dict, locked: list) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)

    @app.get("/healthz", responses={200: {"model": Health}})
    async def healthz() -> dict:
        """Whether requests are taken."""
        return {"status": "ok"}

    text: dict = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=PlainTextResponse, responses={**text, **problems}, dependencies=locked)
    async def metrics() -> PlainTextResponse:
        """Figures in Prometheus' text form."""
        return PlainTextResponse(desk.metrics.text())


def _add_failures(app: FastAPI, served: Served, limits: Limits) -> None:
    about = {"/v1/embeddings": embedding_request(served, limits)[1], "/search": search_request(served, limits)[1]}

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return of_validation(error.errors(), about[request.url.path]).response()

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        said = f"{error.detail}."
        if error.status_code == 400:
            said = "the body cannot be read as JSON in UTF-8."
        elif request.url.path == "/search" and served.found_in is None:
            said = "this server has no documents to search in; start it with an INDEX: r3jax serve MODEL INDEX."
        elif error.status_code == 404:
            said = f"there is no {request.url.path}; /openapi.json says what there is."
        elif error.status_code == 405:
            said = f"{request.url.path} does not take {request.method}."
        return Refusal(error.status_code, said, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return Refusal(500, "the server has failed at this; its log says why.").response()
