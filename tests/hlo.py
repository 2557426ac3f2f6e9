"""What optimised HLO says of buffers: whether they are updated in place, and which are copied."""

import re


def shape_of(array):
    return f"f32[{','.join(map(str, array.shape))}]"


def flat(shape):
    """Return an array's shape with its first two axes as one."""
    first, second, *rest = map(int, shape[4:-1].split(","))
    return f"f32[{','.join(map(str, (first * second, *rest)))}]"


def copies_of(text, shapes):
    """Return the lines that copy an array of one of these shapes, as it is or with its first two axes as one."""
    shapes = {*shapes, *map(flat, shapes)}
    copies = [line for line in text.splitlines() if re.search(r"= \S+ copy\(", line)]
    return [line for line in copies if any(shape in line for shape in shapes)]


def assert_in_place(text, arrays):
    """Every one of these arrays is a parameter that an output takes the place of."""
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text.splitlines()[0])
    assert aliases is not None
    aliased = set(re.findall(r"\((\d+), \{\}, m\w+-alias\)", aliases.group(1)))
    entry = text[text.index("\nENTRY ") :]
    shapes = {shape_of(array) for array in arrays}
    found = [
        number
        for shape in shapes
        for number in re.findall(rf"= {re.escape(shape)}\S* parameter\((\d+)\)", entry)
    ]  # fmt: skip
    assert len(found) == len(arrays), "the test looks for shapes that the program does not have"
    assert set(found) <= aliased
    assert not copies_of(text, shapes)
