"""Routes of the service: search, explain, health and the page."""

import base64
import hashlib
import re
from importlib import resources
from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from erniesearch import __version__
from erniesearch.errors import UserError
from erniesearch.search.schemas import (
    ExplainRequest,
    ExplainResponse,
    Health,
    Problem,
    SearchRequest,
    SearchResponse,
)
from erniesearch.search.system import SearchSystem, UnknownPassageError

PROBLEMS: dict[int | str, dict[str, type[Problem]]] = {422: {"model": Problem}}


def create_app(
    system: SearchSystem,
    late_interaction_depth: int | None = None,
    cross_encoder_depth: int | None = None,
) -> FastAPI:
    """The application over a loaded system.

    Args:
        late_interaction_depth, cross_encoder_depth: defaults of a request and the most it may ask
            for; None as in :meth:`SearchSystem.rerank_depth`.

    Raises:
        UserError: for a depth of a model that the system does not have.
    """
    late_limit = system.rerank_depth("late_interaction", late_interaction_depth)
    cross_limit = system.rerank_depth("cross_encoder", cross_encoder_depth)
    app = _empty_app()

    def run_search(request: SearchRequest) -> SearchResponse:
        late = _within("late_interaction_depth", request.late_interaction_depth, late_limit)
        cross = _within("cross_encoder_depth", request.cross_encoder_depth, cross_limit)
        result = system.search(request.query, request.depth, late, cross)
        return SearchResponse.model_validate(result)

    def run_explain(request: ExplainRequest) -> ExplainResponse:
        matches = system.explain(request.query, request.pid)
        return ExplainResponse.model_validate(
            {
                "query": request.query, "pid": request.pid, "text": system.text(request.pid),
                "score": sum(match.similarity for match in matches), "matches": matches,
            }
        )  # fmt: skip

    # Plain functions run in threads, so that waiting for the models blocks nobody's connection.
    @app.post("/search", responses=PROBLEMS)
    def post_search(request: SearchRequest) -> SearchResponse:
        return run_search(request)

    @app.get("/search", responses=PROBLEMS)
    def get_search(request: Annotated[SearchRequest, Query()]) -> SearchResponse:
        return run_search(request)

    @app.post("/explain", responses=PROBLEMS | {404: {"model": Problem}})
    def post_explain(request: ExplainRequest) -> ExplainResponse:
        return run_explain(request)

    @app.get("/explain", responses=PROBLEMS | {404: {"model": Problem}})
    def get_explain(request: Annotated[ExplainRequest, Query()]) -> ExplainResponse:
        return run_explain(request)

    @app.get("/health")
    async def health() -> Health:
        return Health(
            status="ok", passages=len(system.index.pids), models=list(system.models),
            late_interaction_depth=late_limit, cross_encoder_depth=cross_limit,
        )  # fmt: skip

    return app


def _empty_app() -> FastAPI:
    """The page, and answers to what goes wrong."""
    # No documentation pages: they load scripts from elsewhere. /openapi.json stays.
    app = FastAPI(title="ERNIE-Search", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    content, headers = _page()

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(content, headers=headers)

    return app


def _within(name: str, wanted: int | None, limit: int) -> int:
    if wanted is not None and wanted > limit:
        raise UserError(f"{name} is {wanted}: this server allows at most {limit}")
    return limit if wanted is None else wanted


def _page() -> tuple[str, dict[str, str]]:
    """The page, and headers under which only its own script and style run."""
    content = resources.files("erniesearch.search").joinpath("page.html").read_text("utf-8")

    def source(element: str) -> str:
        found = re.search(f"<{element}>(.*?)</{element}>", content, re.DOTALL)
        assert found is not None
        digest = hashlib.sha256(found[1].encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none';"
        f" form-action 'self'; frame-ancestors 'none';"
        f" script-src {source('script')}; style-src {source('style')}"
    )
    return content, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}


def _problem(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status)


def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = []
    for problem in error.errors():
        place = ".".join(map(str, problem["loc"][1:]))  # the first says body or query
        problems.append(f"{place}: {problem['msg']}" if place else problem["msg"])
    return _problem(422, "; ".join(problems))


def _user_error(request: Request, error: Exception) -> JSONResponse:
    return _problem(404 if isinstance(error, UnknownPassageError) else 422, str(error))


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    response = _problem(error.status_code, str(error.detail))
    response.headers.update(error.headers or {})
    return response


def _internal_error(request: Request, error: Exception) -> JSONResponse:
    # The server's log has the traceback; the caller gets none.
    return _problem(500, "internal error; the server's log says more")
