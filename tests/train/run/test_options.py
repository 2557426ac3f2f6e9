"""Options: the command line over a file over defaults, the options of jobs, and those of a run that is resumed."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from preft_jax import AdapterConfig, ConfigError
from train.rollouts.options import make_parser as make_rl_parser
from train.run.kept import OPTIONS_FILE, write_options
from train.run.options import make_parser, settings

pytestmark = pytest.mark.host


def parse(*argv):
    return settings(make_parser("Trains."), [str(part) for part in argv])


def job(*argv):
    (only,) = parse(*argv).jobs
    return only


def write(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def begin(directory, *argv):
    """Leave in a directory what a run leaves there of its options."""
    found = parse("--output-dir", directory, *argv)
    directory.mkdir(exist_ok=True)
    write_options(directory, found.given, found.run)
    return found


RUN = [
    (["--model", "tiny"], lambda s: s.model, "tiny"),
    (["--dtype", "bfloat16"], lambda s: s.dtype, "bfloat16"),
    (["--quantization", "fp8"], lambda s: s.quantization, "fp8"),
    (["--mesh", "fsdp=2"], lambda s: s.mesh, "fsdp=2"),
    (["--output-dir", "there"], lambda s: s.output_dir, Path("there")),
    (["--overwrite-output-dir"], lambda s: s.overwrite_output_dir, True),
    (["--max-jobs", "3"], lambda s: s.train.max_jobs, 3),
    (["--gradient-checkpointing", "full"], lambda s: s.train.gradient_checkpointing, "full"),
    (["--logging-steps", "7"], lambda s: s.logging_steps, 7),
    (["--eval-steps", "0"], lambda s: s.eval_steps, 0),
    (["--eval-on-start"], lambda s: s.eval_on_start, True),
    (["--eval-generations", "0"], lambda s: s.eval_generations, 0),
    (["--save-steps", "9"], lambda s: s.save_steps, 9),
    (["--save-total-limit", "1"], lambda s: s.save_total_limit, 1),
    (["--report-to", "tensorboard, wandb"], lambda s: s.report_to, ("tensorboard", "wandb")),
    (["--publish", "http://here"], lambda s: s.publish, "http://here"),
]

JOB = [
    (["--name", "ann"], lambda j: j.name, "ann"),
    (["--dataset", "a.jsonl"], lambda j: j.dataset, "a.jsonl"),
    (["--dataset", "a", "--eval-dataset", "b"], lambda j: j.eval_dataset, "b"),
    (["--adapter-kind", "loreft"], lambda j: (j.adapter.kind, j.adapter.targets), ("loreft", ("block",))),
    (["--rank", "8"], lambda j: j.adapter.rank, 8),
    (["--lora-r", "8"], lambda j: j.adapter.rank, 8),
    (["--lora-alpha", "32"], lambda j: j.adapter.alpha, 32.0),
    (["--lora-dropout", "0.1"], lambda j: j.adapter.dropout, 0.1),
    (["--use-rslora"], lambda j: j.adapter.use_rslora, True),
    (["--targets", "q, down"], lambda j: j.adapter.targets, ("q", "down")),
    (["--lora-target-modules", "q"], lambda j: j.adapter.targets, ("q",)),
    (["--layers", "0,2"], lambda j: j.adapter.layers, (0, 2)),
    (["--positions", "l64"], lambda j: j.adapter.positions, "l64"),
    (["--alora-invocation-tokens", "7, 3"], lambda j: j.adapter.alora_invocation_tokens, (7, 3)),
    (["--positions", "f7+l7"], lambda j: j.adapter.positions, "f7+l7"),
    (["--adapter-kind=loreft", "--positions=f7+l7", "--no-share-weights"], lambda j: j.adapter.share_weights, False),
    (["--adapter-kind=direft", "--no-orthonormal"], lambda j: j.adapter.orthonormal, False),
    (["--assistant-turns", "skip"], lambda j: j.adapter.assistant_turns, "skip"),
    (["--init-from", "old"], lambda j: j.init_from, Path("old")),
    (["--num-train-epochs", "1.5"], lambda j: j.num_train_epochs, 1.5),
    (["--max-steps", "11"], lambda j: j.max_steps, 11),
    (["--per-device-train-batch-size", "3"], lambda j: j.batches.batch_size, 3),
    (["--gradient-accumulation-steps", "4"], lambda j: j.gradient_accumulation_steps, 4),
    (["--max-length", "99"], lambda j: (j.data.max_length, j.batches.max_length), (99, 99)),
    (["--truncate"], lambda j: j.data.truncate, True),
    (["--packing"], lambda j: j.batches.packing, True),
    (["--no-completion-only-loss"], lambda j: j.data.completion_only_loss, False),
    (["--no-shuffle"], lambda j: j.batches.shuffle, False),
    (["--seed", "5"], lambda j: j.batches.seed, 5),
    (["--optim", "lion"], lambda j: j.optimizer.optim, "lion"),
    (["--learning-rate", "4e-3"], lambda j: j.optimizer.learning_rate, 4e-3),
    (["--lr-scheduler-type", "cosine"], lambda j: j.optimizer.lr_scheduler_type, "cosine"),
    (["--warmup-ratio", "0.2"], lambda j: j.optimizer.warmup_ratio, 0.2),
    (["--warmup-steps", "3"], lambda j: j.optimizer.warmup_steps, 3),
    (["--weight-decay", "0.01"], lambda j: j.optimizer.weight_decay, 0.01),
    (["--adam-beta1", "0.8"], lambda j: j.optimizer.adam_beta1, 0.8),
    (["--adam-beta2", "0.95"], lambda j: j.optimizer.adam_beta2, 0.95),
    (["--adam-epsilon", "1e-6"], lambda j: j.optimizer.adam_epsilon, 1e-6),
    (["--max-grad-norm", "0"], lambda j: j.optimizer.max_grad_norm, 0.0),
    (["--lora-plus-ratio", "16"], lambda j: j.optimizer.lora_plus_ratio, 16.0),
]


def in_file(argv):
    """Return a command line as the mapping of a file."""
    values, words = {}, [part for word in argv for part in (word.split("=") if word[:2] == "--" else [word])]
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            values[name] = True
        else:
            values[name] = yaml.safe_load(word)
    return {name[3:] if name.startswith("no-") else name: not name.startswith("no-") and value
            for name, value in values.items()}  # fmt: skip


@pytest.mark.parametrize(("argv", "get", "value"), RUN)
def test_a_run_is_what_the_line_or_the_file_says(argv, get, value, tmp_path):
    assert get(parse()) != value
    assert get(parse(*argv)) == value
    file = write(tmp_path / "run.yaml", in_file(["--report-to", "tensorboard,wandb"] if "wandb" in argv[-1] else argv))
    assert get(parse("--config", file)) == value


@pytest.mark.parametrize(("argv", "get", "value"), JOB)
def test_a_job_is_what_the_line_the_file_or_its_own_entry_says(argv, get, value, tmp_path):
    assert get(job()) != value
    assert get(job(*argv)) == value
    own = in_file(argv)
    assert get(job("--config", write(tmp_path / "run.yaml", own))) == value
    assert get(job("--jobs", write(tmp_path / "jobs.yaml", {"jobs": [{"name": "bob", **own}]}))) == value


def test_defaults():
    found = parse()
    (only,) = found.jobs
    assert only.adapter == AdapterConfig(rank=16)
    assert (only.optimizer.learning_rate, only.optimizer.warmup_ratio, only.num_train_epochs) == (1e-3, 0.03, 3.0)
    assert (found.model, found.output_dir, found.publish, only.dataset) == ("smollm2-135m", Path("out"), None, None)
    assert (found.given, found.changes) == ({}, ())


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    file = write(tmp_path / "run.yaml", "rank: 4\nlr-scheduler-type: cosine\ntargets: [q, v]\nlora_r: 6\nlayers: 1\n")
    only = job("--config", file, "--rank", "2", "--no-shuffle")
    assert (only.adapter.rank, only.optimizer.lr_scheduler_type, only.adapter.targets) == (2, "cosine", ("q", "v"))
    assert (only.adapter.layers, only.batches.shuffle) == ((1,), False)
    assert job("--config", file).adapter.rank == 6


def test_a_file_may_switch_off_what_is_on_and_leave_values_out(tmp_path):
    only = job("--config", write(tmp_path / "run.yaml", "shuffle: false\nlora_alpha:\nlearning_rate: 4e-3\n"))
    assert (only.batches.shuffle, only.adapter.alpha, only.optimizer.learning_rate) == (False, None, 4e-3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("learning_rat: 1", "unknown option in .*run.yaml: 'learning_rat' .did you mean 'learning_rate'"),
        ("config: x", "unknown option in .*run.yaml: 'config'"),
        ("jobs: []", "unknown option in .*run.yaml: 'jobs'"),
        ("rank: many", "run.yaml has a value that is not allowed"),
        ("optim: adan", "run.yaml has a value that is not allowed"),
        ("packing: maybe", "run.yaml has a value that is not allowed"),
        ("rank: true", "run.yaml: rank is True; it takes a value"),
        ("- rank", "run.yaml holds a list"),
        ("", "run.yaml holds a NoneType"),
        ("{", "run.yaml cannot be read as YAML"),
        ("rank: 0", "rank 0"),
    ],
)
def test_a_file_of_other_things_is_refused_by_name(content, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        parse("--config", write(tmp_path / "run.yaml", content))


@pytest.mark.parametrize("option", ["--config", "--jobs"])
def test_a_file_that_is_not_there_is_named(option, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        parse(option, tmp_path / "none.yaml")


def test_jobs_have_their_own_options_over_those_of_the_run(tmp_path):
    file = write(tmp_path / "jobs.yaml", {"jobs": [{"name": "ann", "rank": 2}, {"name": "bob", "seed": 3}]})
    ann, bob = parse("--jobs", file, "--rank", "4", "--seed", "1", "--name", "carl").jobs
    assert (ann.name, ann.adapter.rank, ann.batches.seed) == ("ann", 2, 1)
    assert (bob.name, bob.adapter.rank, bob.batches.seed) == ("bob", 4, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("jobs:", "no list of jobs"),
        ("jobs: []", "no list of jobs"),
        ("jobs: [ann]", "no list of jobs"),
        ("job: [{name: ann}]", "unknown field of .*jobs.yaml:.* 'job' .did you mean 'jobs'"),
        ("rank: 4\njobs: [{name: ann}]", "unknown field of .*jobs.yaml:.* 'rank'"),
        ("jobs: [{name: ann}, {rank: 4}]", "job 2 has no name"),
        ("jobs: [{name: }]", "job 1 has no name"),
        ("jobs: [{name: ann}, {name: bob}, {name: ann}]", "two jobs have the name 'ann'"),
        ("jobs: [{name: ann, model: tiny}]", "job 'ann': 'model'"),
        ("jobs: [{name: ann, save_steps: 3}]", "job 'ann': 'save_steps'"),
        ("jobs: [{name: ann, rnak: 3}]", "job 'ann': 'rnak' .did you mean 'rank'"),
        ("jobs: [{name: ann, rank: few}]", "job 'ann' has a value that is not allowed"),
        ("jobs: [{name: a/b}]", "'a/b'"),
        ("jobs: [{name: ..}]", "'..'"),
    ],
)
def test_jobs_that_are_not_told_apart_or_ask_for_the_runs_options_are_refused(content, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        parse("--jobs", write(tmp_path / "jobs.yaml", content))


def test_of_a_job_that_starts_from_an_adapter_is_known_what_was_asked_for(tmp_path):
    """A default is no wish: only what stands on the line, in the file or in the job's entry."""
    file = write(tmp_path / "run.yaml", {"init_from": "old", "lora_alpha": 32, "targets": "q_proj"})
    assert dict(job("--init-from", "old").asked) == {}
    assert dict(job("--rank", "4").asked) == {}
    assert dict(job("--config", file, "--rank", "16").asked) == {"rank": 16, "alpha": 32.0, "targets": ("q",)}
    jobs = write(
        tmp_path / "jobs.yaml", {"jobs": [{"name": "ann"}, {"name": "bob", "rank": 8, "share_weights": False}]}
    )
    ann, bob = parse("--jobs", jobs, "--config", file).jobs
    assert dict(ann.asked) == {"alpha": 32.0, "targets": ("q",)}
    assert dict(bob.asked) == {"alpha": 32.0, "targets": ("q",), "rank": 8, "share_weights": False}


