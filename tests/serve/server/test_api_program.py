import json
import logging
import signal
import sys

import api_program
import api_server
import jax
import pytest
from scripted_engine import ScriptedEngine

import preft_jax
from preft_jax.errors import LimitError
from serve import api
from serve.engine.async_engine import AsyncEngine
from serve.options import add_environment


def test_it_drains_when_told_to_end_and_remembers_adapters(tmp_path, tiny):
    adapters = tmp_path / "adapters"
    api_server.adapter_directory(adapters, "watched", tiny, 0)
    api_server.adapter_directory(adapters / "more", "loaded", tiny, 1)
    (adapters / "bad").mkdir()
    (adapters / "bad" / "adapter_config.json").write_text("{}")
    options = ("--adapter-dir", str(adapters), "--state-dir", str(tmp_path / "state"), "--allow-runtime-lora-updating",
               "--adapter-root", str(adapters), "--drain-seconds", "60")  # fmt: skip
    with api_program.Program(*options) as program:
        assert [line["adapter"] for line in program.events("adapter refused")] == ["bad"]
        program.until_ready()
        with program.client(api_server.ADMIN) as admin:
            body = {"lora_name": "kept", "lora_path": "more/loaded", "owner": "alice"}
            assert admin.post("/v1/load_lora_adapter", json=body).status_code == 200
        body = {"model": "kept", "prompt": "a", "max_tokens": 1000, "stream": True}
        with program.client(api_server.ALICE) as alice, alice.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            program.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert json.loads(first.removeprefix("data: "))["model"] == "kept"
        assert program.end() == 0
        assert [line["route"] for line in program.events("request")][-1] == "/v1/completions"
    with api_program.Program(*options[2:]) as program:
        with program.client(api_server.ALICE) as alice:
            names = [model["id"] for model in alice.get("/v1/models").json()["data"]]
            assert names == ["tiny", "kept", "watched"]
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "99999"), "--port is 99999"),
        (("--max-waiting", "0"), "--max-waiting is 0"),
        (("--drain-seconds", "-1"), "--drain-seconds is -1"),
        (("--max-body-mib", "nan"), "--max-body-mib is nan"),
        (("--allow-runtime-lora-updating", "--adapter-root", "."), "needs --admin-key"),
        (("--adapter-root", "."), "need each other"),
        (("--max-adapter-bytes", "0"), "--max-adapter-bytes is 0"),
        (("--api-key", "short"), "at least 8"),
        (("--enable-finetuning",), "fine-tuning needs --finetune-state, or --state-dir"),
        (("--finetune-share", "1"), "--finetune-share is 1.0"),
        (("--finetune-tpot-ms", "0"), "--finetune-tpot-ms is 0.0"),
        (("--finetune-tpot-ms", "50", "--finetune-share", "0.2"), "are both given"),
        (("--finetune-ttft-ms", "500"), "without --finetune-tpot-ms"),
        (("--max-finetune-jobs", "0"), "--max-finetune-jobs is 0"),
        (("--max-upload-mib", "0"), "--max-upload-mib is 0"),
        (("--finetune-memory-gib", "-1"), "--finetune-memory-gib is -1"),
        (("--finetune", "/nowhere/jobs.yaml", "--state-dir", "/tmp"), "--finetune /nowhere/jobs.yaml cannot be read"),
        (("--enable-finetuning", "--state-dir", "/tmp", "--mesh", "tp=2"), "fine-tuning is on one device"),
        (("--model", "tiny", "--mesh", "fsdp=2"), "does not run over fsdp"),
        (("--model", "tiny", "--mesh", "tp=99"), "--mesh asks for 99 devices"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--model", "tiny", "--lora-modules", "nameless"), "NAME=PATH"),
        (("--model", "tiny", "--lora-modules", "tiny=x"), "NAME=PATH"),
        (("--model", "tiny", "--lora-modules", "a=/nowhere"), "/nowhere"),
        (("--model", "tiny", "--adapter-dir", "/nowhere"), "/nowhere"),
        (("--model", "tiny", "--max-model-len", "5000"), "max_model_len 5000"),
        (
            ("--model", "tiny", "--bank-sites", "q, head"),
            "bank_sites is ('q', 'head'); give a tuple of some of q, k, v",
        ),
    ],
)
def test_what_cannot_work_ends_with_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(api, "_start_log", lambda level: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert api.main(["--port", "0", *arguments], environment={}) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-adapter-bytes", "1000"), "allowed: up to 1000"),
        (("--max-lora-rank", "7"), "rank 17 at 'q' of layer 0 is too large; allowed: up to 16"),
        (("--max-lora-rank", "17"), None),
    ],
)
def test_an_adapter_beyond_the_limits_is_refused_before_it_is_read(tmp_path, tiny, options, message):
    config = preft_jax.AdapterConfig(rank=17, targets=("q",))
    preft_jax.save_adapter(tmp_path / "a", preft_jax.init_adapter(config, tiny.config, jax.random.key(0)))
    args = api.make_parser().parse_args([*api_program.SIZES, *options])
    store = api._make_store(args, tiny)
    if message is None:
        store.register("a", tmp_path / "a")
    else:
        with pytest.raises(preft_jax.AdapterError, match=message):
            store.register("a", tmp_path / "a")
    store.close()


