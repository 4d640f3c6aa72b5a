"""The HTTP API: images in, meshes out. FastAPI in front of a `MeshQueue`."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from elastic3d import __version__
from elastic3d.errors import UserError
from elastic3d.serve.config import ServeConfig
from elastic3d.serve.guard import BODY, Guard, error_response
from elastic3d.serve.metrics import Metrics
from elastic3d.serve.queue import Job, JobState, MeshQueue, MeshRequest, QueueClosed, QueueFull, sentence
from elastic3d.serve.uploads import decode_image

MEDIA_TYPES = {
    "glb": "model/gltf-binary",
    "ply": "application/octet-stream",
    "obj": "model/obj",
    "stl": "model/stl",
}
JSON, FORM = "application/json", "multipart/form-data"
POLL_S = 0.01
ASK_CLIENT_S = 0.25
Asked = TypeVar("Asked", bound=BaseModel)


class MeshBody(MeshRequest):
    """The JSON form of a request."""

    image: str = Field(description="the image file, base64")
    wait: bool = Field(True, description="answer with the mesh; false: at once, with a job")

    def request(self) -> MeshRequest:
        """What the job asks for."""
        return MeshRequest.model_validate(self.model_dump(exclude={"image", "wait"}))


class HunyuanBody(BaseModel):
    """A request to Hunyuan3D-2's own server. Fields that say how that program works inside are ignored."""

    model_config = ConfigDict(extra="ignore")

    image: str
    seed: int = Field(1234, ge=0, lt=2**63)
    octree_resolution: int | None = Field(None, ge=8, le=512)
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    face_count: int | None = Field(None, ge=4, le=10_000_000)
    texture: bool = False
    type: Literal["glb", "ply", "obj", "stl"] = "glb"

    def request(self) -> MeshRequest:
        """The same in this project's names."""
        if self.texture:
            raise HTTPException(400, "texture is true, but this server makes shapes without texture")
        return MeshRequest(
            seed=self.seed,
            steps=self.num_inference_steps,
            guidance=self.guidance_scale,
            resolution=self.octree_resolution,
            max_faces=self.face_count,
            format=self.type,
        )


def create_app(queue: MeshQueue, config: ServeConfig, metrics: Metrics) -> FastAPI:
    """The application around a queue, which is closed when the server stops."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(queue.close, config.stop_s)

    app = FastAPI(title="elastic3d", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, config=config, metrics=metrics, queue=queue)
    _add_errors(app)
    _add_meshes(app, queue, config)
    _add_jobs(app, queue, config)
    _add_hunyuan(app, queue, config)
    _add_pages(app, queue, metrics)
    app.state.model, app.state.queue = queue.models.info().config.model, queue
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(UserError)
    async def of_the_user(_: Request, error: UserError) -> JSONResponse:
        return error_response(400, str(error))

    @app.exception_handler(ValidationError)
    async def of_a_value(_: Request, error: ValidationError) -> JSONResponse:
        return error_response(400, sentence(error.errors()))

    @app.exception_handler(ClientDisconnect)
    async def of_nobody(_: Request, error: ClientDisconnect) -> JSONResponse:
        return error_response(499, "the client went away")

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def of_the_program(_: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"the server failed: {type(error).__name__}")


# --------------------------------------------------------------------------------------------------- requests


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPException(
            400, "image is not base64, expected the bytes of an image file in base64"
        ) from error


async def _read_json(request: Request, kind: type[Asked]) -> Asked:
    """A JSON body. Not by `request.body` or an argument of the endpoint: these keep its bytes until the answer."""
    _check_kind(request, JSON)
    return kind.model_validate_json(b"".join([part async for part in request.stream()]))


async def _read_mesh_body(request: Request) -> tuple[bytes, MeshRequest, bool]:
    """Image bytes, options and whether to wait, from JSON or a multipart form."""
    if _check_kind(request, FORM, JSON) == JSON:
        body = await _read_json(request, MeshBody)
        return _from_base64(body.image), body.request(), body.wait
    async with request.form(max_files=1, max_fields=32) as form:
        upload = form.get("image")
        if not isinstance(upload, UploadFile):
            raise HTTPException(400, "image is missing, expected a file in the form's field image")
        body = MeshBody.model_validate({**form, "image": ""})
        return await upload.read(), body.request(), body.wait


def _check_kind(request: Request, *expected: str) -> str:
    """The content type of a body. 415 for another one than is expected."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in expected:
        raise HTTPException(415, f"content-type is {kind or 'missing':.80}, expected {' or '.join(expected)}")
    return kind


async def _submit(queue: MeshQueue, config: ServeConfig, data: bytes, wanted: MeshRequest) -> Job:
    try:
        queue.check_room()
        image = await run_in_threadpool(decode_image, data, config.max_pixels)
        return queue.submit(image, wanted)
    except QueueClosed as error:
        raise HTTPException(503, str(error)) from error
    except QueueFull as error:
        raise HTTPException(429, str(error), {"Retry-After": "5"}) from error


async def _wait_for(job: Job, queue: MeshQueue, request: Request, timeout_s: float) -> Response:
    """The finished mesh; the job is given up with the client or the time."""
    request.scope[BODY].drop()
    deadline, asked = time.monotonic() + timeout_s, time.monotonic()
    try:
        while not job.finished.is_set():
            await asyncio.sleep(POLL_S)
            now = time.monotonic()
            if now > deadline:
                raise HTTPException(
                    504, f"the mesh was not ready after {timeout_s:g} s, expected to ask with wait=false"
                )
            if now - asked > ASK_CLIENT_S:
                asked = now
                if await request.is_disconnected():
                    raise HTTPException(499, "the client went away")
        return _mesh_response(job, _file_of(job).read_bytes())
    finally:
        queue.cancel(job)  # nothing of it is kept once it is answered


