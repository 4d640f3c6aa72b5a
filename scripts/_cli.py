"""Command lines of the form `key=value`, from a dataclass and a YAML file of `configs/`.

A script says `run(main, GenerateConfig, "gen_mesh")`. The dataclass gives the options, their defaults, their
types and (through `elastic3d.utils.options.option`) their help texts and ranges; `configs/gen_mesh.yaml` may change
defaults and choose configuration groups (`configs/cache/paper.yaml` is chosen by `cache=paper`). Hydra
composes the files; what the user types never passes through a grammar: a path or a prompt arrives as typed, but for
a leading `~/` of a path, which is the home folder. Defaults that name what the repository ships, such as
`data/splits`, hold from any folder.
Where it is unique, a nested option's last name is enough: `max_faces=` for `cleanup.max_faces=`.

Exit codes: 0 success, 1 what `main` returns when some items failed, 2 a mistake in what the user gave,
130 interrupted, 143 terminated.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin

import yaml
from _values import expected, literal, optional_type, parse_value, shortened
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from elastic3d.errors import UserError
from elastic3d.utils.options import Bounds, bounds_of, from_dict, hints

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG_DIR = REPOSITORY / "configs"
Config = TypeVar("Config")
_SHIPPED = ("data/splits", "data/pretrained", "data/samples", "data/prompts")
_TEXTS = ("prompt",)  # options that are no paths, whatever they begin with
# What other choices of the command take: `stage=dit` -> its options. Asked for where an option is unknown.
Elsewhere = Callable[[], Mapping[str, Collection[str]]]
_DEBUG_HELP = "Show the full traceback of an error."


def run(
    main: Callable[[Config], int | None],
    config_class: type[Config],
    config_name: str,
    arguments: Sequence[str] | None = None,
    elsewhere: Elsewhere = dict,
) -> NoReturn:
    """Run `main` on the command line's options and leave the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names may be no UTF-8
    signal.signal(signal.SIGTERM, _terminate)
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(execute(main, config_class, config_name, given, elsewhere=elsewhere))


def execute(
    main: Callable[[Config], int | None],
    config_class: type[Config],
    config_name: str,
    arguments: Sequence[str],
    config_dir: Path = CONFIG_DIR,
    elsewhere: Elsewhere = dict,
) -> int:
    """The exit code of `main(config)`, with every expected error told in one sentence on stderr."""
    if {"--help", "-h", "help"} & set(arguments):
        print(help_text(main, config_class, config_name, config_dir, arguments))
        return 0
    warnings.formatwarning = _one_line
    debug = any(argument.lower() == "debug=true" for argument in arguments)
    try:
        return main(parse(config_class, config_name, arguments, config_dir, elsewhere)) or 0
    except Terminated:
        print("terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {_one_sentence(error)}", file=sys.stderr)
        if not debug and not isinstance(error, UserError):
            print("(debug=true shows where this happened)", file=sys.stderr)
        return 2


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends the command as Ctrl-C does, so that nothing is left half-written and no worker goes on."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def check_writable(folder: Path) -> None:
    """UserError before the work, not after it, if nothing can be written to `folder`."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"can't write to {folder}: {existing} is no folder that may be written to")


def parse(
    config_class: type[Config],
    config_name: str,
    arguments: Sequence[str],
    config_dir: Path = CONFIG_DIR,
    elsewhere: Elsewhere = dict,
) -> Config:
    """The configuration that `arguments` (each `key=value`) ask for.

    Raises:
        UserError: unknown option or group, a value of the wrong type or out of range, a required option left out.
    """
    options = {option.name: option for option in walk_options(config_class)}
    choices = group_choices(config_class, config_name, config_dir)
    groups: dict[str, str] = {}
    values: dict[str, str] = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator:
            raise UserError(f"{argument!r} is not an option: write options as key=value (--help lists them)")
        key = _full_name(key, options, choices)
        if key in choices:
            if text not in choices[key]:
                raise UserError(f"{argument}: expected one of {', '.join(choices[key])}")
            groups[key] = text
        elif key in options:
            values[key] = text
        elif key == "debug":
            if text.lower() not in ("true", "false"):
                raise UserError(f"{argument}: expected true or false")
        else:
            raise UserError(_unknown(key, [*options, *choices, "debug"], elsewhere()))
    try:
        config = composed(config_class, config_name, config_dir, groups)
        _anchor(config, options)
        for key, text in values.items():
            _set(config, options, key, text)
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key or str(error).rpartition(": ")[2]
        raise UserError(f"{key}= is required: {options[key].help if key in options else ''}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"configuration {config_name}: {str(error).splitlines()[0]}") from error
    return from_dict(config_class, plain)


def composed(
    config_class: type[Any], config_name: str, config_dir: Path, groups: dict[str, str] | None = None
) -> DictConfig:
    """The dataclass' defaults, overlaid by `<config_name>.yaml` with the chosen groups."""
    chosen = _default_groups(config_name, config_dir)
    for key, name in (groups or {}).items():
        chosen |= _default_groups(f"{key}/{name}", config_dir)
    overrides = [f"{'' if key in chosen else '+'}{key}={name}" for key, name in (groups or {}).items()]
    with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
        files = compose(config_name, overrides=overrides)
    return OmegaConf.merge(_with_defaults(config_class), files)  # type: ignore[return-value]


