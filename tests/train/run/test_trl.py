"""Commands of TRL: each of its options runs, changes nothing and is said to, or is refused with what to do instead."""

import pytest
import yaml

from preft_jax import ConfigError
from train.run.options import make_parser, settings

pytestmark = pytest.mark.host

COMMAND = (
    "--model_name_or_path Qwen/Qwen2-0.5B --dataset_name trl-lib/Capybara --dataset_train_split train "
    "--learning_rate 2.0e-4 --num_train_epochs 1 --packing --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 8 --eos_token none --gradient_checkpointing --eval_strategy steps --eval_steps "
    "100 --use_peft --lora_r 32 --lora_alpha 16 --bf16 True --optim adamw_torch --lora_target_modules q_proj v_proj "
    "--report_to none --attn_implementation flash_attention_2 --output_dir Qwen2-0.5B-SFT --push_to_hub False "
    "--max_seq_length 512 --truncation_mode keep_start --logging_steps 25"
)
"""TRL's own example of `trl sft` with adapters, and the options that go with it."""

TRL_NAMES = """
model_name_or_path model_revision dtype attn_implementation use_peft lora_r lora_alpha lora_dropout
lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit
load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage dataset_name dataset_config
dataset_train_split dataset_test_split dataset_streaming ignore_bias_buffers datasets streaming test_split_size
learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path dataset_text_field
dataset_kwargs dataset_num_proc eos_token max_length truncation_mode shuffle_dataset packing packing_strategy
padding_free pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss loss_type activation_offloading
pad_token logging_steps gradient_checkpointing bf16 lr_scheduler_kwargs use_liger_kernel torch_empty_cache_steps
accelerator_config adam_beta1 adam_beta2 adam_epsilon auto_find_batch_size average_tokens_across_devices
batch_eval_metrics bf16_full_eval data_seed dataloader_drop_last dataloader_num_workers dataloader_pin_memory
dataloader_prefetch_factor ddp_backend ddp_timeout debug deepspeed disable_tqdm do_eval do_predict do_train
enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy
eval_use_gather_object fp16 fp16_full_eval fsdp fsdp_config full_determinism gradient_accumulation_steps
gradient_checkpointing_kwargs greater_is_better hub_model_id hub_strategy hub_token ignore_data_skip
include_for_metrics include_num_input_tokens_seen label_names label_smoothing_factor length_column_name
liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica log_on_each_node logging_first_step
logging_nan_inf_filter logging_strategy lr_scheduler_type max_grad_norm max_steps metric_for_best_model
neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules output_dir parallelism_config
per_device_eval_batch_size per_device_train_batch_size prediction_loss_only project push_to_hub remove_unused_columns
report_to restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node save_only_model
save_steps save_strategy save_total_limit seed skip_memory_metrics tf32 torch_compile torch_compile_backend
torch_compile_mode train_sampling_strategy use_cache use_cpu use_liger_kernel warmup_steps weight_decay max_seq_length
torch_dtype evaluation_strategy overwrite_output_dir warmup_ratio
"""
"""Of TRL 1.16's SFTConfig, ModelConfig and ScriptArguments, and older names."""


def parse(*argv):
    return settings(make_parser("Trains."), [str(part) for part in argv])


def job(*argv):
    (only,) = parse(*argv).jobs
    return only


def test_a_command_of_trl_runs_and_says_what_is_other():
    found = parse(*COMMAND.split())
    (only,) = found.jobs
    assert (found.model, found.dtype, str(found.output_dir)) == ("Qwen/Qwen2-0.5B", "bfloat16", "Qwen2-0.5B-SFT")
    assert (only.dataset, only.eval_dataset, only.dataset_train_split) == (
        "trl-lib/Capybara",
        "trl-lib/Capybara",
        "train",
    )
    assert (only.adapter.rank, only.adapter.alpha, only.adapter.targets) == (32, 16.0, ("q", "v"))
    assert (only.batches.batch_size, only.gradient_accumulation_steps, only.num_train_epochs) == (2, 8, 1.0)
    assert (only.data.max_length, only.data.truncate, only.batches.packing) == (512, True, True)
    assert (only.optimizer.optim, only.optimizer.learning_rate) == ("adamw", 2e-4)
    assert (found.train.gradient_checkpointing, found.eval_steps, found.report_to) == ("full", 100, ())
    unneeded, defaults = found.notes
    assert unneeded == "options of TRL that change nothing here: attn_implementation"
    assert defaults == (
        "defaults that are other than TRL's: lora_dropout 0.0 (TRL: 0.05), warmup_ratio 0.03 (TRL: 0), "
        "completion_only_loss True (TRL: False for chats)"
    )


