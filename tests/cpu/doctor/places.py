"""An environment made of files: package metadata, programs and folders that the doctor is shown instead of ours."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from qwen3next_plugin.doctor.checks import examine
from qwen3next_plugin.doctor.engines import INQUIRIES
from qwen3next_plugin.doctor.finding import Finding
from qwen3next_plugin.doctor.surroundings import Surroundings

PLUGIN = "qwen3next-plugin"
ENTRY_POINTS = """
[vllm.general_plugins]
qwen3next = qwen3next_plugin.vllm_integration:register
[sglang.srt.plugins]
qwen3next = qwen3next_plugin.sglang_integration:register
"""
GPU = "NVIDIA H200, 9.0, 143771, 580.95.05"


class Place:
    """A machine on which nothing is wrong: CPU builds of torch and vLLM, no GPU. Cases then break one thing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.site = root / "site-packages"
        self.bin = root / "bin"
        self.folder = root / "folder"
        self.driver_folder = root / "driver"
        self.headers = root / "include"
        for made in (self.site, self.bin, self.folder, self.headers):
            made.mkdir()
        (self.headers / "Python.h").touch()
        self.path = [self.site]
        self.environ = {"PATH": str(self.bin)}
        self.checkpoint: Path | None = None
        self.imported = self.site / "qwen3next_plugin"
        self.package(self.imported)
        self.install(PLUGIN, "0.1.0", entry_points=ENTRY_POINTS)
        for name, version in (("torch", "2.13.0+cpu"), ("transformers", "5.19.0"), ("vllm", "0.32.0+cpu")):
            self.install(name, version)
        self.answers = {"sglang": "exit 9", "vllm": "exit 9", "check": "exit 9"}
        self.program("qwen3next", "# from qwen3next_plugin.cli import main")
        self.program("g++", "true")
        self.vllm_says("active", "qwen3next_plugin.vllm_integration.model:Qwen3NextForCausalLM")

    def install(
        self,
        name: str,
        version: str,
        requires: Iterable[str] = (),
        entry_points: str = "",
        site: Path | None = None,
        kind: str = "dist-info",
    ) -> Path:
        """A distribution's metadata in place of any other of its name in that folder; returns the metadata's folder."""
        site = site or self.site
        self.uninstall(name, site)
        info = site / f"{name.replace('-', '_')}-{version}.{kind}"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        (info / ("METADATA" if kind == "dist-info" else "PKG-INFO")).write_text("\n".join(lines) + "\n")
        (info / "entry_points.txt").write_text(entry_points)
        return info

    def uninstall(self, name: str, site: Path | None = None) -> None:
        for info in (site or self.site).glob(f"{name.replace('-', '_')}-*-info"):
            info.rename(self.root / f"gone-{info.name}")

    def package(self, folder: Path) -> None:
        """An importable package."""
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()

    def module(self, name: str) -> None:
        (self.site / f"{name}.py").touch()

    def program(self, name: str, script: str, folder: Path | None = None) -> None:
        file = (folder or self.bin) / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    def python(self, asked: str, script: str) -> None:
        """The interpreter that the doctor asks: a script for each engine, and one for `qwen3next check`."""
        self.answers[asked] = script
        cases = "".join(f"{INQUIRIES[engine]})\n{self.answers[engine]}\n;;\n" for engine in INQUIRIES)
        self.program("python", f'case "$3" in\n{cases}*)\n{self.answers["check"]}\n;;\nesac')

    def vllm_says(self, kind: str, found: str, log: str = "INFO nothing") -> None:
        self.says("vllm", kind, found, log)

    def sglang_says(self, kind: str, found: str, log: str = "INFO nothing") -> None:
        """With the SGLang that says it."""
        with_sglang(self)
        self.says("sglang", kind, found, log)

    def says(self, engine: str, kind: str, found: str, log: str) -> None:
        told = json.dumps({"kind": kind, "found": found})
        self.python(engine, f"echo '{log}' >&2; echo '{INQUIRIES[engine]} {told}'")

    def check_says(self, sentence: str, code: int = 0) -> None:
        self.python("check", f"echo '{sentence}' >&{2 if code else 1}; exit {code}")

    def gpus(self, *lines: str) -> None:
        self.program("nvidia-smi", "\n".join(f"echo '{line}'" for line in lines))

    def config(self, **fields: object) -> Path:
        """A checkpoint with this config.json and one file of weights; `check` finds nothing wrong with it."""
        self.checkpoint = self.root / "checkpoint"
        self.checkpoint.mkdir()
        (self.checkpoint / "config.json").write_text(json.dumps(fields))
        (self.checkpoint / "model.safetensors").touch()
        self.check_says("it is complete: with MTP layer")
        return self.checkpoint

    def surroundings(self) -> Surroundings:
        return Surroundings(
            path=tuple(str(entry) for entry in self.path),
            environ=self.environ,
            python=self.bin / "python",
            folder=self.folder,
            imported=self.imported,
            driver_folder=self.driver_folder,
            headers=self.headers,
            checkpoint=self.checkpoint,
        )

    def findings(self) -> list[Finding]:
        return list(examine(self.surroundings()))


Breaks = Callable[[Place], object]


class Case(NamedTuple):
    """``found`` and ``remedy`` are words of the finding that ``breaks`` has to bring about."""

    breaks: Breaks
    level: str
    check: str
    found: str
    remedy: str


def both(first: Breaks, second: Breaks) -> Breaks:
    """One after the other."""

    def breaks(place: Place) -> None:
        first(place)
        second(place)

    return breaks


def with_sglang(place: Place, version: str = "0.5.20") -> None:
    """SGLang with all that it needs, and with the plugin in it."""
    place.install("sglang", version)
    for name in ("sgl_kernel", "dill", "jsonschema"):
        place.module(name)
    place.says("sglang", "active", "qwen3next_plugin.sglang_integration.model:Qwen3NextForCausalLM", "INFO nothing")
