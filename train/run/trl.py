"""TRL's command line in this one's words, so that ``trl sft`` may become ``python -m train.sft``.

Most names are the same. Of the others each is an alias, has a value of another name, changes nothing here, or asks for
what there is not: that is an error which says what to do instead.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from preft_jax.errors import ConfigError, did_you_mean, plain, shown

ALIASES = {
    "lora_r": "rank", "lora_target_modules": "targets", "resume_from_checkpoint": "resume",
    "model_name_or_path": "model", "dataset_name": "dataset", "torch_dtype": "dtype", "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy", "reward_funcs": "task",
    "vllm_importance_sampling_cap": "importance_sampling_cap",
}  # fmt: skip
"""Name of TRL or PEFT -> the option."""

_MARKS = ("model_name_or_path", "dataset_name")
"""Names that a command of TRL has, and one of this program need not have."""

DEFAULTS = {
    "learning_rate": "2e-05", "lora_alpha": "32", "lora_dropout": "0.05", "warmup_ratio": "0",
    "targets": "the attention's q and v, mostly", "truncate": "True", "gradient_checkpointing": "full",
    "completion_only_loss": "False for chats",
}  # fmt: skip
"""TRL's defaults where this program's are others."""

_LISTS = ("targets", "layers", "report_to")

_VALUES: Mapping[str, Mapping[str, tuple[tuple[str, str], ...]]] = {
    "optim": {
        **dict.fromkeys(
            ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_hf"), (("optim", "adamw"),)
        ),
        "lion_32bit": (("optim", "lion"),),
    },
    "dtype": {"auto": ()},
    "bf16": {"true": (("dtype", "bfloat16"),), "false": ()},
    "fp16": {"true": (("dtype", "float16"),), "false": ()},
    "gradient_checkpointing": {
        "true": (("gradient_checkpointing", "full"),), "false": (("gradient_checkpointing", "none"),),
    },
    "eval_strategy": {"false": (("eval_strategy", "no"),)},
    "truncation_mode": {"keep_start": (("truncate", "true"),)},
    "save_strategy": {"steps": (), **dict.fromkeys(("no", "false"), (("save_steps", "0"),))},
    "logging_strategy": {"steps": ()},
    "report_to": {"none": (("report_to", "none"),)},
    # Off, it leaves prompt and completion to completion_only_loss there; answers alone are learned here.
    "assistant_only_loss": {"true": (("completion_only_loss", "true"),), "false": ()},
}  # fmt: skip
"""Name -> its value in TRL -> options; other values are this program's own, or refused."""

_TRUTH = {**dict.fromkeys(("yes", "y", "t", "1"), "true"), **dict.fromkeys(("no", "n", "f", "0"), "false")}
"""Words for a flag that transformers takes."""

