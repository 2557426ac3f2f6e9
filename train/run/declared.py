"""How training programs take options: the command line, a YAML file under it, the jobs of ``--jobs``, a run's own.

A program declares its options by name, each with what ``argparse`` takes of it: those of a run, and those that each job
may have of its own.
"""

import argparse
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from preft_jax.errors import ConfigError, reject_unknown
from train.run.kept import OPTIONS_FILE, new_run, read_options
from train.run.trl import ALIASES, DEFAULTS, Translation, defaults_note, grouped, knows, takes_flag, translate

Options = Mapping[str, Mapping[str, Any]]
"""By name, what ``argparse`` takes of each, its default and its help."""


@dataclasses.dataclass(frozen=True)
class Declared:
    """The options of a program.

    Attributes:
        program: its name.
        run: of a run.
        job: that each job may have of its own.
        title: of the latter, for people.
        trl: TRL's defaults where the program's are others.
    """

    program: str
    run: Options
    job: Options
    title: str
    trl: Mapping[str, str] = dataclasses.field(default_factory=lambda: DEFAULTS)

    @property
    def all(self) -> dict[str, Mapping[str, Any]]:
        """Options of a run and of jobs."""
        return {**self.run, **self.job}

    @property
    def defaults(self) -> dict[str, Any]:
        """The value of each option that is not given."""
        return {name: how.get("default") for name, how in self.all.items()}


class Asked(NamedTuple):
    """What a command line asks for.

    Attributes:
        given: options that were given or inherited, by name.
        jobs: those of each job, or None without ``--jobs``.
        changes: of a resumed run, what is other than when it was begun, for people.
        notes: what of a command of TRL is other here, for people.
        run: what the run's checkpoints are known by.
    """

    given: dict[str, Any]
    jobs: list[dict[str, Any]] | None
    changes: tuple[str, ...]
    notes: tuple[str, ...]
    run: str


def make_parser(
    declared: Declared, description: str, kind: type[argparse.ArgumentParser] = argparse.ArgumentParser
) -> Any:
    """Return the command line, a parser of this kind; an option that is not given is absent from what it returns."""
    parser = kind(
        prog=f"python -m {declared.program}",
        usage="%(prog)s [options]; --help lists them",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="YAML of options; the command line wins")
    parser.add_argument("--jobs", type=Path, help="YAML: a list of jobs, each with a name and options of its own")
    for title, options in (("run", declared.run), (f"{declared.title} (each job may have its own)", declared.job)):
        group = parser.add_argument_group(title)
        for name, how in options.items():
            default = how.get("default")
            says_it = default in (None, "") or "(default: " in how["help"]
            text = how["help"] + ("" if says_it else f" (default: {default})")
            others = [f"--{alias.replace('_', '-')}" for alias, of in ALIASES.items() if of == name]
            keywords = {key: value for key, value in how.items() if key not in ("default", "help")}
            group.add_argument(
                f"--{name.replace('_', '-')}", *others, dest=name, help=text.replace("%", "%%"), **keywords
            )
    return parser


def read_command(declared: Declared, parser: argparse.ArgumentParser, argv: Sequence[str]) -> Asked:
    """Return what a command line asks for, with its files and, if it resumes, the options of the run so far.

    Raises:
        ConfigError: for a file that cannot be read, or an unknown option in it.
    """
    try:
        translated = [translate(grouped(argv), declared.all)]
    except ConfigError as error:
        parser.error(str(error))
    line = vars(parser.parse_args(translated[0].arguments))
    config = line.pop("config", None)
    jobs_file = line.pop("jobs", None)
    given = line
    if config:
        given = read_mapping(parser, _mapping(config), str(config), declared.all, told=translated) | line
    jobs = None if jobs_file is None else _jobs(declared, parser, jobs_file)
    changes: tuple[str, ...] = ()
    run = new_run()
    if given.get("resume"):
        saved, run, said = read_options(given.get("output_dir", declared.run["output_dir"]["default"]))
        old_jobs = saved.pop("jobs", None)
        old = read_mapping(parser, saved, OPTIONS_FILE, declared.all)
        if old_jobs is not None:
            old_jobs = [read_mapping(parser, job, OPTIONS_FILE, declared.job) for job in old_jobs]
        given, jobs = old | given, old_jobs if jobs is None else jobs
        changes = (*said, *_changes(declared, old, old_jobs, given, jobs))
    return Asked(given, jobs, changes, tuple(_notes(declared, translated, given)), run)