def _file_of(job: Job) -> Path:
    if job.state is JobState.failed:
        raise HTTPException(500 if job.internal else 400, job.error)
    if job.state is JobState.cancelled:
        raise HTTPException(503, "the job was cancelled: the server stops")
    if job.file is None:
        raise HTTPException(409, f"job {job.id} is {job.state.value}, expected done")
    return job.file


def _mesh_response(job: Job, content: bytes) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="mesh.{job.request.format}"'}
    return Response(content, headers=headers, media_type=MEDIA_TYPES[job.request.format])


# -------------------------------------------------------------------------------------------------- endpoints


def _add_meshes(app: FastAPI, queue: MeshQueue, config: ServeConfig) -> None:
    schema = MeshBody.model_json_schema()
    form = schema | {"properties": schema["properties"] | {"image": {"type": "string", "format": "binary"}}}

    async def submit(request: Request) -> tuple[Job, bool]:
        data, wanted, wait = await _read_mesh_body(request)
        if not wait:
            _check_jobs(config)
        return await _submit(queue, config, data, wanted), wait

    @app.post(
        "/v1/meshes",
        summary="Make a mesh of an image",
        openapi_extra=_described({FORM: form, JSON: schema}),
        responses={200: {"content": {"model/gltf-binary": {}}}, 202: {"description": "a job"}},
        response_model=None,
    )
    async def make_mesh(request: Request) -> Response:
        job, wait = await submit(request)
        if not wait:
            return JSONResponse(job.describe(), 202, {"Location": f"/v1/jobs/{job.id}"})
        return await _wait_for(job, queue, request, config.timeout_s)


def _described(schemas: dict[str, Any]) -> dict[str, Any]:
    """What OpenAPI says of a body that the endpoint reads by itself: its JSON schema by content type."""
    content = {kind: {"schema": schema} for kind, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


def _check_jobs(config: ServeConfig) -> None:
    """501 where another replica than the job's may be asked for it."""
    if config.replicas > 1:
        raise HTTPException(
            501,
            f"there are no jobs with {config.replicas} replicas, expected to wait for the answer (wait=true)",
        )


def _add_jobs(app: FastAPI, queue: MeshQueue, config: ServeConfig) -> None:
    def known(id: str) -> Job:
        _check_jobs(config)
        job = queue.find(id)
        if job is None:
            raise HTTPException(404, "there is no such job: it never was, was deleted, or is too old")
        return job

    @app.get("/v1/jobs/{id}", summary="How far a job is")
    async def job_state(id: str) -> dict[str, Any]:
        return known(id).describe()

    @app.get("/v1/jobs/{id}/mesh", summary="The mesh of a finished job", response_model=None)
    async def job_mesh(id: str) -> Response:
        job = known(id)
        return _mesh_response(job, await run_in_threadpool(_file_of(job).read_bytes))

    @app.delete("/v1/jobs/{id}", summary="Cancel a job, or delete its mesh", status_code=204)
    async def delete_job(id: str) -> None:
        queue.cancel(known(id))


def _add_hunyuan(app: FastAPI, queue: MeshQueue, config: ServeConfig) -> None:
    described = _described({JSON: HunyuanBody.model_json_schema()})

    async def submit(request: Request) -> Job:
        body = await _read_json(request, HunyuanBody)
        return await _submit(queue, config, _from_base64(body.image), body.request())

    @app.post(
        "/generate", summary="As Hunyuan3D-2's server: the mesh", openapi_extra=described, response_model=None
    )
    async def generate(request: Request) -> Response:
        return await _wait_for(await submit(request), queue, request, config.timeout_s)

    @app.post("/send", summary="As Hunyuan3D-2's server: a job", openapi_extra=described)
    async def send(request: Request) -> dict[str, str]:
        _check_jobs(config)
        return {"uid": (await submit(request)).id}

    @app.get("/status/{uid}", summary="As Hunyuan3D-2's server: how far a job is")
    async def status(uid: str) -> dict[str, str]:
        _check_jobs(config)
        job = queue.find(uid)
        if job is None or job.state in (JobState.failed, JobState.cancelled):
            return {"status": "error", "message": job.error if job else "there is no such job"}
        if job.state is not JobState.done:
            return {"status": "processing"}
        content = await run_in_threadpool(_file_of(job).read_bytes)
        return {"status": "completed", "model_base64": base64.b64encode(content).decode()}


def _add_pages(app: FastAPI, queue: MeshQueue, metrics: Metrics) -> None:
    @app.get("/v1/models", summary="The model that is loaded")
    async def models() -> dict[str, Any]:
        info = queue.models.info()
        described = {
            "id": info.config.model,
            "weights_sha256": info.weights_sha256,
            "elastic": info.elastic,
            "dial": None if info.dial is None else info.dial.values,
            "defaults": info.defaults,
        }
        return {"models": [described]}

    @app.get("/healthz", summary="Whether the server works")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": queue.waiting, "running": queue.running}

    @app.get("/metrics", summary="Counters for Prometheus", response_model=None)
    async def counters() -> Response:
        content, kind = metrics.exposition(queue.waiting, queue.running)
        return Response(content, media_type=kind)

    from swagger_ui_bundle import swagger_ui_path

    app.mount("/docs/assets", StaticFiles(directory=swagger_ui_path))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="elastic3d API",
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="/docs/assets/favicon-32x32.png",
        )
