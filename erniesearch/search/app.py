"""Routes of the service: search, explain, attention, health and the page."""

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from erniesearch import __version__
from erniesearch.errors import UserError
from erniesearch.search.page_file import load_page
from erniesearch.search.schemas import (
    MAX_DEPTH,
    AttentionRequest,
    AttentionResponse,
    ExplainRequest,
    ExplainResponse,
    Health,
    Problem,
    SearchRequest,
    SearchResponse,
    SearchStep,
)
from erniesearch.search.system import SearchSystem, UnknownPassageError

Responses = dict[int | str, dict[str, Any]]
PROBLEMS: Responses = {422: {"model": Problem}}
INTERNAL = "internal error; the server's log says more"


JSON_LINES = "application/x-ndjson"


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

    def arguments(request: SearchRequest) -> tuple[str, int, int, int]:
        return (
            request.query, request.depth,
            _within("late_interaction_depth", request.late_interaction_depth, late_limit),
            _within("cross_encoder_depth", request.cross_encoder_depth, cross_limit),
        )  # fmt: skip

    _add_search(app, system, arguments)
    _add_pair(app, system)

    @app.get("/health")
    async def health() -> Health:
        return Health(
            status="ok", passages=len(system.index.pids), models=list(system.models),
            first_stage=system.first_stage, max_depth=MAX_DEPTH,
            late_interaction_depth=late_limit, cross_encoder_depth=cross_limit,
            attention_layers=system.attention_layers,
        )  # fmt: skip

    return app


# Plain functions run in threads, so that waiting for the models blocks nobody's connection.
def _add_search(
    app: FastAPI, system: SearchSystem, arguments: Callable[[SearchRequest], tuple[Any, ...]]
) -> None:
    @app.post("/search", responses=PROBLEMS)
    def post_search(request: SearchRequest) -> SearchResponse:
        return SearchResponse.model_validate(system.search(*arguments(request)))

    @app.get("/search", responses=PROBLEMS)
    def get_search(request: Annotated[SearchRequest, Query()]) -> SearchResponse:
        return post_search(request)

    step = SearchStep.model_json_schema(ref_template="#/components/schemas/{model}")
    del step["$defs"]  # those of /search
    lines: Responses = {200: {"content": {JSON_LINES: {"schema": step}}}}

    @app.post("/search/stream", response_class=StreamingResponse, responses=PROBLEMS | lines)
    def stream_search(request: SearchRequest) -> StreamingResponse:
        """The same search, a line whenever a model has scored more: see the schema."""
        steps = map(SearchStep.model_validate, system.search_steps(*arguments(request)))
        return StreamingResponse(_lines(next(steps), steps), media_type=JSON_LINES)


def _add_pair(app: FastAPI, system: SearchSystem) -> None:
    unknown = PROBLEMS | {404: {"model": Problem}}

    @app.post("/explain", responses=unknown)
    def post_explain(request: ExplainRequest) -> ExplainResponse:
        matches = system.explain(request.query, request.pid)
        return ExplainResponse.model_validate(
            {
                "query": request.query, "pid": request.pid, "text": system.text(request.pid),
                "score": sum(match.similarity for match in matches), "matches": matches,
            }
        )  # fmt: skip

    @app.get("/explain", responses=unknown)
    def get_explain(request: Annotated[ExplainRequest, Query()]) -> ExplainResponse:
        return post_explain(request)

    @app.post("/attention", responses=unknown)
    def post_attention(request: AttentionRequest) -> AttentionResponse:
        maps = system.attention(request.query, request.pid, request.layer)
        return AttentionResponse.model_validate(
            {
                "query": request.query, "pid": request.pid, "text": system.text(request.pid),
                "layer": maps.layer, "tau": maps.tau, "divergence": maps.divergence,
                "query_tokens": maps.query, "passage_tokens": maps.passage,
                "cross_encoder": maps.cross_encoder.tolist(),
                "late_interaction": maps.late_interaction.tolist(),
                "shares": maps.shares.tolist(), "divergences": maps.divergences.tolist(),
            }
        )  # fmt: skip

    @app.get("/attention", responses=unknown)
    def get_attention(request: Annotated[AttentionRequest, Query()]) -> AttentionResponse:
        return post_attention(request)


def _empty_app() -> FastAPI:
    """The page, and answers to what goes wrong."""
    # No documentation pages: they load scripts from elsewhere. /openapi.json stays.
    app = FastAPI(title="ERNIE-Search", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    content, headers = load_page()

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(content, headers=headers)

    return app


def _within(name: str, wanted: int | None, limit: int) -> int:
    if wanted is not None and wanted > limit:
        raise UserError(f"{name} is {wanted}: this server allows at most {limit}")
    return limit if wanted is None else wanted


def _lines(first: SearchStep, rest: Iterator[SearchStep]) -> Iterator[str]:
    """What comes when the answer has begun can no longer be another status: it is a line."""
    try:
        for step in itertools.chain([first], rest):
            yield step.model_dump_json() + "\n"
    except UserError as error:
        yield Problem(detail=str(error)).model_dump_json() + "\n"
    except Exception:
        logging.getLogger("uvicorn.error").exception("a search failed after it had begun")
        yield Problem(detail=INTERNAL).model_dump_json() + "\n"


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
    return _problem(500, INTERNAL)
