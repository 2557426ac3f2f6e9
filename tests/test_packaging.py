"""What holds for the project as a whole: pins, public names, clashing names, documents in step with results."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bench import tables

pytestmark = pytest.mark.host

ROOT = Path(__file__).parent.parent


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pins_of_uv_and_pip_agree():
    pins = project()["tool"]["uv"]["constraint-dependencies"]
    assert sorted(pins) == sorted((ROOT / "constraints.txt").read_text().split())


def test_every_pin_lies_in_the_declared_range():
    declared = {re.split(r"[><=\[]", line)[0]: line for line in project()["project"]["dependencies"]}
    for pin in (ROOT / "constraints.txt").read_text().split():
        name, version = pin.split("==")
        floor = re.search(r">=([\d.]+)", declared.get(name, ""))
        if floor:
            assert tuple(map(int, version.split("."))) >= tuple(map(int, floor.group(1).split("."))), pin


def test_every_public_name_is_found():
    import preft_jax

    for name in preft_jax.__all__:
        assert getattr(preft_jax, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'generatr'"):
        preft_jax.generatr  # noqa: B018


def test_the_version_stands_once_in_meaning():
    import preft_jax

    assert project()["project"]["version"] == preft_jax.__version__


def test_transformers_tokenizers_work_beside_our_kernels_package():
    """transformers probes for a package named ``kernels``; ours must not look like that one."""
    code = (
        "import kernels, transformers; from transformers.utils import import_utils; "
        "assert not import_utils.is_kernels_available(); from transformers import AutoTokenizer; print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip().endswith("fine"), done.stderr


def test_importing_the_library_imports_no_torch_and_no_transformers():
    code = "import sys, preft_jax; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_tables_in_documents_are_made_from_the_committed_results():
    for path in tables.documents():
        assert tables.render(path.read_text()) == path.read_text(), f"{path.name}: run python -m bench.tables"


def test_links_in_documents_lead_somewhere():
    for path in tables.documents():
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    first_screen = "\n".join(text.splitlines()[:30])
    assert "\nuv run python -m serve.bench\n" in first_screen
    assert "\nuv run --extra test pytest\n" in first_screen
