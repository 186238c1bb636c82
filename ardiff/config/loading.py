"""Presets and YAML files, dotted overrides, and every problem reported at once with the nearest key that exists.

A file may begin with `extends: NAME`, another preset or a YAML file (relative to its own folder): it then says only
what differs. Lists are replaced as a whole.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ardiff.config import sections
from ardiff.config.checks import impossible
from ardiff.config.sections import Config
from ardiff.errors import UserError

PRESETS = Path(__file__).parents[1] / "presets"
CONVERSION = re.compile(r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (Integer|Float|bool)")
KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}


def presets() -> list[str]:
    """Names accepted by `load` besides paths of YAML files."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(preset_or_yaml: str, overrides: Sequence[str] = ()) -> Config:
    """Read a preset or YAML file and apply overrides (`a.b=c`, `--a.b=c` or the pair `--a.b c`).

    Raises UserError that lists every unknown, mistyped or impossible setting.
    """
    tree = OmegaConf.structured(Config)
    problems: list[str] = []
    path = _find(preset_or_yaml)
    for layer, settings in _layers(path):
        for key, value in _leaves(settings):
            _assign(tree, key, value, str(layer), problems)
    for key, value in _parse_overrides(overrides, problems):
        _assign(tree, key, value, "command line", problems)
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        problems.append(f"{path}: {str(error).splitlines()[0]}")
        raise UserError(f"configuration refused: {'; '.join(problems)}") from error
    assert isinstance(config, Config)
    problems += impossible(config)
    if len(problems) == 1:
        raise UserError(f"configuration refused: {problems[0]}")
    if problems:
        raise UserError("configuration refused:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return config


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with some settings changed, checked as `load` does. Raises UserError."""
    tree = OmegaConf.structured(config)
    problems: list[str] = []
    for key, value in _parse_overrides(overrides, problems):
        _assign(tree, key, value, "command line", problems)
    changed = OmegaConf.to_object(tree)
    assert isinstance(changed, Config)
    problems += impossible(changed)
    if problems:
        raise UserError(f"configuration refused: {'; '.join(problems)}")
    return changed


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`key: old -> new` for every differing field of two configurations (or sections) of one type."""
    found = []
    for item in dataclasses.fields(old):
        before, after = getattr(old, item.name), getattr(new, item.name)
        if dataclasses.is_dataclass(before):
            found += differences(before, after, f"{prefix}{item.name}.")
        elif before != after:
            found.append(f"{prefix}{item.name}: {before} -> {after}")
    return found


def _find(preset_or_yaml: str, asked_by: str = "--config") -> Path:
    path = PRESETS / f"{preset_or_yaml}.yaml"
    if path.is_file():
        return path
    path = Path(preset_or_yaml)
    if path.is_file():
        return path
    nearest = difflib.get_close_matches(preset_or_yaml, presets(), 1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    raise UserError(f"{asked_by} {preset_or_yaml}: neither a file nor a preset ({', '.join(presets())}){hint}")


def _layers(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A file and all that it extends, the most basic one first. Raises UserError for a circle or an unknown name."""
    layers: list[tuple[Path, dict[str, Any]]] = []
    while True:
        settings = _read_yaml(path)
        layers.insert(0, (path, settings))
        base = settings.pop("extends", None)
        if base is None:
            return layers
        if not isinstance(base, str):
            raise UserError(f"{path}: extends: {base!r} must be the name of a preset or a YAML file")
        beside = path.parent / base
        following = beside if beside.is_file() else _find(base, f"{path}: extends:")
        if following.resolve() in (layer.resolve() for layer, _ in layers):
            raise UserError(f"{path}: extends: {base} goes round in a circle; remove one of them")
        path = following


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: not a valid YAML configuration ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold sections such as 'model:', found a {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse_overrides(overrides: Sequence[str], problems: list[str]) -> Iterator[tuple[str, Any]]:
    words = list(overrides)
    while words:
        word = words.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                problems.append(f"command line: '{word}' needs a value, as in '{word} VALUE'")
                continue
            text = words.pop(0)
        if key in _text_keys() and text != "null":
            yield key, text  # as it is: a shard pattern such as {a,b}.tar or *.tar would be YAML as well
            continue
        try:
            value = OmegaConf.select(OmegaConf.from_dotlist([f"value={text}"]), "value")
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            problems.append(f"command line: '{key}': cannot read '{text}' ({' '.join(str(error).split())})")
            continue
        yield key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _all_keys(section: Any = Config, prefix: str = "") -> dict[str, str]:
    """Every dotted key with its annotation."""
    keys: dict[str, str] = {}
    for item in dataclasses.fields(section):
        if item.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(item.default_factory):
            keys |= _all_keys(item.default_factory, f"{prefix}{item.name}.")
        else:
            keys[f"{prefix}{item.name}"] = str(item.type)
    return keys


def _text_keys() -> set[str]:
    return {key for key, annotation in _all_keys().items() if annotation in ("str", "str | None")}


def _assign(tree: DictConfig, key: str, value: Any, source: str, problems: list[str]) -> None:
    annotations = _all_keys()
    keys = list(annotations)
    if key not in keys:
        last = key.rsplit(".", 1)[-1]
        by_name = sorted((other for other in keys if other.rsplit(".", 1)[-1] == last), key=lambda key: key.count("."))
        nearest = by_name[:1] or difflib.get_close_matches(key, keys, 1, cutoff=0.5)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else f"; sections are {', '.join(_sections())}"
        problems.append(f"{source}: unknown setting '{key}'{hint}")
        return
    if annotations[key].startswith("list[") and not isinstance(value, list):
        problems.append(f"{source}: {key} = {value} must be a list, as in '{_listed(annotations[key], value)}'")
        return
    if annotations[key] in ("list[float]", "list[int]") and any(isinstance(part, list | dict) for part in value):
        problems.append(f"{source}: {key} = {value} must be a list of numbers, without others inside")
        return
    try:
        OmegaConf.update(tree, key, value)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        problems.append(f"{source}: {key} = {value}{_in_words(error, value, annotations[key])}")


def _in_words(error: Exception, value: Any, annotation: str) -> str:
    """Why OmegaConf does not take a value, in the words of a configuration instead of Python's."""
    reason = str(error).splitlines()[0]
    if found := CONVERSION.match(reason):
        part = f": '{found[1]}' " if annotation.startswith("list[") else " "
        return f"{part}must be {KINDS[found[2]]}"
    if value is None:
        return ": it needs a value"
    if annotation.startswith("list["):
        return f" must be like '{_listed(annotation, 'VALUE')}' ({reason})"
    return f" is refused ({reason})"


def _listed(annotation: str, value: Any) -> str:
    """How a value would be given as the list that is meant."""
    section = getattr(sections, annotation.removeprefix("list[").removesuffix("]"), None)
    if section is not None:
        return "[{" + ", ".join(f"{item.name}: ..." for item in dataclasses.fields(section)) + "}]"
    return "[]" if value is None else f"[{value}]"


def _sections() -> list[str]:
    return [item.name for item in dataclasses.fields(Config)]
