"""OpenAI's ``/v1/fine_tuning/jobs``: adapters that are trained beside requests."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request

from preft_jax.errors import ConfigError, plain
from serve.jobs import Checkpoint, Event, FineTuning, JobRecord, JobSpec
from serve.server.auth import Identity, shown_owner
from serve.server.bodies import Bodies
from serve.server.failures import ApiError, not_there
from serve.server.files import add_files, find_file, known_query, page
from serve.server.protocol import FineTuningBody
from serve.server.serving import Serving
from serve.server.tuning import Tuning

_SHOWN = 20
_MOST = 1_000
_JOBS = "/v1/fine_tuning/jobs"
_ALL = ("GET", "POST", "DELETE")
_OFF = {
    "/v1/files": _ALL,
    "/v1/files/{rest:path}": _ALL,
    "/v1/fine_tuning/{rest:path}": _ALL,
    "/v1/models/{name:path}": ("DELETE",),
}
_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)

Limit = Annotated[int, Query(ge=1, le=_MOST)]


def add_fine_tuning(app: FastAPI, serving: Serving, bodies: Bodies, errors: dict[int | str, Any]) -> None:
    """Add the routes of files and jobs; where there is no fine-tuning they say how to switch it on."""
    if serving.tuning is None:
        _add_refusals(app)
        return
    add_files(app, serving.tuning, errors)
    _add_create(app, serving, serving.tuning, bodies, errors)
    _add_jobs(app, serving.tuning, errors)
    _add_changes(app, serving.tuning, errors)
    _add_delete(app, serving, serving.tuning, errors)


def job_object(job: JobRecord) -> dict[str, Any]:
    """Return a job as OpenAI's API shows it, with ``step``, ``total_steps`` and ``priority``, which are ours."""
    hyperparameters = _numbers(job.spec.hyperparameters)
    ended = job.finished_at is not None
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "model": job.model,
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": None,
        "status": job.status,
        "error": None if job.error is None else {"code": None, "message": "", "param": None, **job.error},
        "fine_tuned_model": job.fine_tuned_model,
        "trained_tokens": job.trained_tokens if ended else None,
        "training_file": job.spec.training_file,
        "validation_file": job.spec.validation_file,
        "result_files": [],
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "seed": job.spec.seed or 0,
        "user_provided_suffix": job.spec.suffix,
        "organization_id": shown_owner(job.owner),
        "integrations": [],
        "metadata": dict(job.spec.metadata),
        "step": job.step,
        "total_steps": job.total_steps,
        "priority": job.spec.priority,
    }


def event_object(event: Event) -> dict[str, Any]:
    """Return an event as OpenAI's API shows it."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": _numbers(event.data),
    }


def checkpoint_object(checkpoint: Checkpoint, job_id: str) -> dict[str, Any]:
    """Return a checkpoint as OpenAI's API shows it."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuning_job_id": job_id,
        "fine_tuned_model_checkpoint": checkpoint.fine_tuned_model_checkpoint,
        "step_number": checkpoint.step_number,
        "metrics": {"step": checkpoint.step_number, **_numbers(checkpoint.metrics)},
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as JSON can hold them: a number that is none becomes null."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}


def _add_refusals(app: FastAPI) -> None:
    async def refuse(request: Request) -> None:
        raise ApiError(
            404,
            "this server does not fine-tune; start it with --enable-finetuning, and --finetune-state DIR or "
            "--state-dir DIR for what it keeps",
            code="fine_tuning_off",
            headers={"Connection": "close"},
        )

    for path, methods in _OFF.items():
        app.add_api_route(path, refuse, methods=list(methods), include_in_schema=False)


def _add_create(app: FastAPI, serving: Serving, tuning: Tuning, bodies: Bodies, errors: dict[int | str, Any]) -> None:
    uploads = tuning.uploads

    def make(body: FineTuningBody, identity: Identity) -> JobRecord:
        """Queue a job of files that are there and whole."""
        files = [find_file(uploads, body.training_file, identity, "training_file")]
        if body.validation_file is not None:
            files.append(find_file(uploads, body.validation_file, identity, "validation_file"))
        for file in files:
            uploads.verify(file)
        paths = [*map(uploads.path, files), None]
        spec = JobSpec(
            training_file=body.training_file, training_path=uploads.path(files[0]),
            validation_file=body.validation_file, validation_path=paths[1], uploaded=True, suffix=body.suffix,
            seed=body.seed, hyperparameters=body.asked, metadata=body.metadata, priority=body.priority,
        )  # fmt: skip
        try:
            return tuning.jobs.create(spec, owner=identity.owner)
        except ConfigError as error:
            raise ApiError(400, str(error), code="invalid_value", param="hyperparameters") from None

    @app.post(_JOBS, responses=errors)
    async def create(
        request: Request, body: Annotated[FineTuningBody, Depends(bodies.of(FineTuningBody))]
    ) -> dict[str, Any]:
        """Queue a fine-tuning job of the base model."""
        known_query(request, ())
        identity = request.state.identity
        if serving.adapter(body.model, identity) is not None:
            raise ApiError(
                400,
                f"{plain(body.model)} is an adapter; a job begins at the base model: give {serving.names[0]!r}",
                code="invalid_value",
                param="model",
            )
        if body.priority > 0 and not serving.keys.open and not identity.admin:
            raise ApiError(403, "only the admin's key may give a priority above 0", code="admin_only", param="priority")
        async with tuning.one_at_a_time:
            return job_object(await tuning.disk(make, body, identity))


def find_job(jobs: FineTuning, job_id: str, identity: Identity) -> JobRecord:
    """Return a job that someone sees.

    Raises:
        ApiError: 404, for one that is not there or is another tenant's.
    """
    job = jobs.get(job_id)
    if job is None or not identity.sees(job.owner):
        what = f"fine-tuning job {plain(job_id)[:80]} does not exist"
        raise not_there(what, _JOBS, code="job_not_found", param="fine_tuning_job_id")
    return job