BAD = {
    "--rank": [0, 1025, -1], "--lora-alpha": ["nan", "inf"], "--lora-dropout": [1, -0.1, "nan"], "--targets": ["qq"],
    "--layers": ["a", "-1", "1,1"], "--positions": ["f0", "last"], "--num-train-epochs": [0, -1, "nan", "inf"],
    "--per-device-train-batch-size": [0], "--gradient-accumulation-steps": [0], "--max-length": [1],
    "--seed": [-1, 2**32], "--learning-rate": [-1, "nan", "inf"], "--warmup-ratio": [-0.1, 1.1], "--warmup-steps": [-1],
    "--weight-decay": [-1], "--adam-beta1": [-0.1, 1.5], "--adam-beta2": ["nan"], "--max-grad-norm": [-1],
    "--logging-steps": [0], "--eval-steps": [-1], "--eval-generations": [-1], "--save-steps": [-1],
    "--save-total-limit": [0], "--max-jobs": [-1], "--name": ["", "a/b", ".a"], "--eval-dataset": ["b"],
}  # fmt: skip
NAMED = {"--targets": "target 'qq'", "--per-device-train-batch-size": "batch_size"}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in BAD.items() for value in values])
def test_values_that_cannot_work_are_refused_by_name(option, value):
    with pytest.raises(ConfigError, match=NAMED.get(option, option.removeprefix("--lora-").strip("-").split("-")[0])):
        parse(f"{option}={value}")


