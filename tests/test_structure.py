"""How the code is laid out: import direction, no circles, plans without JAX, sizes of files and functions."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

ROOT = Path(__file__).parent.parent
ORDER = ("kernels", "preft_jax", "serve", "train")
"""A package may import those before it, and itself."""

EXCEPTIONS = {("preft_jax", "serve.generate")}
"""Pairs of modules, the importing one first. ``preft_jax.generate`` runs on the engine: the name is forwarded."""

BY_NAME = {("serve.finetune", "train.service.options"), ("serve.finetune", "train.service.service")}
"""Pairs that go against the direction, loaded by name: ``serve.api`` loads what trains, if it is to fine-tune."""

WITHOUT_JAX = (
    "preft_jax.adapters.allocator",
    "preft_jax.adapters.edit_mask",
    "preft_jax.errors",
    "preft_jax.shapes",
    "serve.bench.workload",
    "serve.engine.background",
    "serve.engine.config",
    "serve.engine.fairness",
    "serve.engine.lookahead",
    "serve.engine.observer",
    "serve.engine.pacing",
    "serve.engine.packing",
    "serve.engine.pages",
    "serve.engine.plan",
    "serve.engine.prefix",
    "serve.engine.recovery",
    "serve.engine.residency",
    "serve.engine.scheduler",
    "serve.engine.sequence",
    "serve.engine.staging",
)
"""Plans and plain data: used and tested without a device."""

JAX = {"flax", "jax", "jax_triton", "jaxlib", "optax", "orbax"}

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70
KERNEL_BODIES = ("kernels/pallas_tpu", "kernels/triton/device")
LONG_FILES: set[str] = set()
"""Files that are longer. Take entries out; put none in."""
LONG_FUNCTIONS: set[tuple[str, str]] = set()
"""Functions that are longer, each with its file. Take entries out; put none in."""


def name_of(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_for_types(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node, *, types):
    """Yield what a module's code imports, inside functions too: ``a.b`` or ``a.b.name``. ``types``: for types too."""
    if is_for_types(node) and not types:
        children = node.orelse
    else:
        children = ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the module's whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in children:
        yield from imports(child, types=types)


@functools.cache
def graph(root=ROOT, *, types=False):
    """Return what each module imports: modules of the project by name, and names of other packages."""
    paths = {name_of(path, root): path for package in ORDER for path in sorted((root / package).rglob("*.py"))}

    def resolved(name):
        while name and name not in paths:
            name = name.rpartition(".")[0]
        return name

    found = {}
    for module, path in paths.items():
        wanted = set(imports(ast.parse(path.read_text()), types=types))
        inside = {resolved(name) for name in wanted if name.split(".")[0] in ORDER} - {""}
        outside = {name.split(".")[0] for name in wanted if name.split(".")[0] not in ORDER}
        found[module] = (inside - {module}, outside)
    return found


def parents(name):
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def against_the_direction(modules):
    rank = {package: i for i, package in enumerate(ORDER)}
    return {
        (module, name)
        for module, (inside, outside) in modules.items()
        for name in {*inside, *(outside & {"bench", "tests"})}
        if rank.get(name.split(".")[0], len(ORDER)) > rank[module.split(".")[0]]
    }


def circle(modules):
    """Return the modules of a circle in order, or none."""
    try:
        graphlib.TopologicalSorter({module: inside for module, (inside, _) in modules.items()}).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def ways_to_jax(modules, module):
    """Return the modules that import JAX among ``module`` and those that it imports, directly or not."""
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(modules[name][0])
            todo.extend(parent for parent in parents(name) if parent in modules)  # They are imported with it.
    return {name for name in seen if modules[name][1] & JAX}


def test_packages_import_one_way():
    assert against_the_direction(graph(types=True)) == EXCEPTIONS


def loaded_by_name(root=ROOT):
    """Return what modules load by a constant name, as ``graph`` does."""
    return {
        name_of(path, root): (
            {
                node.args[0].value
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
                if isinstance(node.args[0], ast.Constant) and node.args[0].value.split(".")[0] in ORDER
            },
            set(),
        )
        for package in ORDER
        for path in sorted((root / package).rglob("*.py"))
    }


def test_what_is_loaded_by_name_against_the_direction_is_listed():
    assert against_the_direction(loaded_by_name()) == BY_NAME


def test_no_modules_import_each_other_in_a_circle():
    assert circle(graph()) == []


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_plans_and_plain_data_reach_no_jax(module):
    assert ways_to_jax(graph(), module) == set()


def test_plans_and_plain_data_load_no_jax():
    """What they import of others does not bring JAX in either."""
    code = f"import sys, {', '.join(WITHOUT_JAX)}; print(sorted({JAX} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_what_these_tests_find(tmp_path):
    """Wrong direction, a circle through a function's import, and JAX behind another module."""
    sources = {
        "kernels/a.py": "from serve import b",
        "serve/b.py": "import serve.c\nfrom kernels.plain import x",
        "serve/c.py": "def late():\n    from serve.b import y",
        "kernels/plain.py": "from kernels.deep import jit",
        "kernels/deep.py": "from jax import jit",
        "serve/late.py": "importlib.import_module('train.typed')",
        "train/typed.py": "if TYPE_CHECKING:\n    from train import other",
        "train/other.py": "from train import typed",
    }
    for name, text in sources.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    modules = graph(tmp_path)
    assert against_the_direction(modules) == {("kernels.a", "serve.b")}
    assert against_the_direction(loaded_by_name(tmp_path)) == {("serve.late", "train.typed")}
    assert set(circle(modules)) == {"serve.b", "serve.c"}
    assert ways_to_jax(modules, "serve.b") == {"kernels.deep"}
    assert ways_to_jax(modules, "train.typed") == set()


def sources(*folders):
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def test_no_file_is_too_long():
    long = {
        name
        for name, text in sources(*ORDER, "bench", "tests", "examples")
        if len(text.splitlines()) > MAX_FILE_LINES
    }  # fmt: skip
    assert long == LONG_FILES, f"files over {MAX_FILE_LINES} lines want to be two"


def test_no_function_is_too_long():
    long = {
        (name, node.name)
        for name, text in sources(*ORDER, "bench", "examples")
        if not name.startswith(KERNEL_BODIES)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert long == LONG_FUNCTIONS, f"functions over {MAX_FUNCTION_LINES} lines want to be two"