_REFUSED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "use_peft": (("true",), "only adapters are trained here; leave it out"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), (("false",), "the base model is in --dtype; leave it out")),
    "use_dora": (("false",), "there is no DoRA here; --adapter-kind lists the kinds"),
    "lora_target_parameters": ((), "adapters are of linears; give --targets"),
    "lora_modules_to_save": ((), "the base model is frozen; leave it out"),
    "model_revision": (("main",), "download that revision and give its directory as --model"),
    "model_init_kwargs": ((), "give --dtype for the base model's dtype, and leave it out"),
    "chat_template_path": ((), "put the template into the model's directory, as chat_template.jinja"),
    "eos_token": ((), "the end of a turn is the model's and its chat template's; leave it out"),
    "truncation_mode": ((), "examples are cut at their end (keep_start); give --truncate"),
    "packing_strategy": (("bfd",), "examples are packed whole (bfd); leave it out"),
    "loss_type": (("nll", "chunked_nll"), "the loss is the negative log-likelihood; leave it out"),
    "neftune_noise_alpha": (("0", "0.0"), "there is no such noise here; leave it out"),
    "label_smoothing_factor": (("0", "0.0"), "labels are not smoothed; leave it out"),
    "router_aux_loss_coef": (("0", "0.0"), "there is no such loss here; leave it out"),
    "push_to_hub": (("false",), "upload the directory of the adapter with `hf upload`, or give --publish"),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "parallelism_config"),
        (("false",), "--mesh fsdp spreads weights over devices"),
    ),
    "load_best_model_at_end": (("false",), "the adapter is the last one; checkpoints are kept by --save-total-limit"),
    "lr_scheduler_kwargs": ((), "--lr-scheduler-type and --warmup-ratio are all there is; leave it out"),
    "optim_args": ((), "give --adam-beta1, --adam-beta2, --adam-epsilon or --weight-decay"),
    "optim_target_modules": ((), "every weight of the adapter has the same optimizer; leave it out"),
    "auto_find_batch_size": (("false",), "give --per-device-train-batch-size and --gradient-accumulation-steps"),
    "eval_delay": (("0", "0.0"), "evaluations are every --eval-steps; leave it out"),
    "use_cpu": (("false",), "set JAX_PLATFORMS=cpu in the environment"),
    "no_cuda": (("false",), "set JAX_PLATFORMS=cpu in the environment"),
    "save_strategy": ((), "checkpoints are counted in updates; give --save-steps"),
    "logging_strategy": ((), "status lines are counted in updates; give --logging-steps"),
    "test_split_size": ((), "give the rows to evaluate on as --eval-dataset, or --dataset-test-split"),
    "datasets": ((), "one dataset is trained on; give --dataset"),
    **{
        name: (neutral, "tokens are drawn from the whole distribution; give --temperature, or leave it out")
        for name, neutral in (
            ("top_p", ("1", "1.0")), ("top_k", ("0", "-1")), ("min_p", ("0", "0.0")),
            ("repetition_penalty", ("1", "1.0")),
        )
    },
    "importance_sampling_level": (("token",), "ratios are those of tokens; leave it out"),
    **dict.fromkeys(
        ("steps_per_generation", "generation_batch_size"),
        ((), "samples of a step are --per-device-train-batch-size times --gradient-accumulation-steps"),
    ),
    "sync_ref_model": (("false",), "the reference is the base model; leave it out"),
    "delta": ((), "give --epsilon and --epsilon-high; leave it out"),
    "reward_weights": ((), "there is one reward; weigh several in a function of your own"),
}  # fmt: skip
"""Name -> values that ask for nothing, and what to do about others."""

_UNNEEDED = (
    "accelerator_config attn_implementation activation_offloading average_tokens_across_devices batch_eval_metrics "
    "bf16_full_eval bnb_.* data_seed dataloader_.* dataset_kwargs dataset_num_proc dataset_streaming "
    "dataset_text_field ddp_.* debug disable_tqdm do_eval do_predict do_train enable_jit_checkpoint "
    "eval_accumulation_steps eval_do_concat_batches eval_packing eval_use_gather_object fp16_full_eval "
    "full_determinism gradient_checkpointing_.* greater_is_better group_by_length hub_.* ignore_bias_buffers "
    "ignore_data_skip include_.* label_names length_column_name liger_kernel_config local_rank log_level.* "
    "log_on_each_node logging_dir logging_first_step logging_nan_inf_filter lora_task_type metric_for_best_model "
    "pad_to_multiple_of pad_token padding_free per_device_eval_batch_size prediction_loss_only project "
    "remove_unused_columns restore_callback_states_from_checkpoint run_name save_on_each_node save_only_model "
    "save_safetensors shuffle_dataset skip_memory_metrics streaming tf32 torch_compile.* torch_empty_cache_steps "
    "trackio_.* train_sampling_strategy trust_remote_code use_bnb_nested_quant use_cache use_flash_attention_2 "
    "use_liger_kernel use_vllm vllm_.* use_transformers_paged cache_implementation ds3_gather_for_generation"
)
"""Names, as patterns, that say how torch computes or what is shown, which is decided here by other means."""

_NOTHING = re.compile(_UNNEEDED.replace(" ", "|"))


class Translation(NamedTuple):
    """A command line in this program's words.

    Attributes:
        arguments: of the command line.
        unneeded: names that change nothing here.
        marked: whether the command looks like one of TRL.
    """

    arguments: list[str]
    unneeded: tuple[str, ...]
    marked: bool


def knows(name: str) -> bool:
    """Whether a name, with underscores, is TRL's alone, and says something here."""
    return name in _VALUES or name in _REFUSED or _NOTHING.fullmatch(name) is not None


def takes_flag(name: str, value: bool) -> bool:
    """Whether an option that takes a value here is a flag in TRL, or a word that YAML reads as one."""
    return str(value).lower() in _VALUES.get(name, {})