def test_dropout_is_loras():
    with pytest.raises(ConfigError, match="lora_dropout is LoRA's; this adapter is 'direft'"):
        parse("--adapter-kind", "direft", "--lora-dropout", "0.1")


@pytest.mark.parametrize("argv", [["--rnak", "4"], ["--optim", "adan"], ["--rank", "many"], ["--out", "there"]])
def test_the_command_line_is_refused_with_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_a_resumed_run_has_the_options_that_it_was_begun_with(tmp_path):
    file = write(tmp_path / "run.yaml", "shuffle: false\nlearning_rate: 1.0e-5\ntargets: [q, v]\nreport_to: wandb\n")
    begun = begin(tmp_path / "out", "--config", file, "--rank", "4", "--dataset", "a.jsonl", "--overwrite-output-dir")
    resumed = parse("--output-dir", tmp_path / "out", "--resume")
    assert (resumed.resume, resumed.overwrite_output_dir, resumed.changes) == (True, False, ())
    assert dataclasses.replace(resumed, resume=False, overwrite_output_dir=True) == begun


def test_a_resumed_run_tells_which_options_are_others(tmp_path):
    begin(tmp_path / "out", "--rank", "4", "--dataset", "a.jsonl", "--no-shuffle")
    resumed = parse(
        "--output-dir", tmp_path / "out", "--resume", "--rank", "8", "--dataset", "a.jsonl", "--learning-rate", "0.5",
        "--save-steps", "100",
    )  # fmt: skip
    assert resumed.changes == ("rank: 8 instead of 4", "learning_rate: 0.5 instead of 0.001")
    assert (resumed.jobs[0].adapter.rank, resumed.jobs[0].batches.shuffle) == (8, False)


