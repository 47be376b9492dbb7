"""Every switch of the package in one object, read from ``QWEN3NEXT_*`` environment variables.

Engines start their workers as processes that inherit the environment, so a variable reaches all of them alike.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, cast

from .errors import SettingsError
from .rope_request import RopeShortcut, parse_shortcut

PREFIX = "QWEN3NEXT_"

Kernels = Literal["auto", "triton", "reference"]
GdnPrefill = Literal["auto", "own", "fla", "flashinfer"]
MoePrefill = Literal["auto", "own", "deepgemm"]


@dataclass(frozen=True)
class Settings:
    """All switches with their defaults; each field's metadata names its variable, its values and what they do."""

    enabled: bool = field(
        default=True,
        metadata={
            "variable": "QWEN3NEXT_PLUGIN",
            "values": {"1": True, "0": False},
            "help": "0 leaves the engine as it is: stock model, stock kernels. Default 1.",
        },
    )
    kernels: Kernels = field(
        default="auto",
        metadata={
            "variable": "QWEN3NEXT_KERNELS",
            "values": {"auto": "auto", "triton": "triton", "reference": "reference"},
            "help": "auto takes Triton on a GPU and plain torch on a CPU; triton or reference force one of them "
            "(triton on a CPU needs TRITON_INTERPRET=1). Default auto.",
        },
    )
    gdn_prefill: GdnPrefill = field(
        default="auto",
        metadata={
            "variable": "QWEN3NEXT_GDN_PREFILL",
            "values": {"auto": "auto", "own": "own", "fla": "fla", "flashinfer": "flashinfer"},
            "help": "Who runs the prefill of Gated DeltaNet layers on a GPU: own, this plugin's kernels; fla or "
            "flashinfer, the engine's, wherever they can; auto, whichever is expected to be fastest. Default auto.",
        },
    )
    moe_prefill: MoePrefill = field(
        default="auto",
        metadata={
            "variable": "QWEN3NEXT_MOE_PREFILL",
            "values": {"auto": "auto", "own": "own", "deepgemm": "deepgemm"},
            "help": "Who runs FP8 experts of many tokens on a Hopper GPU: own, this plugin's kernels; deepgemm, the "
            "engine's DeepGEMM, from a few hundred tokens on; auto, whichever is expected to be faster. Default auto.",
        },
    )
    prefill_graphs: bool = field(
        default=True,
        metadata={
            "variable": "QWEN3NEXT_PREFILL_GRAPHS",
            "values": {"1": True, "0": False},
            "help": "vLLM: 0 captures CUDA graphs for decoding only, not for prompts; so do sizes of your own in "
            "--compilation-config. Default 1.",
        },
    )
    gdn_configs: Path | None = field(
        default=None,
        metadata={
            "variable": "QWEN3NEXT_GDN_CONFIGS",
            "values": ("DIR",),
            "parse": Path,
            "help": "The folder that `qwen3next tune gdn` wrote to: its table of Gated DeltaNet's kernels comes before "
            "the shipped ones. Default: the shipped ones.",
        },
    )
    rope: RopeShortcut | None = field(
        default=None,
        metadata={
            "variable": "QWEN3NEXT_ROPE",
            "values": ("yarn:FACTOR", "yarn:FACTOR:ORIGINAL_LENGTH"),
            "parse": parse_shortcut,
            "help": "YaRN for contexts FACTOR times as long as the checkpoint was trained on; yarn:4 makes 262144 "
            "tokens a million. Default: as config.json and the engine's overrides say.",
        },
    )
    moe_configs: Path | None = field(
        default=None,
        metadata={
            "variable": "QWEN3NEXT_MOE_CONFIGS",
            "values": ("DIR",),
            "parse": Path,
            "help": "The folder that `qwen3next tune moe` wrote to: its tile sizes come before the shipped ones. "
            "Default: the shipped ones.",
        },
    )
    warm_up: bool = field(
        default=True,
        metadata={
            "variable": "QWEN3NEXT_WARMUP",
            "values": {"1": True, "0": False},
            "help": "0 starts a GPU server without compiling every kernel first: its first requests wait for them. "
            "Default 1.",
        },
    )
    record: Path | None = field(
        default=None,
        metadata={
            "variable": "QWEN3NEXT_RECORD",
            "values": ("DIR",),
            "parse": Path,
            "help": "Engine processes write the time of every step and what they made of their flags to files below "
            "DIR, stock ones (QWEN3NEXT_PLUGIN=0) too; `qwen3next bench` sets it. Default: nothing is written.",
        },
    )
    record_experts: bool = field(
        default=False,
        metadata={
            "variable": "QWEN3NEXT_RECORD_EXPERTS",
            "values": {"1": True, "0": False},
            "help": "With QWEN3NEXT_RECORD, 1 also counts the distinct experts of every pass; slow, and blind to "
            "layers in graphs: start the engine without. Default 0.",
        },
    )

    @property
    def backend(self) -> str | None:
        """``kernels`` as the operations' ``backend`` argument: None for automatic."""
        return None if self.kernels == "auto" else self.kernels

    def tell_kernels(self) -> None:
        """Makes the kernels of this process follow these settings; SettingsError if they cannot."""
        from .kernels.dispatch import prefer  # here, for the command line must not wait for torch
        from .kernels.gdn import config as gdn_config
        from .kernels.gdn.peers import OFFERS as PREFILLS
        from .kernels.moe import config as moe_config
        from .kernels.moe.peers import OFFERS as GROUPED_PRODUCTS

        prefer(self.backend)
        PREFILLS.prefer(self.gdn_prefill)
        GROUPED_PRODUCTS.prefer(self.moe_prefill)
        folders = (
            ("QWEN3NEXT_GDN_CONFIGS", gdn_config.use_folder, self.gdn_configs),
            ("QWEN3NEXT_MOE_CONFIGS", moe_config.use_folder, self.moe_configs),
        )
        for variable, use_folder, folder in folders:
            try:
                use_folder(folder)
            except ValueError as error:
                raise SettingsError(f"{variable}: {error}.") from None

    def check_device(self, device_type: str) -> None:
        """Raise SettingsError if ``kernels``, ``gdn_prefill`` or ``moe_prefill`` cannot run on this device type ("cuda"
        or "cpu").
        """
        for name, value in (("GDN", self.gdn_prefill), ("MOE", self.moe_prefill)):
            if value not in ("auto", "own") and (device_type == "cpu" or self.kernels == "reference"):
                where = "on a CPU" if device_type == "cpu" else "beside QWEN3NEXT_KERNELS=reference"
                raise SettingsError(f"QWEN3NEXT_{name}_PREFILL is {value!r} {where}: use auto or own.")
        if self.kernels == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise SettingsError("QWEN3NEXT_KERNELS is 'triton' on a CPU: use auto or reference, or TRITON_INTERPRET=1.")


