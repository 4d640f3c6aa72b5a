"""Command lines of the form `key=value`, from a dataclass and a YAML file of `configs/`.

A script says `run(main, GenerateConfig, "gen_mesh")`. The dataclass gives the options, their defaults, their types and
(through `elastic3d.utils.options.option`) their help texts and ranges; a file `configs/gen_mesh.yaml`, which may be
left out, changes defaults and chooses configuration groups (`configs/cache/paper.yaml` is chosen by `cache=paper`).
Hydra composes the files where there are any, and what the user types is put over them. It never passes through a
grammar: a path or a prompt arrives as typed, but for a leading `~/` of a path, which is the home folder. Defaults that
name what the repository ships, such as `data/splits`, hold from any folder.
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
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml

from elastic3d.errors import UserError
from elastic3d.utils.files import parse_yaml
from elastic3d.utils.options import Bounds, Leaf, alternatives, expected, from_dict, typed, walk

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG_DIR = REPOSITORY / "configs"
Config = TypeVar("Config")
_SHIPPED = ("data/splits", "data/pretrained", "data/samples", "data/prompts")
_TEXTS = ("prompt",)  # options that are no paths, whatever they begin with
_BOOLEANS = dict.fromkeys(("true", "yes", "y", "on", "1"), True)
_BOOLEANS |= dict.fromkeys(("false", "no", "n", "off", "0"), False)
# What other choices of the command take: `stage=dit` -> its options. Asked for where an option is unknown.
Elsewhere = Callable[[], Mapping[str, Collection[str]]]
_DEBUG = Leaf("debug", bool, False, "Show the full traceback of an error.", Bounds(), False, False)

# transformers warns of packages that are not needed, and reads this once, when it is imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


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
    try:
        return main(parse(config_class, config_name, arguments, config_dir, elsewhere)) or 0
    except (KeyboardInterrupt, ValueError, OSError) as error:
        options = (argument.partition("=") for argument in arguments)
        return _told(error, any(_BOOLEANS.get(text.lower()) for name, _, text in options if name == "debug"))


def _told(error: BaseException, debug: bool) -> int:
    """The exit code for an expected error, once it is told; with `debug`, where it happened."""
    if isinstance(error, KeyboardInterrupt):
        terminated = isinstance(error, Terminated)
        print("terminated" if terminated else "interrupted", file=sys.stderr)
        return 143 if terminated else 130
    if debug:
        traceback.print_exception(error)
    print(f"error: {_one_sentence(error)}", file=sys.stderr)
    if not debug and not isinstance(error, UserError):
        print("(debug=true shows where this happened)", file=sys.stderr)
    return 2


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends the command as Ctrl-C does, so that nothing is left half-written and no worker goes on."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def parse(
    config_class: type[Config],
    config_name: str,
    arguments: Sequence[str],
    config_dir: Path = CONFIG_DIR,
    elsewhere: Elsewhere = dict,
) -> Config:
    """The configuration that `arguments` (each `key=value`) ask for. UserError: an unknown option or group, a value of
    the wrong type or out of range, a required option left out."""
    options, choices = options_of(config_class), group_choices(config_class, config_name, config_dir)
    options["debug"] = _DEBUG
    groups: dict[str, str] = {}
    given: dict[str, Any] = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator:
            raise UserError(f"{argument!r} is not an option: write options as key=value (--help lists them)")
        key = _full_name(key, options, choices)
        if key in choices:
            if text not in choices[key]:
                raise UserError(f"{argument}: {_meant(key, text, choices[key])}")
            groups[key] = text
        elif key in options:
            given[key] = typed_value(text, options[key])
        else:
            raise UserError(_unknown(key, config_class, choices, elsewhere()))
    given.pop("debug", None)  # `execute` looks for it where there is no configuration yet
    values = composed(options, config_name, config_dir, groups) | given
    return from_dict(config_class, _nested(values))


def composed(
    options: Mapping[str, Leaf], config_name: str, config_dir: Path, groups: Mapping[str, str]
) -> dict[str, Any]:
    """What `<config_name>.yaml` and the groups set, by dotted names; with defaults of shipped files, made absolute."""
    has_file = (config_dir / f"{config_name}.yaml").is_file()
    values: dict[str, Any] = {}
    if has_file or groups:
        from hydra import compose, initialize_config_dir
        from omegaconf import OmegaConf

        overrides = _overrides(config_name, config_dir, groups)
        with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
            files = compose(config_name if has_file else None, overrides=overrides)
        values = dict(_flat(OmegaConf.to_container(files, resolve=True), options))
    for option in options.values():
        value = values.get(option.name, option.default)
        if (anchored := _anchored(value)) != value:
            values[option.name] = anchored
    return values


def _overrides(config_name: str, config_dir: Path, groups: Mapping[str, str]) -> list[str]:
    """How Hydra is told of groups: a `+` before one that no defaults list names."""
    chosen = _default_groups(config_name, config_dir)
    for key, name in groups.items():
        chosen |= _default_groups(f"{key}/{name}", config_dir)
    return [f"{'' if key in chosen else '+'}{key}={name}" for key, name in groups.items()]


def _flat(values: Any, options: Mapping[str, Leaf], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted names; a mapping that is the value of an option stays one."""
    for name, value in values.items():
        if isinstance(value, dict) and inside + name not in options:
            yield from _flat(value, options, f"{inside}{name}.")
        else:
            yield inside + name, value


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        place = found
        for parent in parents:
            place[parent] = place.get(parent) or {}
            place = place[parent]
        place[last] = value
    return found