def test_a_resumed_run_has_its_jobs(tmp_path):
    file = write(tmp_path / "jobs.yaml", {"jobs": [{"name": "ann", "dataset": "a", "packing": True}, {"name": "bob"}]})
    begun = begin(tmp_path / "out", "--jobs", file, "--rank", "4")
    file.unlink()
    resumed = parse("--output-dir", tmp_path / "out", "--resume")
    assert (resumed.jobs, resumed.given, resumed.changes) == (begun.jobs, begun.given, ())


JOBS = [{"name": "ann", "dataset": "a", "rank": 4}, {"name": "bob", "learning_rate": 0.5, "packing": True}]


@pytest.mark.parametrize(
    ("jobs", "argv", "changes"),
    [
        (JOBS, (), ()),
        (JOBS[::-1], (), ()),
        (None, (), ()),
        ([{**JOBS[0], "rank": 8}, JOBS[1]], (), ("ann: rank: 8 instead of 4",)),
        ([{"name": "ann", "dataset": "b"}, JOBS[1]], (), ("ann: dataset: b instead of a", "ann: rank: 2 instead of 4")),
        ([JOBS[0], {**JOBS[1], "rank": 3}], (), ("bob: rank: 3 instead of 2",)),
        ([JOBS[0], {**JOBS[1], "rank": 2}], (), ()),
        ([JOBS[0], {"name": "carl"}], (), ("carl: a new job", "bob: not trained any further")),
        (None, ("--rank", "6"), ("rank: 6 instead of 2",)),
        ([JOBS[0]], ("--rank", "6"), ("bob: not trained any further",)),
        (None, ("--rank", "2", "--save-steps", "5"), ("save_steps: 5 instead of 100",)),
    ],
)
def test_a_resumed_run_tells_what_is_other_in_its_jobs(jobs, argv, changes, tmp_path):
    first = write(tmp_path / "first.yaml", {"jobs": JOBS})
    begin(tmp_path / "out", "--jobs", first, "--rank", "2")
    given = [] if jobs is None else ["--jobs", write(tmp_path / "jobs.yaml", {"jobs": jobs})]
    resumed = parse("--output-dir", tmp_path / "out", "--resume", *given, *argv)
    assert resumed.changes == changes
    assert [one.name for one in resumed.jobs] == [one["name"] for one in jobs or JOBS]


def test_a_run_of_one_adapter_that_goes_on_with_jobs_tells_that_they_are_new(tmp_path):
    begin(tmp_path / "out", "--rank", "4")
    resumed = parse("--output-dir", tmp_path / "out", "--resume", "--jobs", write(tmp_path / "j", {"jobs": JOBS[:1]}))
    assert resumed.changes == ("ann: a new job", "adapter: not trained any further")


@pytest.mark.parametrize("content", [None, "{"])
def test_a_run_that_has_not_been_cannot_be_resumed(content, tmp_path):
    if content is not None:
        (tmp_path / OPTIONS_FILE).write_text(content)
    with pytest.raises(ConfigError, match=r"no run in .* to resume"):
        parse("--output-dir", tmp_path, "--resume")


@pytest.mark.parametrize("make", [make_parser, make_rl_parser])
def test_the_help_tells_each_default_once(make):
    text = " ".join(make("Trains.").format_help().split())
    assert re.findall(r"\(default: [^)]*\) \(default: [^)]*\)", text) == []
    assert "others wait (default: all)" in text
