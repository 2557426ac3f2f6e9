"""Requests drawn from the server's own OpenAPI schema, with Schemathesis: every answer is one that the schema names."""

import time

import api_server
import fake_tuning
import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from serve.jobs import JobSpec
from serve.server.tuning import Tuning
from serve.store.uploads import Uploads

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
MODES = {"valid": GenerationMode.POSITIVE, "invalid": GenerationMode.NEGATIVE}
OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/stats"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("DELETE", "/v1/models/{name}"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
    ("DELETE", "/v1/files/{file_id}"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"),
]
CHANGES = tuple(f"/v1/fine_tuning/jobs/{{job_id}}/{what}" for what in ("cancel", "pause", "resume"))
"""They have no body that could be wrong."""


@pytest.fixture(scope="module")
def url(lively, tmp_path_factory):
    uploads = Uploads(tmp_path_factory.mktemp("state") / "files")
    upload = uploads.begin(None)
    upload.write(b"{}")
    jobs = fake_tuning.FakeFineTuning()
    path = uploads.path(upload.finish("rows.jsonl", "fine-tune"))
    job = jobs.create(JobSpec(training_file=path.parent.name, training_path=path), owner=None)
    IDS.update(file_id=path.parent.name, job_id=job.id)
    tuning = Tuning(jobs=jobs, uploads=uploads)
    serving = api_server.make_serving(lively, tmp_path_factory.mktemp("adapters"), tuning=tuning)
    with api_server.running(serving) as found:
        with httpx.Client(base_url=found, trust_env=False) as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.1)
        yield found
    assert serving.engine.num_open == 0
    assert serving.engine.engine.pages.num_used == 0
    assert serving.engine.engine.stats.recompiles == 0


IDS = {}
"""Of a file and a job that are there."""

HEADERS = {"Authorization": f"Bearer {api_server.ADMIN}"}


@pytest.fixture(scope="module")
def document(url):
    return httpx.get(f"{url}/openapi.json", headers=HEADERS, trust_env=False).json()


def test_every_operation_is_tried(document):
    found = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert found - {("GET", "/")} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (method, path, mode)
        for method, path in OPERATIONS
        for mode in MODES
        if mode == "valid" or (method == "POST" and path not in CHANGES)
    ],
)
def test_every_answer_is_one_that_the_schema_names(url, document, method, path, mode):
    schema = schemathesis.openapi.from_dict(document)
    operation = schema[path][method]
    examples = 25 if method == "POST" else 3

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=MODES[mode]))
    def run(case):
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "tiny"
        if mode == "valid" and set(case.path_parameters or ()) & set(IDS):
            case.path_parameters = {name: IDS[name] for name in case.path_parameters}
        response = case.call(base_url=url, headers=HEADERS)
        case.validate_response(response, checks=CHECKS)

    run()
