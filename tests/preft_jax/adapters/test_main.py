"""``python -m preft_jax.adapters``: what it prints and writes, and its exit status."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from adapter_dirs import CONFIG, FIXTURES, MODEL, TENSORS, edit_config, make

from preft_jax.adapters.__main__ import main
from preft_jax.adapters.config import PEFT_MODULES, AdapterConfig
from preft_jax.adapters.merge import merge_lora
from preft_jax.errors import AdapterError
from preft_jax.io import pyreft
from preft_jax.io.adapter_files import load_adapter, save_adapter
from preft_jax.loading import load_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a copy of the base model, beside which its digest may be written."""
    return Path(shutil.copytree(FIXTURES / "base", tmp_path / "tiny-llama"))


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def test_inspect_says_what_an_adapter_is(tmp_path: Path, capsys: Any, rng: np.random.Generator) -> None:
    config = AdapterConfig(rank=4, layers=(0, 2), targets=("q", "v"), rank_pattern={"q": 2}, positions="f3+l2")
    adapter = make(config, rng)
    save_adapter(tmp_path, adapter, base_model="org/base")
    assert run("inspect", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "kind": "lora",
        "ranks": [2, 4],
        "scales": [1.0, 2.0],
        "targets": ["q", "v"],
        "layers": [0, 2],
        "positions": "f3+l2",
        "acts_on": "prompt tokens",
        "share_weights": True,
        "assistant_turns": "edit",
        "parameters": 2 * (2 * (64 + 64) + 4 * (64 + 32)),
        "bytes": (tmp_path / TENSORS).stat().st_size,
        "digest": adapter.digest,
        "base_model": "org/base",
        "base_model_digest": None,
    }
    assert run("inspect", tmp_path) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert (lines["ranks"], lines["acts_on"], lines["base_model_digest"]) == ("2, 4", "prompt tokens", "unknown")


@pytest.mark.parametrize(("name", "acts_on"), [("loreft", "prompt tokens"), ("direft", "all tokens")])
def test_inspect_of_reft(tmp_path: Path, capsys: Any, name: str, acts_on: str, rng: np.random.Generator) -> None:
    positions = "all" if acts_on == "all tokens" else "prompt"
    save_adapter(tmp_path, make(AdapterConfig(kind=name, rank=3, positions=positions), rng))
    assert run("inspect", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["ranks"], found["layers"], found["acts_on"]) == (name, [3], "all", acts_on)


def test_validate_accepts_and_refuses(tmp_path: Path, base: Path, capsys: Any, rng: np.random.Generator) -> None:
    assert run("validate", FIXTURES / "regex", "--model", base) == 0
    assert "only its shapes were checked" in capsys.readouterr().out
    save_adapter(tmp_path / "a", make(AdapterConfig(rank=2, base_model_digest="ab"), rng))
    assert run("validate", tmp_path / "a", "--model", base) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "--allow-base-mismatch" in error
    assert run("validate", tmp_path / "a", "--model", base, "--allow_base_mismatch") == 0