def _with_defaults(config_class: type[Any]) -> DictConfig:
    """The dataclass' defaults; a nested one that has to be given is there too, with its own."""
    config: DictConfig = OmegaConf.structured(config_class)
    for name, kind in hints(config_class).items():
        if is_dataclass(kind) and OmegaConf.is_missing(config, name):
            config[name] = _with_defaults(kind)  # type: ignore[arg-type]
    return config


def _anchor(config: DictConfig, options: dict[str, Option]) -> None:
    """Make defaults that name shipped files absolute where the current folder has no such file."""

    def anchored(value: Any) -> Any:
        text = Path(value).as_posix() if isinstance(value, (str, Path)) else ""
        if not text.startswith(_SHIPPED) or Path(text).exists():
            return value
        return type(value)(REPOSITORY / text)

    for name in options:
        value = OmegaConf.select(config, name)
        if isinstance(value, (str, Path)) and (new := anchored(value)) != value:
            OmegaConf.update(config, name, new)
        elif isinstance(value, ListConfig) and (news := [anchored(item) for item in value]) != list(value):
            OmegaConf.update(config, name, news)


# ------------------------------------------------------------------------------------------------ options


@dataclass(frozen=True)
class Option:
    """One leaf of the configuration: dotted name, type, meaning, and the nested dataclasses it lies in."""

    name: str
    type: Any
    help: str
    parents: tuple[Any, ...]
    bounds: Bounds
    advanced: bool


def walk_options(
    config_class: type[Any], prefix: str = "", parents: tuple[Any, ...] = ()
) -> Iterator[Option]:
    """Every option of a dataclass, nested dataclasses by dotted names."""
    for item in fields(config_class):
        if item.metadata.get("internal"):
            continue
        name, (kind, optional) = prefix + item.name, optional_type(hints(config_class)[item.name])
        if is_dataclass(kind):
            yield from walk_options(kind, name + ".", (*parents, kind))  # type: ignore[arg-type]
        else:
            meaning, advanced = item.metadata.get("help", ""), item.metadata.get("advanced", False)
            given = kind | None if optional else kind
            yield Option(name, given, meaning, parents, bounds_of(item), advanced)


def group_choices(config_class: type[Any], config_name: str, config_dir: Path) -> dict[str, list[str]]:
    """The configuration groups of this command: option name -> names of the files to choose from."""
    names = {item.name for item in fields(config_class)} | _default_groups(config_name, config_dir)
    found = {name: sorted(file.stem for file in (config_dir / name).glob("*.yaml")) for name in names}
    return {name: choices for name, choices in sorted(found.items()) if choices}


def _default_groups(config_name: str, config_dir: Path) -> set[str]:
    """Groups named in the defaults list of `<config_name>.yaml`."""
    entries = (yaml.safe_load((config_dir / f"{config_name}.yaml").read_text()) or {}).get("defaults", [])
    keys = [key for entry in entries if isinstance(entry, dict) for key in entry]
    names = (key.split("@")[0].removeprefix("override ").removeprefix("optional ") for key in keys)
    return {name.strip().removeprefix("/") for name in names}


def _full_name(key: str, options: dict[str, Option], choices: dict[str, list[str]]) -> str:
    """`max_faces` for `cleanup.max_faces`, where no other option has that last name; else `key` itself."""
    if key in options or key in choices or "." in key:
        return key
    matches = [name for name in options if name.rpartition(".")[2] == key]
    return matches[0] if len(matches) == 1 else key


