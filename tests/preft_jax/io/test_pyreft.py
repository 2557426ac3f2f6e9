"""pyreft folders: the same outputs as pyreft's own modules, and refusals of what is no low-rank edit."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from adapter_dirs import FIXTURES, MODEL

from preft_jax.adapters.adapter import fold
from preft_jax.adapters.config import AdapterConfig
from preft_jax.errors import AdapterError
from preft_jax.io import pyreft
from preft_jax.io.adapter_files import load_adapter, save_adapter
from preft_jax.io.pyreft import convert_pyreft

POSITIONS = "f3+l2"
CONFIGS = {
    "loreft": AdapterConfig(kind="loreft", rank=4, positions=POSITIONS),
    "loreft_unshared": AdapterConfig(kind="loreft", rank=4, positions=POSITIONS, layers=(0, 2), share_weights=False),
    "direft": AdapterConfig(kind="direft", rank=4, positions=POSITIONS, layers=(1, 2)),
    "nodireft": AdapterConfig(kind="direft", rank=4, positions=POSITIONS, orthonormal=False),
}

TOLERANCE = 1e-5
"""Outputs are of size 1 to 10 and sums of 64 products in float32, in another order than torch's."""


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Let the converter read the tensors that ``state.npz`` holds; changes of the returned ones win."""
    changed: dict[str, np.ndarray] = {}

    def load(file: str) -> dict[str, np.ndarray]:
        stored = np.load(Path(file).parent / "state.npz")
        prefix = f"{Path(file).stem}/"
        tensors = {key.removeprefix(prefix): stored[key] for key in stored if key.startswith(prefix)}
        return {key: x for key, x in (tensors | changed).items() if x.ndim}

    monkeypatch.setattr(pyreft, "_load_state_dict", load)
    return changed


def copy_folder(tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object] = lambda contents: None) -> Path:
    folder = Path(shutil.copytree(FIXTURES / "pyreft" / name, tmp_path / name))
    contents = json.loads((folder / "config.json").read_text())
    change(contents)
    (folder / "config.json").write_text(json.dumps(contents))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_those_of_pyrefts_modules(name: str, states: dict[str, np.ndarray]) -> None:
    adapter = convert_pyreft(FIXTURES / "pyreft" / name, MODEL, positions=POSITIONS)
    assert adapter.config == CONFIGS[name]
    edits = fold(adapter)["layers"]
    outputs = dict(np.load(FIXTURES / "pyreft" / name / "io.npz"))
    x = outputs.pop("x")
    assert len(outputs) == sum(len(sites) for sites in edits) * adapter.config.groups
    for key, expected in outputs.items():
        layer, group = int(key.split("_")[1]), int(key.split("#")[1])
        a, c, b, groups = (np.asarray(leaf) for leaf in edits[layer]["block"])
        rows = groups == group
        found = x + (x @ a[:, rows] + c[rows]) @ b[rows]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_converted_adapters_can_be_saved_and_loaded(tmp_path: Path, name: str, states: dict[str, np.ndarray]) -> None:
    adapter = convert_pyreft(FIXTURES / "pyreft" / name, MODEL, positions=POSITIONS, assistant_turns="skip")
    save_adapter(tmp_path / "a", adapter)
    found = load_adapter(tmp_path / "a", MODEL)
    assert found.config == adapter.config
    assert found.config.assistant_turns == "skip"
    assert found.digest == adapter.digest


def test_torchs_pickles_hold_the_same_tensors() -> None:
    pytest.importorskip("torch")
    for name in CONFIGS:
        folder = FIXTURES / "pyreft" / name
        stored = np.load(folder / "state.npz")
        for path in folder.glob("*.bin"):
            for key, tensor in pyreft._load_state_dict(str(path)).items():
                np.testing.assert_array_equal(tensor, stored[f"{path.stem}/{key}"])


def test_a_missing_torch_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(AdapterError, match=r"torch is not installed.*pip install torch"):
        convert_pyreft(FIXTURES / "pyreft" / "loreft", MODEL)


def test_pickles_are_read_as_plain_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def load(file: str, **options: Any) -> None:
        given.update(options)
        raise RuntimeError("Weights only load failed")

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(load=load))
    with pytest.raises(
        AdapterError, match=r"layer_0.*not a torch state dict of plain tensors .RuntimeError. and was not"
    ):
        convert_pyreft(FIXTURES / "pyreft" / "loreft", MODEL)
    assert given["weights_only"] is True


def set_class(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda contents: contents.update(
        intervention_types=[f"<class 'pyreft.interventions.{name}'>"] * len(contents["intervention_types"])
    )


def set_field(index: int, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda contents: contents["representations"][0].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[(set_class(f"{x}Intervention"), f"{x}Intervention cannot be converted; allowed: LoreftIntervention")
          for x in ("Noreft", "Consreft", "Lobireft")],
        (lambda contents: contents["intervention_types"].__setitem__(0, "<class 'pyreft.x.DireftIntervention'>"),
         "mixes DireftIntervention, LoreftIntervention"),
        (lambda contents: contents.update(act_fn="relu"), "act_fn 'relu' is not linear"),
        (set_field(1, "mlp_output"), "component 'mlp_output' at unit 'pos' cannot be converted"),
        (set_field(2, "h.pos"), "at unit 'h.pos'"),
        (set_field(3, 2), "max_number_of_units 2"),
        (set_field(0, 3), "layer 3 is not one of the base model's, 0 to 2"),
        (set_field(0, "0"), "layer '0'"),
        (lambda contents: contents.pop("representations"), "not the config of a pyreft folder"),
        (lambda contents: contents.update(intervention_types=[]), "3 representations and 0 intervention types"),
        (lambda contents: contents.update(representations=4), "not the config of a pyreft folder"),
        (lambda contents: [contents[key].pop() for key in ("representations", "intervention_types")],
         "does not name the intervention of .*layer_2"),
        (lambda contents: contents["representations"].__setitem__(2, contents["representations"][0]),
         "layers .0, 1, 0."),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_by_name(
    tmp_path: Path, change: Any, message: str, states: dict[str, np.ndarray]
) -> None:
    folder = copy_folder(tmp_path, "loreft", change)
    if message.startswith("layers"):
        for path in folder.glob("*layer_2*"):
            path.unlink()
    with pytest.raises(AdapterError, match=message):
        convert_pyreft(folder, MODEL)


@pytest.mark.parametrize("act_fn", ["relu", "gelu"])
def test_act_fns_that_are_not_linear_are_refused(act_fn: str) -> None:
    with pytest.raises(AdapterError, match=f"act_fn '{act_fn}' is not linear"):
        convert_pyreft(FIXTURES / "pyreft" / "loreft", MODEL, act_fn=act_fn)


@pytest.mark.parametrize("positions", ["prompt", "all", "f7", "l7"])
def test_weights_by_position_need_first_and_last_positions(positions: str) -> None:
    with pytest.raises(AdapterError, match=f"such as 'f7\\+l7', not '{positions}'"):
        convert_pyreft(FIXTURES / "pyreft" / "loreft_unshared", MODEL, positions=positions)


@pytest.mark.parametrize("positions", ["first", "f0+l0"])
def test_positions_that_are_no_rule_are_refused(positions: str, states: dict[str, np.ndarray]) -> None:
    with pytest.raises(AdapterError, match=f"positions '{positions}'".replace("+", r"\+")):
        convert_pyreft(FIXTURES / "pyreft" / "loreft", MODEL, positions=positions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotate_layer": np.ones((64, 4), np.float32)}, "columns of rotate_layer are not orthonormal"),
        ({"rotate_layer": np.ones((64, 3), np.float32)}, "do not belong together"),
        ({"weight": np.ones(4, np.float32)}, "do not belong together"),
        ({"bias": np.full(4, np.nan, np.float32)}, "not finite"),
        ({"weight": np.float32(0)}, "lacks tensors of LoreftIntervention; it holds bias, rotate_layer"),
    ],
)
def test_bad_tensors_are_refused(states: dict[str, np.ndarray], change: dict[str, Any], message: str) -> None:
    states.update(change)
    with pytest.raises(AdapterError, match=message):
        convert_pyreft(FIXTURES / "pyreft" / "loreft", MODEL)


def test_ranks_that_differ_by_layer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(file: str) -> dict[str, np.ndarray]:
        rank = 2 if "layer_1" in file else 3
        return {"weight": np.zeros((rank, 64)), "bias": np.zeros(rank), "rotate_layer": np.eye(64, rank)}

    monkeypatch.setattr(pyreft, "_load_state_dict", load)
    with pytest.raises(AdapterError, match=r"different ranks by layer, \{0: 3, 1: 2, 2: 3\}"):
        convert_pyreft(FIXTURES / "pyreft" / "loreft", MODEL)


def test_a_folder_that_trained_the_base_model_is_refused(tmp_path: Path) -> None:
    folder = copy_folder(tmp_path, "loreft")
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"pytorch_model\.bin, trained weights of the base model"):
        convert_pyreft(folder, MODEL)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"config\.json does not exist; give a folder that pyreft"):
        convert_pyreft(tmp_path / "nowhere", MODEL)