def _notes(declared: Declared, translated: Sequence[Translation], given: Collection[str]) -> Iterator[str]:
    unneeded = dict.fromkeys(name for one in translated for name in one.unneeded)
    if unneeded:
        yield f"options of TRL that change nothing here: {', '.join(unneeded)}"
    if any(one.marked for one in translated):
        note = defaults_note(given, declared.defaults, declared.trl)
        if note:
            yield note


def _changes(
    declared: Declared,
    old: Mapping[str, Any], old_jobs: Sequence[Mapping[str, Any]] | None,
    new: Mapping[str, Any], new_jobs: Sequence[Mapping[str, Any]] | None,
) -> Iterator[str]:  # fmt: skip
    """Yield what is other in a resumed run than when it was begun: first what its jobs share, then each job's own."""
    for name, text in _different(declared, old, new):
        if new_jobs is None or name in declared.run or any(name not in job for job in new_jobs):
            yield text
    if new_jobs is None:
        return
    before = {job["name"]: job for job in old_jobs or [{"name": old.get("name", declared.job["name"]["default"])}]}
    for job in new_jobs:
        was = before.pop(job["name"], None)
        if was is None:
            yield f"{job['name']}: a new job"
        else:
            own = was.keys() | job.keys()
            yield from (
                f"{job['name']}: {text}"
                for name, text in _different(declared, {**old, **was}, {**new, **job})
                if name in own
            )
    yield from (f"{name}: not trained any further" for name in before)


def _different(declared: Declared, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield options that differ, and how; what was not given has its default."""
    for name, how in declared.all.items():
        was, now = (plain_value(given.get(name, how.get("default"))) for given in (old, new))
        if was != now and name not in ("resume", "overwrite_output_dir", "output_dir"):
            yield name, f"{name}: {now} instead of {was}"


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}; give options as NAME: VALUE")
    return found


def _jobs(declared: Declared, parser: argparse.ArgumentParser, path: Path) -> list[dict[str, Any]]:
    content = _mapping(path)
    reject_unknown(map(str, content), ("jobs",), what=f"field of {path}:", error=ConfigError)
    found = content.get("jobs")
    if not isinstance(found, list) or not found or not all(isinstance(job, dict) for job in found):
        raise ConfigError(f"{path} has no list of jobs; give 'jobs:' and under it one '- name: ...' for each")
    for number, job in enumerate(found, 1):
        if job.get("name") is None:
            raise ConfigError(f"{path}: job {number} has no name; give each its own")
    return [read_mapping(parser, job, f"{path}, job {job['name']!r}", declared.job) for job in found]


def read_mapping(
    parser: argparse.ArgumentParser,
    values: Mapping[str, Any],
    where: str,
    allowed: Options,
    *,
    told: list[Translation] | None = None,
) -> dict[str, Any]:
    """Return a file's options as the command line would have them; ``told`` gets how they were translated.

    Raises:
        ConfigError: for one that is not ``allowed``, or has a value of another type.
    """
    pairs: list[tuple[str, list[str]]] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        own = ALIASES.get(name, name)
        if not (knows(own) and told is not None):
            reject_unknown([own], allowed, what=f"option in {where}:", error=ConfigError)
        if value is None:
            continue
        is_flag = own not in allowed or allowed[own].get("action") is not None
        if isinstance(value, bool) and not is_flag and not takes_flag(own, value):
            raise ConfigError(f"{where}: {own} is {value}; it takes a value")
        pairs.append((name, [",".join(map(str, value)) if isinstance(value, list) else str(value)]))
    try:
        found = translate(pairs, allowed)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if told is not None:
        told.append(found)
    try:
        return vars(parser.parse_args(found.arguments))
    except SystemExit as error:
        raise ConfigError(f"{where} has a value that is not allowed; see above") from error


def plain_value(value: Any) -> Any:
    """Return an option's value as JSON has it."""
    return str(value) if isinstance(value, Path) else value