def _behind[T: (JobRecord, Event, Checkpoint)](items: Sequence[T], after: str | None) -> Sequence[T]:
    """Return the items that come behind the one with this id."""
    if after is None:
        return items
    for i, item in enumerate(items):
        if item.id == after:
            return items[i + 1 :]
    raise ApiError(400, "after is the id of nothing in this list", code="invalid_value", param="after")


def _wanted_metadata(request: Request) -> Mapping[str, str] | None:
    """Return the pairs that are asked for: of ``metadata[k]=v``; ``metadata=null`` asks for jobs without any (None).

    Raises:
        ApiError: 400, for other parameters than a list of jobs has.
    """
    pairs: dict[str, str] = {}
    none = False
    names = []
    for name, value in request.query_params.multi_items():
        if found := _METADATA.fullmatch(name):
            pairs[found[1]] = value
        elif name == "metadata" and value == "null":
            none = True
        elif name not in ("after", "limit"):
            names.append(name)
    if names or (none and pairs):
        wrong = plain(names[0])[:80] if names else "metadata"
        raise ApiError(
            400,
            f"{wrong} is no parameter of this endpoint as it stands; give after, limit, and metadata[key]=value or "
            "metadata=null",
            code="unknown_field",
            param=wrong,
        )
    return None if none else pairs


def _add_jobs(app: FastAPI, tuning: Tuning, errors: dict[int | str, Any]) -> None:
    jobs = tuning.jobs

    @app.get(_JOBS, responses=errors)
    async def listed(request: Request, after: str | None = None, limit: Limit = _SHOWN) -> dict[str, Any]:
        """List the jobs that the key may see, the newest first."""
        wanted = _wanted_metadata(request)
        identity = request.state.identity
        found = _behind([job for job in await tuning.disk(jobs.list) if identity.sees(job.owner)], after)
        if wanted is None:
            found = [job for job in found if not job.spec.metadata]
        elif wanted:
            found = [job for job in found if wanted.items() <= job.spec.metadata.items()]
        return page([job_object(job) for job in found[: limit + 1]], limit)

    @app.get(f"{_JOBS}/{{job_id}}", responses=errors)
    async def retrieve(request: Request, job_id: str) -> dict[str, Any]:
        """Describe a job."""
        return job_object(await tuning.disk(find_job, jobs, job_id, request.state.identity))

    @app.get(f"{_JOBS}/{{job_id}}/events", responses=errors)
    async def events(request: Request, job_id: str, after: str | None = None, limit: Limit = _SHOWN) -> dict[str, Any]:
        """Tell what happened to a job, the newest first."""
        known_query(request, ("after", "limit"))
        await tuning.disk(find_job, jobs, job_id, request.state.identity)
        found = _behind(await tuning.disk(jobs.events, job_id), after)
        return page([event_object(event) for event in found[: limit + 1]], limit)

    @app.get(f"{_JOBS}/{{job_id}}/checkpoints", responses=errors)
    async def checkpoints(request: Request, job_id: str, after: str | None = None, limit: Limit = 10) -> dict[str, Any]:
        """List the adapters that a job kept, the newest first."""
        known_query(request, ("after", "limit"))
        await tuning.disk(find_job, jobs, job_id, request.state.identity)
        found = _behind(await tuning.disk(jobs.checkpoints, job_id), after)
        return page([checkpoint_object(one, job_id) for one in found[: limit + 1]], limit)


def _add_changes(app: FastAPI, tuning: Tuning, errors: dict[int | str, Any]) -> None:
    async def change(request: Request, job_id: str, what: str) -> dict[str, Any]:
        identity = request.state.identity
        job = await tuning.disk(find_job, tuning.jobs, job_id, identity)
        tuning.check_change(identity, job.owner)
        try:
            return job_object(await tuning.disk(getattr(tuning.jobs, what), job_id))
        except ConfigError as error:
            raise ApiError(400, str(error), code="invalid_status", param="fine_tuning_job_id") from None

    @app.post(f"{_JOBS}/{{job_id}}/cancel", responses=errors)
    async def cancel(request: Request, job_id: str) -> dict[str, Any]:
        """End a job; its checkpoints stay."""
        return await change(request, job_id, "cancel")

    @app.post(f"{_JOBS}/{{job_id}}/pause", responses=errors)
    async def pause(request: Request, job_id: str) -> dict[str, Any]:
        """Let a job wait."""
        return await change(request, job_id, "pause")

    @app.post(f"{_JOBS}/{{job_id}}/resume", responses=errors)
    async def resume(request: Request, job_id: str) -> dict[str, Any]:
        """Let a paused job go on."""
        return await change(request, job_id, "resume")


def _add_delete(app: FastAPI, serving: Serving, tuning: Tuning, errors: dict[int | str, Any]) -> None:
    @app.delete("/v1/models/{name:path}", responses=errors)
    async def delete(request: Request, name: str) -> dict[str, Any]:
        """Delete an adapter that a job has made; requests that were taken before end as they would have."""
        identity = request.state.identity
        adapter = serving.adapter(name, identity)
        if adapter is not None:
            tuning.check_change(identity, adapter.owner)
            if await tuning.disk(tuning.jobs.delete_model, name):
                return {"id": name, "object": "model", "deleted": True}
        what = "is the base model" if adapter is None else "was not made by a fine-tuning job of this server"
        raise ApiError(
            403,
            f"{plain(name)} {what}, and is not deleted here; adapters that the admin has loaded are unloaded with "
            "POST /v1/unload_lora_adapter",
            code="not_deletable",
            param="model",
        )