def test_a_server_for_some_sites_refuses_adapters_of_others(capsys, monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(api, "_start_log", lambda level: None)
    config = preft_jax.AdapterConfig(rank=4, targets=("q", "o"))
    preft_jax.save_adapter(tmp_path / "a", preft_jax.init_adapter(config, tiny.config, jax.random.key(0)))
    options = [*api_program.SIZES, "--bank-sites", "v,q", "--lora-modules", f"mine={tmp_path / 'a'}"]
    assert api.main(["--port", "0", *options], environment={}) == 1
    assert "edits o and the engine serves edits of q, v; name them in bank_sites" in capsys.readouterr().err


def test_adapters_of_an_earlier_run_that_are_served_no_more_are_told(caplog, tmp_path, tiny):
    preft_jax.save_adapter(
        tmp_path / "a", preft_jax.init_adapter(preft_jax.AdapterConfig(rank=4), tiny.config, jax.random.key(0))
    )
    args = api.make_parser().parse_args(api_program.SIZES)
    store = api._make_store(args, tiny)
    store.register("old", tmp_path / "a")

    def refuse(config):
        raise preft_jax.AdapterError("not any more")

    store.check = refuse
    api._register(store, args, ("tiny",))
    store.close()
    (record,) = caplog.records
    assert (record.getMessage(), record.facts) == ("adapter refused", {"adapter": "old", "reason": "not any more"})


def test_what_fine_tuning_is_made_of(tmp_path, tiny):
    """The service is loaded by name, gets the operator's jobs, and wakes the engine; without the option none is."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "jobs.yaml").write_text("jobs: [{name: given, training_file: rows.jsonl, hyperparameters: {rank: 4}}]")
    options = ["--state-dir", str(tmp_path), "--finetune", str(tmp_path / "jobs.yaml"), "--max-open-finetune-jobs", "1",
               "--max-upload-mib", "0.5", "--max-uploads", "7", "--upload-timeout", "9"]  # fmt: skip
    args = api.make_parser().parse_args([*api_program.SIZES, *options])
    store = api._make_store(args, tiny)
    assert api._make_service(api.make_parser().parse_args([]), tiny, store, "tiny") is None
    service = api._make_service(args, tiny, store, "tiny")
    engine = AsyncEngine(ScriptedEngine())
    tuning = api._make_tuning(args, service, engine)
    try:
        assert service.wake == engine.wake
        (job,) = service.list()
        assert (job.owner, job.model, job.spec.training_file, job.spec.suffix) == (
            None,
            "tiny",
            "operator:given",
            "given",
        )
        assert (tmp_path / "finetuning" / "jobs" / job.id).is_dir()
        with pytest.raises(LimitError):
            service.create(job.spec, owner=None)
        assert (tuning.upload_seconds, tuning.uploads.limits.file_bytes, tuning.uploads.limits.owner_files) == (
            9,
            2**19,
            7,
        )
    finally:
        tuning.close()
        store.close()


def test_usage_errors_have_their_status():
    with pytest.raises(SystemExit) as caught:
        api.main(["--no-such-option"], environment={})
    assert caught.value.code == 2


def test_keys_come_from_the_environment_too():
    args = api.make_parser().parse_args(["--api-key", "from-the-line"])
    add_environment(args, {"PREFT_API_KEY": "a=one-key-1 two-key-2", "PREFT_ADMIN_KEY": "three-key-3"})
    assert args.api_key == ["from-the-line", "a=one-key-1", "two-key-2"]
    assert args.admin_key == "three-key-3"


def test_the_log_is_json_whatever_happens():
    try:
        raise ValueError("broken\n")
    except ValueError:
        record = logging.LogRecord("preft.server", logging.ERROR, "x", 1, "failure of %s", ("it",), sys.exc_info())
    record.facts = {"id": "1", "path": object}
    line = api.JsonLines().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["event"], found["level"], found["id"]) == ("failure of it", "error", "1")
    assert "ValueError: broken" in found["traceback"]
