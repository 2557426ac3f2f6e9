"""The Dockerfile, without Docker: what it copies is there and sent, and what it starts is a command line of ours."""

import json
import re
import shlex
from pathlib import Path

import pytest

from preft_jax.cli import hyphenated
from serve import api
from serve.options import check

pytestmark = pytest.mark.host

ROOT = Path(__file__).parent.parent


def instructions():
    """Return ``(instruction, rest)`` pairs, with continued lines joined and comments dropped."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def of(name):
    return [rest for instruction, rest in instructions() if instruction == name]


def copied():
    return [source for rest in of("COPY") for source in rest.split()[:-1]]


def test_what_is_copied_is_there():
    assert {"pyproject.toml", "constraints.txt", "serve"} <= set(copied())
    for source in copied():
        assert (ROOT / source).exists(), source


def test_the_context_is_what_is_copied_and_nothing_else():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert sorted(line[1:] for line in lines if line.startswith("!")) == sorted(copied())


def test_every_package_of_the_wheel_is_copied_and_has_its_placeholder():
    packages = re.search(r"packages = (\[.*\])", (ROOT / "pyproject.toml").read_text())[1]
    placeholders = re.search(r"mkdir ((?:\w+ )+)&&", " ".join(of("RUN")[1:]))[1].split()
    assert sorted(placeholders) == sorted(json.loads(packages))
    assert set(placeholders) <= set(copied())


def test_the_server_starts_with_options_it_has():
    (entry,) = of("ENTRYPOINT")
    python, dash, module, *options = json.loads(entry)
    assert (python, dash, module) == ("python", "-m", "serve.api")
    args = api.make_parser().parse_args(options)
    check(args)
    assert args.host == "0.0.0.0"
    assert [str(args.port)] == of("EXPOSE")
    assert [str(args.state_dir)] == of("VOLUME")
    assert of("USER")[-1] != "root"


def test_the_health_check_is_python_that_asks_a_path_without_a_key():
    from serve.server.middleware import OPEN_PATHS

    command = json.loads(of("HEALTHCHECK")[0].split("CMD", 1)[1])
    compile(command[2], "healthcheck", "exec")
    assert re.search(r"127\.0\.0\.1:8000(/\w+)", command[2])[1] in OPEN_PATHS


def test_the_base_image_is_pinned_to_a_version_we_support():
    version = re.fullmatch(r"python:3\.(\d+)\.\d+-slim-\w+", of("FROM")[0])
    least = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert int(version[1]) >= int(least[1])


@pytest.mark.parametrize("document", ["Dockerfile", "docs/server.md"])
def test_the_examples_give_options_that_there_are(document):
    text = (ROOT / document).read_text().replace("\\\n#", " ").replace("\\\n", " ")
    found = re.findall(r"docker run[^\n]* preft-jax (--[^\n]*)", text)
    assert found
    for line in found:
        api.make_parser().parse_args(hyphenated(shlex.split(line)))
