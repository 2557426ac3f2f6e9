"""Options of ``train.rl``: their own, those of ``train.sft``, a task's defaults, and TRL's commands."""

import pytest
import yaml

from preft_jax import ConfigError
from train.rollouts import builtin
from train.rollouts.options import DECLARED, make_parser, settings

pytestmark = pytest.mark.host

COMMAND = (
    "--model_name_or_path Qwen/Qwen2-0.5B --dataset_name trl-lib/DeepMath-103K --reward_funcs rewards.accuracy:reward "
    "--output_dir out --learning_rate 1e-5 --dtype bfloat16 --max_completion_length 128 --num_generations 4 "
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --use_peft --lora_r 32 --lora_target_modules "
    "q_proj v_proj --use_vllm --vllm_mode colocate --vllm_importance_sampling_cap 3 --beta 0.001 --scale_rewards batch "
    "--loss_type dr_grpo --top_p 1.0 --mask_truncated_completions True --num_iterations 2 --max_steps 7"
)
"""As TRL's examples of GRPO have it."""


def parse(*argv):
    return settings(make_parser("Trains."), [str(part) for part in argv])


def job(*argv):
    (only,) = parse(*argv).jobs
    return only


def test_a_command_of_trl_runs_and_says_what_is_other():
    found = parse(*COMMAND.replace("--beta 0.001", "--beta 0.0").split())
    (only,) = found.jobs
    options = only.rollouts
    assert (options.task, only.dataset, only.adapter.targets) == (
        "rewards.accuracy:reward", "trl-lib/DeepMath-103K", ("q", "v")
    )  # fmt: skip
    assert (options.num_generations, options.max_completion_length, options.importance_sampling_cap) == (4, 128, 3.0)
    assert (options.loss_type, options.scale_rewards, options.mask_truncated_completions) == ("dr_grpo", "batch", True)
    assert (only.samples, only.prompts, only.steps, only.max_steps) == (8, 2, 7, 14)
    unneeded, defaults = found.notes
    assert unneeded == "options of TRL that change nothing here: use_vllm, vllm_mode"
    assert "epsilon_high 0.28 (TRL: that of epsilon)" in defaults
    with pytest.raises(ConfigError, match="dr_grpo has no KL divergence; give beta 0"):
        parse(*COMMAND.split())


def test_a_file_and_jobs_have_the_same_options(tmp_path):
    jobs = [{"name": "ann", "num_generations": 2}, {"name": "bob", "algorithm": "rloo", "task": "reasoning_gym:a,b"}]
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"jobs": jobs}))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"num_generations": 4, "max_num_seqs": 5, "rank": 3}))
    found = parse("--config", tmp_path / "run.yaml", "--jobs", tmp_path / "jobs.yaml", "--rank", 2)
    ann, bob = found.jobs
    assert (ann.rollouts.num_generations, bob.rollouts.num_generations, found.max_num_seqs) == (2, 4, 5)
    assert (ann.rollouts.scale_rewards, bob.rollouts.scale_rewards) == ("group", "none")
    assert (ann.adapter.rank, bob.adapter.rank) == (2, 2)


def test_the_built_in_task_has_defaults_of_its_own_that_are_overridden():
    found = job()
    assert (found.rollouts.max_completion_length, found.steps) == (8, builtin.DEFAULTS["max_steps"])
    assert found.optimizer.learning_rate == builtin.DEFAULTS["learning_rate"]
    found = job("--max-completion-length", 5, "--max-steps", 3)
    assert (found.rollouts.max_completion_length, found.steps) == (5, 3)
    other = job("--task", "reasoning_gym:a")
    assert other.optimizer.learning_rate == DECLARED.job["learning_rate"]["default"]
    assert other.batches.max_length == other.rollouts.max_prompt_length + other.rollouts.max_completion_length