def _anchored(value: Any) -> Any:
    """A path of a shipped file, or those in a list, as absolute ones where the current folder has no such file."""
    if isinstance(value, list):
        return [_anchored(item) for item in value]
    text = Path(value).as_posix() if isinstance(value, (str, Path)) else ""
    if not text.startswith(_SHIPPED) or Path(text).exists():
        return value
    return type(value)(REPOSITORY / text)


# ------------------------------------------------------------------------------------------------ options


def options_of(config_class: type[Any]) -> dict[str, Leaf]:
    """Every option of a dataclass by its name, nested ones by dotted names."""
    return {leaf.name: leaf for leaf in walk(config_class) if not leaf.internal}


def group_choices(config_class: type[Any], config_name: str, config_dir: Path) -> dict[str, list[str]]:
    """The configuration groups of this command: option name -> names of the files to choose from."""
    names = {item.name for item in fields(config_class)} | _default_groups(config_name, config_dir)
    folders = sorted(path for path in config_dir.iterdir() if path.is_dir() and path.name in names)
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def _default_groups(config_name: str, config_dir: Path) -> set[str]:
    """Groups named in the defaults list of `<config_name>.yaml`; none where there is no such file."""
    path = config_dir / f"{config_name}.yaml"
    if not path.is_file():
        return set()
    entries = (yaml.safe_load(path.read_text()) or {}).get("defaults", [])
    return {key.removeprefix("/") for entry in entries if isinstance(entry, dict) for key in entry}


def _full_name(key: str, options: Collection[str], choices: Collection[str]) -> str:
    """`max_faces` for `cleanup.max_faces`, where no other option has that last name; else `key` itself."""
    matches = [name for name in options if name.rpartition(".")[2] == key]
    return matches[0] if len(matches) == 1 and key not in {*options, *choices} else key


def _meant(key: str, text: str, choices: Sequence[str]) -> str:
    """What a value that is no choice was to be."""
    close = difflib.get_close_matches(text, choices, n=1)
    hint = f"did you mean {key}={close[0]}? " if close else ""
    return f"{hint}expected one of {', '.join(choices)}"


def _unknown(
    key: str,
    config_class: type[Any],
    choices: Mapping[str, Sequence[str]],
    elsewhere: Mapping[str, Collection[str]],
) -> str:
    """What is wrong with an option that this command does not have."""
    known = [*options_of(config_class), *choices, "debug"]
    saved = [leaf.name for leaf in walk(config_class) if leaf.internal]
    name = key.lstrip("-")
    by_leaf = [each for each in known if each.rpartition(".")[2] == name.rpartition(".")[2]]
    having = [choice for choice, names in elsewhere.items() if name in names]
    within = [each for each in saved if name in (each, each.rpartition(".")[2])]
    if within and not (by_leaf or having):
        group = within[0].partition(".")[0]
        where = f"part of {group}={'|'.join(choices[group])}" if group in choices else "saved with a model"
        return f"unknown option {key!r}: {within[0]} is no option of its own, but {where} (--help lists all)"
    close = by_leaf or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    hint += f"it is an option of {', '.join(having)}; " if having else ""
    return f"unknown option {key!r}{':' if hint else ''} {hint}(--help lists every option)"


