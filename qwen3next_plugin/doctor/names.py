"""Findings about names: entry points, other copies of this package, the console script."""

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from qwen3next_plugin.activation import DISTRIBUTION

from .finding import Finding, error, ok, warning
from .surroundings import Surroundings, folder_of

PLUGIN = "qwen3next"
PACKAGE = "qwen3next_plugin"
GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}
ALLOW_LISTS = {"vllm": "VLLM_PLUGINS", "sglang": "SGLANG_PLUGINS"}
_REINSTALL = 'install it again: pip install --force-reinstall --no-deps qwen3next-plugin (or "-e ." in its checkout)'


def entry_points(s: Surroundings) -> Iterator[Finding]:
    """Whether each engine would find the plugin: Python reads the first distribution of a name and skips the rest."""
    copies = s.packages.get(DISTRIBUTION, [])
    if not copies:
        yield error("entry point", f"{DISTRIBUTION} is not installed here, so no engine finds it", "pip install -e .")
        return
    for engine, group in GROUPS.items():
        check = f"entry point {engine}"
        wanted = f"{PACKAGE}.{engine}_integration:register"
        if _entry(copies[0], group) == wanted:
            yield ok(check, f"{group} has {PLUGIN} = {wanted}")
            continue
        stale = folder_of(copies[0])
        if any(_entry(copy, group) == wanted for copy in copies[1:]):
            yield error(check, f"{group} is shadowed by the stale {stale}", f"remove {stale}")
        else:
            yield error(check, f"{stale} has no {PLUGIN} = {wanted} in {group}", _REINSTALL)
    for copy in copies[1:]:
        found = f"a second {DISTRIBUTION} ({copy.version}) lies in {folder_of(copy)}"
        yield warning("entry point", found, f"remove {folder_of(copy)}")
    yield from _in_current_folder(s, copies)


def _entry(distribution: metadata.Distribution, group: str) -> str | None:
    return next((e.value for e in distribution.entry_points if e.group == group and e.name == PLUGIN), None)


def _in_current_folder(s: Surroundings, copies: list[metadata.Distribution]) -> Iterator[Finding]:
    """`python -m` puts the current folder first, and with it a stale egg-info."""
    known = {folder_of(copy).resolve() for copy in copies}
    for copy in metadata.distributions(name=DISTRIBUTION, path=[str(s.folder)]):
        stale = folder_of(copy)
        lacking = [group for group in GROUPS.values() if _entry(copy, group) is None]
        if lacking and stale.resolve() not in known:
            yield warning(
                "entry point",
                f"{stale} lacks {' and '.join(lacking)} and comes first where an engine is started by `python -m` here",
                f"remove {stale}",
            )


def allow_lists(s: Surroundings) -> Iterator[Finding]:
    """An engine's list of allowed plugins that leaves this one out."""
    for engine, variable in ALLOW_LISTS.items():
        given = s.environ.get(variable)
        # vLLM takes an empty list at its word; SGLang takes it for none.
        if given is None or (engine == "sglang" and not given):
            continue
        names = given.split(",") if engine == "vllm" else [name.strip() for name in given.split(",")]
        if PLUGIN not in names:
            wanted = ",".join([*filter(None, names), PLUGIN])
            found = f"{variable}={given} leaves {PLUGIN} out: the engine serves its own model without a word"
            yield error(f"entry point {engine}", found, f"unset {variable}, or set {variable}={wanted}")


def other_copies(s: Surroundings) -> Iterator[Finding]:
    """A package of this name that is imported in place of the installed one."""
    copies = s.packages.get(DISTRIBUTION, [])
    if not copies:
        return
    home = installed_folder(copies[0])
    if s.imported.resolve() != home.resolve():
        found = f"{PACKAGE} is imported from {s.imported}, but {home} is what is installed"
        yield error("name clash", found, f"take {s.imported.parent} off PYTHONPATH, or install that copy")
    here = s.folder / PACKAGE
    if (here / "__init__.py").is_file() and here.resolve() not in (home.resolve(), s.imported.resolve()):
        yield warning(
            "name clash",
            f"{here} hides the installed {PACKAGE} where an engine is started by `python -m` in this folder",
            "start the engine in another folder, or install that copy: pip install -e .",
        )


def installed_folder(distribution: metadata.Distribution) -> Path:
    """The package's folder as a distribution has it; an editable one names its checkout in direct_url.json."""
    try:
        told = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        told = {}
    if told.get("dir_info", {}).get("editable"):
        return Path(url2pathname(urlparse(told["url"]).path)) / PACKAGE
    return Path(str(distribution.locate_file(PACKAGE)))


def console_script(s: Surroundings) -> Iterator[Finding]:
    """The `qwen3next` command: there, and this package's."""
    own = s.python.parent / PLUGIN
    if not own.is_file():
        yield warning("console script", f"{own} is missing", _REINSTALL)
    elif PACKAGE not in own.read_text(encoding="utf-8", errors="replace"):
        yield warning("console script", f"{own} is another package's command", _REINSTALL)
    first = s.which(PLUGIN)
    if first and first.resolve() != own.resolve():
        yield warning("console script", f"the shell finds {first} before {own}", f"activate {own.parent.parent}")