def _unknown(key: str, known: Sequence[str], elsewhere: Mapping[str, Collection[str]]) -> str:
    name = key.lstrip("-")
    by_leaf = [each for each in known if each.rpartition(".")[2] == name.rpartition(".")[2]]
    close = by_leaf or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    having = [choice for choice, names in elsewhere.items() if name in names]
    hint += f"it is an option of {', '.join(having)}; " if having else ""
    return f"unknown option {key!r}: {hint}(--help lists every option)"


# ------------------------------------------------------------------------------------------------- values


def _set(config: DictConfig, options: dict[str, Option], key: str, text: str) -> None:
    try:
        is_text = key.rpartition(".")[2] in _TEXTS
        value = literal(text) if is_text else parse_value(text, options[key].type)
        parent = config
        for name, nested in zip(key.split(".")[:-1], options[key].parents, strict=True):
            if OmegaConf.is_missing(parent, name) or parent[name] is None:
                parent[name] = OmegaConf.structured(nested)
            parent = parent[name]
        parent[key.rpartition(".")[2]] = value
    except (ValueError, TypeError, OmegaConfBaseException) as error:
        raise UserError(f"{key}={shortened(text)}: expected {expected(options[key].type)}") from error


# --------------------------------------------------------------------------------------------------- help


def help_text(
    main: Callable[..., Any],
    config_class: type[Any],
    config_name: str,
    config_dir: Path,
    arguments: Sequence[str] = (),
) -> str:
    """What the command does (the docstring of `main`'s module) and every option with default, meaning and range.

    Defaults are those of the groups that `arguments` choose; `all` among them adds what is seldom changed.
    """
    module = sys.modules[main.__module__]
    script = Path(getattr(module, "__file__", None) or config_name).name
    about = (module.__doc__ or main.__doc__ or "").strip()
    choices = group_choices(config_class, config_name, config_dir)
    given = (argument.partition("=") for argument in arguments)
    chosen = {key: text for key, _, text in given if text in choices.get(key, [])}
    config, advanced = composed(config_class, config_name, config_dir, chosen), "all" in arguments
    lines = [f"usage: python scripts/{script} key=value ...", "", about, "", "options:"]
    for name, names in choices.items():
        lines += _entry(name, "", f"Choose a set of options from configs/{name}/: {', '.join(names)}.")
    options = [option for option in walk_options(config_class) if option.name not in choices]
    for option in options:
        if advanced or not option.advanced:
            lines += _entry(option.name, _show(config, option.name), _meaning(option))
    lines += _entry("debug", "false", _DEBUG_HELP)
    hidden = sum(option.advanced for option in options)
    if hidden and not advanced:
        lines += ["", f"{hidden} more options are seldom changed: --help all lists them too."]
    return "\n".join(lines)


def _meaning(option: Option) -> str:
    """What an option is, as a sentence, and what it may be."""
    kind = optional_type(option.type)[0]
    meaning = option.help[:1].upper() + option.help[1:]
    meaning += "" if meaning.endswith(".") or not meaning else "."
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"{meaning} One of: {', '.join(member.name for member in kind)}."
    if text := str(option.bounds):
        each = "each " if get_origin(kind) in (list, tuple) else ""
        return f"{meaning} ({each}{text})"
    return meaning


def _entry(name: str, default: str, help: str) -> list[str]:
    head = f"  {name}={default}"
    body = textwrap.wrap(help, width=110, initial_indent=" " * 32, subsequent_indent=" " * 32)
    if len(head) < 31 and body:
        return [head.ljust(32) + body[0].lstrip(), *body[1:]]
    return [head, *body]


def _show(config: DictConfig, name: str) -> str:
    """The default of an option as the user would type it; empty where the option is required."""
    try:
        value = OmegaConf.select(config, name, throw_on_missing=True)
    except MissingMandatoryValue:
        return "(required)"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, ListConfig):
        return f"[{', '.join(item.name if isinstance(item, Enum) else str(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this project as its sentence alone; those of libraries with their place."""
    place = "" if category is UserWarning and "elastic3d" in filename else f"{filename}:{lineno}: "
    return f"warning: {place}{message}\n"


def _one_sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}"
    return " ".join(str(error).split()) or type(error).__name__
