import argparse

import pytest

from preft_jax.cli import add_quantization, quantization_of

pytestmark = pytest.mark.host


def parsed(text):
    parser = argparse.ArgumentParser()
    add_quantization(parser.add_argument)
    return quantization_of(parser.parse_args(text.split()))


def test_options_are_arguments_of_load_model():
    assert parsed("") == {"quantization": "none", "keep_layers": ()}
    assert parsed("--quantization fp8 --keep-layers 0,-1") == {"quantization": "fp8", "keep_layers": (0, -1)}


@pytest.mark.parametrize("options", ["--quantization int4", "--keep-layers first"])
def test_what_there_is_not_is_refused(options, capsys):
    with pytest.raises(SystemExit):
        parsed(options)
    assert (
        "invalid choice: 'int4'" in (found := capsys.readouterr().err)
    ) or "numbers with commas, such as 0,-1" in found