def grouped(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the options of a command line, each with its values; what stands before the first one has no name."""
    groups: list[tuple[str, list[str]]] = []
    for argument in argv:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            groups.append((name.replace("-", "_"), [value] if equals else []))
        elif groups and groups[-1][0]:
            groups[-1][1].append(argument)
        else:
            groups.append(("", [argument]))
    return groups


def translate(given: Iterable[tuple[str, list[str]]], options: Mapping[str, Mapping[str, Any]]) -> Translation:
    """Return options and their values as this program's command line.

    Args:
        given: names, with underscores, and values as text.
        options: this program's, by name; one with an ``action`` is a flag.

    Raises:
        ConfigError: for a name that is neither this program's nor TRL's, or asks for what there is not.
    """
    given = list(given)
    names = {ALIASES.get(name, name) for name, _ in given}
    arguments: list[str] = []
    unneeded: list[str] = []
    for name, values in given:
        if not name:
            arguments += values
        elif name not in ALIASES and _NOTHING.fullmatch(name):
            unneeded.append(name)
        elif not (name in ("bf16", "fp16") and "dtype" in names):  # What is said of the base model counts.
            for option, texts in _translated(name, values, options):
                arguments += _written(option, texts, options)
    return Translation(arguments, tuple(unneeded), any(name in _MARKS for name, _ in given))


def _translated(name: str, values: list[str], options: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    own = ALIASES.get(name, name)
    value = (values[0] if values else "true") if len(values) <= 1 else None
    lower = "" if value is None else value.lower()
    if options.get(own, {}).get("action") or "true" in _VALUES.get(own, {}):
        lower = _TRUTH.get(lower, lower)
        values = [lower] if values[:1] and lower in ("true", "false") else values
    if lower in ("none", "null") and (
        (own in _REFUSED and own not in options) or own in ("dtype", "completion_only_loss")
    ):
        return []
    if own in _VALUES and lower in _VALUES[own]:
        return [(option, [text]) for option, text in _VALUES[own][lower]]
    if own in _REFUSED and own not in options:
        neutral, instead = _REFUSED[own]
        if lower in neutral:
            return []
        raise ConfigError(f"--{name} {plain(' '.join(values))} is TRL's and is not here: {instead}")
    if own == "eval_strategy" and lower == "epoch":
        raise ConfigError(f"--{name} epoch is not here: give --eval-strategy steps, and --eval-steps in updates")
    if own == "resume" and lower not in ("true", "false"):
        raise ConfigError(
            f"--{name} is {shown(value)}; a run goes on from its newest checkpoint: give --resume, and its --output-dir"
        )
    if own == "warmup_steps" and value and re.fullmatch(r"0?\.\d+", value):
        return [("warmup_ratio", [value])]
    if own in _VALUES and own not in options:
        raise ConfigError(f"--{name} is {plain(' '.join(values))!r}; allowed: {', '.join(_VALUES[own])}")
    flag = own.removeprefix("no_")
    if (
        own not in options
        and not (flag in options and options[flag].get("action"))
        and own not in ("help", "config", "jobs")
    ):
        known = [*options, *ALIASES, *_VALUES, *_REFUSED]
        raise ConfigError(f"unknown option --{name.replace('_', '-')}{_nearest(name, known)}; --help lists all")
    return [(own, values)]


def _nearest(name: str, known: Collection[str]) -> str:
    return did_you_mean(name, known).replace("'", "--", 1).replace("'", "").replace("_", "-")


def _written(name: str, values: list[str], options: Mapping[str, Mapping[str, Any]]) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if options.get(name, {}).get("action") and values and values[0].lower() in ("true", "false"):
        return [flag if values[0].lower() == "true" else f"--no-{flag[2:]}", *values[1:]]
    if name in _LISTS and len(values) > 1:
        values = [",".join(values)]
    return [f"{flag}={values[0]}", *values[1:]] if values else [flag]


def defaults_note(given: Collection[str], defaults: Mapping[str, Any], trl: Mapping[str, str]) -> str:
    """Return a sentence on the options that were not given and whose defaults TRL has otherwise."""
    others = [f"{name} {defaults[name]!r} (TRL: {value})" for name, value in trl.items() if name not in given]
    return "defaults that are other than TRL's: " + ", ".join(others) if others else ""