def test_a_file_of_trl_is_its_command(tmp_path):
    words = COMMAND.replace("q_proj v_proj", "q_proj,v_proj").split(" --")
    pairs = [word.removeprefix("--").partition(" ") for word in words]
    values = {name: yaml.safe_load(value.strip()) if value.strip() else True for name, _, value in pairs}
    values["lora_target_modules"] = ["q_proj", "v_proj"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    of_file, of_line = parse("--config", tmp_path / "run.yaml"), parse(*COMMAND.split())
    assert (of_file.jobs, of_file.notes, of_file.train) == (of_line.jobs, of_line.notes, of_line.train)


@pytest.mark.parametrize(
    ("argv", "get", "value"),
    [
        ("--bf16", lambda s: s.dtype, "bfloat16"),
        ("--bf16 False", lambda s: s.dtype, None),
        ("--fp16", lambda s: s.dtype, "float16"),
        ("--bf16 --dtype float32", lambda s: s.dtype, "float32"),
        ("--torch_dtype auto", lambda s: s.dtype, None),
        ("--gradient_checkpointing False", lambda s: s.train.gradient_checkpointing, "none"),
        ("--gradient-checkpointing=true", lambda s: s.train.gradient_checkpointing, "full"),
        ("--gradient_checkpointing cheap", lambda s: s.train.gradient_checkpointing, "cheap"),
        ("--optim adamw_torch_fused", lambda s: s.jobs[0].optimizer.optim, "adamw"),
        ("--optim lion_32bit", lambda s: s.jobs[0].optimizer.optim, "lion"),
        ("--eval_strategy no --dataset a --eval_dataset b", lambda s: s.jobs[0].eval_dataset, None),
        ("--eval_strategy steps --dataset a --eval_dataset b", lambda s: s.jobs[0].eval_dataset, "b"),
        ("--evaluation_strategy steps --dataset a", lambda s: s.jobs[0].eval_dataset, "a"),
        ("--eval_strategy steps --dataset a", lambda s: s.jobs[0].dataset_test_split, "test"),
        ("--dataset a --eval_dataset a", lambda s: s.jobs[0].dataset_test_split, None),
        ("--save_strategy no", lambda s: s.save_steps, 0),
        ("--save_strategy steps --save_steps 7", lambda s: s.save_steps, 7),
        ("--packing 1", lambda s: s.jobs[0].batches.packing, True),
        ("--packing False", lambda s: s.jobs[0].batches.packing, False),
        ("--assistant_only_loss False", lambda s: s.jobs[0].data.completion_only_loss, True),
        ("--use_rslora true", lambda s: s.jobs[0].adapter.use_rslora, True),
        ("--lora_target_modules all-linear", lambda s: s.jobs[0].adapter, parse().jobs[0].adapter),
        ("--warmup_steps 0.1", lambda s: s.jobs[0].optimizer.warmup_ratio, 0.1),
        ("--report_to tensorboard wandb", lambda s: s.report_to, ("tensorboard", "wandb")),
        ("--max_steps -1", lambda s: s.jobs[0].max_steps, -1),
        ("--dataset_test_split val", lambda s: s.jobs[0].dataset_test_split, "val"),
        ("--dataset_config en", lambda s: s.jobs[0].dataset_config, "en"),
    ],
)  # fmt: skip
def test_an_option_of_trl_is_ours(argv, get, value):
    assert get(parse(*argv.split())) == value


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--use_peft False", "--use_peft False is TRL's and is not here: only adapters are trained"),
        ("--load_in_4bit", "--load_in_4bit .*--dtype"),
        ("--deepspeed zero3.json", "--mesh fsdp"),
        ("--push_to_hub", "hf upload"),
        ("--eval_strategy epoch", "--eval-strategy steps, and --eval-steps in updates"),
        ("--save_strategy epoch", "--save-steps"),
        ("--packing_strategy wrapped", "examples are packed whole"),
        ("--truncation_mode keep_end", "cut at their end"),
        ("--loss_type dft", "negative log-likelihood"),
        ("--resume_from_checkpoint out/checkpoint-5", "give --resume, and its --output-dir"),
        ("--bf16 maybe", "--bf16 is 'maybe'; allowed: true, false"),
        ("--optim adamw_8bit", "invalid choice: 'adamw_8bit'"),
        ("--learning_rat 3", r"unknown option --learning-rat \(did you mean --learning-rate\?\)"),
        ("--lora_rank 3", r"unknown option --lora-rank"),
        ("--per_device_batch_size 3", r"did you mean --per-device-\w+-batch-size"),
    ],
)  # fmt: skip
def test_what_is_not_here_is_refused_with_what_to_do(argv, told, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*argv.split())
    assert caught.value.code == 2
    with pytest.raises(ConfigError, match=told):
        raise ConfigError(capsys.readouterr().err)


@pytest.mark.parametrize("name", TRL_NAMES.split())
def test_every_name_of_trl_is_known(name, capsys):
    for value in ("1", "steps", "true", "linear", "adamw"):
        try:
            parse(f"--{name}", value)
        except (SystemExit, ConfigError):
            told = capsys.readouterr().err
            assert "unknown option" not in told
            assert "unrecognized" not in told


@pytest.mark.parametrize(
    "content", ["bf16: true", "eval_strategy: no", "save_strategy: no", "use_peft: true", "optim: adamw_torch"]
)
def test_values_that_yaml_reads_as_others_are_understood(content, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    parse("--config", tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("content", "told"),
    [("load_in_4bit: true", "run.yaml: --load_in_4bit True is TRL's"), ("datasets: [{path: a}]", "give --dataset")],
)
def test_a_file_that_asks_for_what_is_not_here_is_named(content, told, tmp_path):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(ConfigError, match=told):
        parse("--config", tmp_path / "run.yaml")
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text("jobs: [{name: ann, bf16: true}]")
    with pytest.raises(ConfigError, match="job 'ann': 'bf16'"):
        parse("--jobs", jobs)