def read_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings that the process's environment (or the mapping given) asks for; empty values count as unset.

    ``QWEN3NEXT_PLUGIN=0`` wins over everything else, so that it works beside a variable that means nothing.
    Raises SettingsError, one sentence, for an unknown ``QWEN3NEXT_`` variable or a value that is not allowed.
    """
    given = {
        name: value
        for name, value in (os.environ if environment is None else environment).items()
        if name.startswith(PREFIX) and value
    }
    if given.get("QWEN3NEXT_PLUGIN") == "0":
        return Settings(enabled=False)
    values: dict[str, object] = {}
    for setting in fields(Settings):
        variable, allowed = setting.metadata["variable"], setting.metadata["values"]
        text = given.pop(variable, None)
        if text is None:
            continue
        if "parse" in setting.metadata:
            values[setting.name] = setting.metadata["parse"](text)
            continue
        if text not in allowed:
            raise SettingsError(f"{variable} is {text!r}: use one of {', '.join(allowed)}.")
        values[setting.name] = allowed[text]
    if given:
        known = ", ".join(setting.metadata["variable"] for setting in fields(Settings))
        raise SettingsError(f"{min(given)} is not a setting of qwen3next-plugin: it reads {known}.")
    return Settings(
        enabled=bool(values.get("enabled", True)),
        kernels=cast(Kernels, values.get("kernels", "auto")),
        gdn_prefill=cast(GdnPrefill, values.get("gdn_prefill", "auto")),
        moe_prefill=cast(MoePrefill, values.get("moe_prefill", "auto")),
        prefill_graphs=bool(values.get("prefill_graphs", True)),
        gdn_configs=cast(Path | None, values.get("gdn_configs")),
        rope=cast(RopeShortcut | None, values.get("rope")),
        moe_configs=cast(Path | None, values.get("moe_configs")),
        warm_up=bool(values.get("warm_up", True)),
        record=cast(Path | None, values.get("record")),
        record_experts=bool(values.get("record_experts", False)),
    )


def settings_help() -> str:
    """One line a variable: its name, the values it takes and what they do."""
    lines = (
        f"{s.metadata['variable']}={'|'.join(s.metadata['values'])}: {s.metadata['help']}" for s in fields(Settings)
    )
    return "\n".join(lines)