# ------------------------------------------------------------------------------------------------- values


def typed_value(text: str, option: Leaf) -> Any:
    """`text` as typed by the user, as a value of an option; texts and paths stay literal. UserError if it does not fit.

    Lists: `[a, b]`, or one bare element, or `1,2,3` where the elements are not strings. `null` gives None where the
    option allows it.
    """
    if option.name.rpartition(".")[2] in _TEXTS:
        return text
    try:
        return _parsed(text, option.kind)
    except (ValueError, KeyError) as error:
        short = text if len(text) <= 200 else f"{text[:200]}..."
        raise UserError(f"{option.name}={short}: expected {expected(option.kind)}") from error


def _parsed(text: str, kind: Any) -> Any:
    kinds = alternatives(kind)
    if type(None) in kinds and text == "null":
        return None
    kind = next(each for each in kinds if each is not type(None))
    if kind in (str, Path):
        return kind(os.path.expanduser(text))  # noqa: PTH111 (Path would drop a trailing slash)
    if kind is bool:
        return _BOOLEANS[text.lower()]
    if kind in (int, float):
        return kind(text)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ({str(member.value): member for member in kind} | dict(kind.__members__))[text]
    if get_origin(kind) is list:
        element = get_args(kind)[0]
        return [_parsed(item, element) for item in _split(text, element)]
    return typed("", _expanded(parse_yaml(text)), kind)


def _split(text: str, element: Any) -> list[str]:
    if text.startswith("[") and text.endswith("]"):
        try:
            items = yaml.load(text, Loader=yaml.BaseLoader)  # every scalar stays text  # noqa: S506
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(text) from error
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return items
        raise ValueError(text)
    return [text] if element in (str, Path) else text.split(",")


def _expanded(value: Any) -> Any:
    """A mapping or list that came from YAML, with the home folder in the place of `~/`."""
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111


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
    options = options_of(config_class)
    values, advanced = composed(options, config_name, config_dir, chosen), "all" in arguments
    lines = [f"usage: python scripts/{script} key=value ...", "", about, "", "options:"]
    for name, names in choices.items():
        lines += _entry(name, "", f"Choose a set of options from configs/{name}/: {', '.join(names)}.")
    listed = [option for option in options.values() if option.name not in choices]
    for option in listed:
        if advanced or not option.advanced:
            default = _shown(values.get(option.name, option.default))
            lines += _entry(option.name, default, _meaning(option))
    lines += _entry("debug", "false", _DEBUG.help)
    hidden = sum(option.advanced for option in listed)
    if hidden and not advanced:
        more = "1 more option is" if hidden == 1 else f"{hidden} more options are"
        lines += ["", f"{more} seldom changed: --help all lists them too."]
    return "\n".join(lines)


def _meaning(option: Leaf) -> str:
    """What an option is, as a sentence, and what it may be."""
    kind = next(each for each in alternatives(option.kind) if each is not type(None))
    named = option.help.partition(":")[0].isidentifier()  # a value, whose meaning follows
    meaning = option.help if named else option.help[:1].upper() + option.help[1:]
    meaning += "" if meaning.endswith(".") or not meaning else "."
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"{meaning} One of: {', '.join(member.name for member in kind)}."
    if text := str(option.bounds):
        each = "each " if get_origin(kind) is list else ""
        return f"{meaning} ({each}{text})"
    return meaning


def _entry(name: str, default: str, help: str) -> list[str]:
    head = f"  {name}={default}"
    body = textwrap.wrap(help, width=110, initial_indent=" " * 32, subsequent_indent=" " * 32)
    if len(head) < 31 and body:
        return [head.ljust(32) + body[0].lstrip(), *body[1:]]
    return [head, *body]


def _shown(value: Any) -> str:
    """A default as the user would type it; empty where the option is required."""
    if value is MISSING:
        return "(required)"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this project as its sentence alone; those of libraries with their place."""
    place = "" if category is UserWarning and "elastic3d" in filename else f"{filename}:{lineno}: "
    return f"warning: {place}{message}\n"


def _one_sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}"
    return " ".join(str(error).split()) or type(error).__name__
