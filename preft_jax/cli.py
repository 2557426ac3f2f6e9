"""What the programs' command lines share."""

from collections.abc import Sequence


def hyphenated(arguments: Sequence[str]) -> list[str]:
    """Accept underscores in option names: ``--output_json=f`` becomes ``--output-json=f``; values stay as they are."""

    def one(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return (name.replace("_", "-") if name.startswith("--") else name) + equals + value

    return [one(argument) for argument in arguments]