def test_an_all_token_lora_becomes_prefill_only_by_its_config_alone(tmp_path: Path, capsys: Any) -> None:
    arguments = ("--from", "peft", "--positions", "prompt", "--assistant_turns=skip")
    assert run("convert", FIXTURES / "patterns", tmp_path / "a", *arguments) == 0
    output = capsys.readouterr().out
    assert "positions: all -> prompt" in output
    assert "only the config changed, the tensors are the same" in output
    old, new = load_adapter(FIXTURES / "patterns", MODEL), load_adapter(tmp_path / "a", MODEL)
    assert (new.config.positions, new.config.assistant_turns) == ("prompt", "skip")
    for a, b in zip(jax.tree.leaves(old.params), jax.tree.leaves(new.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_convert_with_a_model_records_its_digest(tmp_path: Path, base: Path) -> None:
    assert run("convert", FIXTURES / "lora", tmp_path / "a", "--model", base) == 0
    assert load_adapter(tmp_path / "a", MODEL).config.base_model_digest == load_model(base).digest


def test_convert_to_peft_asks_for_the_flag(tmp_path: Path, capsys: Any, rng: np.random.Generator) -> None:
    save_adapter(tmp_path / "a", make(AdapterConfig(rank=2), rng))
    assert run("convert", tmp_path / "a", tmp_path / "b", "--to", "peft") == 1
    assert "--allow-prefill-only-as-peft" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert run("convert", tmp_path / "a", tmp_path / "b", "--to", "peft", "--allow-prefill-only-as-peft") == 0
    assert "every reader will edit ALL tokens" in capsys.readouterr().err
    assert "preft" not in json.loads((tmp_path / "b" / CONFIG).read_text())


def test_convert_from_pyreft(tmp_path: Path, base: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(file: str) -> dict[str, np.ndarray]:
        stored = np.load(Path(file).parent / "state.npz")
        return {key.split("/")[1]: stored[key] for key in stored if key.startswith(f"{Path(file).stem}/")}

    monkeypatch.setattr(pyreft, "_load_state_dict", load)
    source = FIXTURES / "pyreft" / "loreft_unshared"
    assert run("convert", source, tmp_path / "a") == 1
    assert "give --model" in capsys.readouterr().err
    assert run("convert", source, tmp_path / "a", "--model", base, "--positions", "f3+l2") == 0
    config = load_adapter(tmp_path / "a", MODEL).config
    assert (config.kind, config.positions, config.share_weights) == ("loreft", "f3+l2", False)
    assert run("convert", source, tmp_path / "b", "--model", base, "--act-fn", "relu") == 1
    assert "act_fn 'relu' is not linear" in capsys.readouterr().err


def test_convert_checks_the_source_format(tmp_path: Path, capsys: Any) -> None:
    assert run("convert", FIXTURES / "lora", tmp_path / "a", "--from", "preft") == 1
    assert "is a peft directory, not a preft one; give --from peft" in capsys.readouterr().err
    assert run("convert", tmp_path, tmp_path / "a") == 1
    assert "give an adapter directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lora", "rslora", "patterns"])
def test_merged_weights_are_the_sum_rounded_once(name: str, base: Path) -> None:
    model = load_model(base, dtype="bfloat16")
    adapter = load_adapter(FIXTURES / name, MODEL)
    merged = merge_lora(model.params, adapter)
    for i, (old, new) in enumerate(zip(model.params["layers"], merged["layers"], strict=True)):
        for site in PEFT_MODULES:
            leaves = adapter.params["layers"][i].get(site)
            expected = np.asarray(old[site], np.float64)
            if leaves is not None:
                product = np.asarray(leaves["lora_a"], np.float64).T @ np.asarray(leaves["lora_b"], np.float64).T
                expected = expected + product * adapter.config.scale_at(i, site)
            assert new[site].dtype == jnp.bfloat16
            # One rounding to bfloat16, of a float32 sum: half a unit in the last place of 8 bits.
            np.testing.assert_allclose(np.asarray(new[site], np.float64), expected, rtol=2**-8, atol=1e-6)
            assert (leaves is None) == bool(jnp.array_equal(new[site], old[site]))
    assert merged["embed"] is model.params["embed"]


@pytest.mark.parametrize(("dtype", "stored"), [(None, jnp.bfloat16), ("float32", jnp.float32)])
def test_merge_writes_a_model(tmp_path: Path, base: Path, dtype: str | None, stored: Any) -> None:
    more = ["--dtype", dtype] if dtype else []
    assert run("merge", FIXTURES / "lora", "--model", base, "--output", tmp_path / "merged", *more) == 0
    tensors = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(stored)}
    source = load_model(base)
    expected = merge_lora(source.params, load_adapter(FIXTURES / "lora", source), dtype=stored)
    found = load_model(tmp_path / "merged", dtype=stored).params
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (AdapterConfig(rank=2), "positions 'prompt' cannot be merged: merged weights act on every token"),
        (AdapterConfig(kind="loreft", rank=2, positions="all"), "a loreft adapter cannot be merged"),
        (AdapterConfig(rank=2, positions="all", assistant_turns="skip"), "assistant_turns 'skip' cannot be merged"),
    ],
)
def test_merge_refuses(
    tmp_path: Path, capsys: Any, config: AdapterConfig, reason: str, rng: np.random.Generator
) -> None:
    save_adapter(tmp_path / "a", make(config, rng))
    assert run("merge", tmp_path / "a", "--model", "tiny", "--output", tmp_path / "merged") == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    with pytest.raises(AdapterError, match="cannot be merged"):
        merge_lora({"layers": []}, make(config, rng))


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["explode"], ["inspect"], ["validate", "a"], ["merge", "a", "--model", "tiny"], ["inspect", "a", "--jsn"],
        ["convert", "a", "b", "--to", "pyreft"], ["convert", "a", "b", "--assistant-turns", "keep"],
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage: python -m preft_jax.adapters" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_failures_are_one_line_without_a_traceback(tmp_path: Path, capsys: Any, command: str) -> None:
    directory = Path(shutil.copytree(FIXTURES / "lora", tmp_path / "a"))
    edit_config(directory, lambda contents: contents.update(use_dora=True))
    assert run(command, directory, *([tmp_path / "b"] if command == "convert" else [])) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "use_dora" in captured.err
    assert captured.err.count("\n") == 1


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "preft_jax.adapters", "inspect", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
