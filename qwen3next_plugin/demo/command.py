"""``qwen3next demo-checkpoint``: write the shipped demo model, train it anew, or make one with random weights."""

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from qwen3next_plugin.errors import SettingsError

SHIPPED = "checkpoint"  # the folder beside this file


def demo_checkpoint(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; made if it is not there.")],
    train: Annotated[
        bool, typer.Option("--train", help="Train the demo model anew instead of copying the shipped one.")
    ] = False,
    minutes: Annotated[float | None, typer.Option(help="With --train: when to end at the latest.")] = None,
    steps: Annotated[int | None, typer.Option(help="With --train: optimiser steps at most.")] = None,
    device: Annotated[str, typer.Option(help="With --train: cuda (minutes) or cpu (hours).")] = "cuda",
    random: Annotated[bool, typer.Option("--random", help="Write random weights of the given shape.")] = False,
    shape: Annotated[
        str | None, typer.Option(help="With --random: tiny (default), ratio1, ratio4, blocks, 80b ...")
    ] = None,
    dtype: Annotated[str, typer.Option(help="With --random: bfloat16, float16 or float32.")] = "bfloat16",
    fp8: Annotated[bool, typer.Option("--fp8", help="With --random: linear layers in FP8 blocks of 128x128.")] = False,
    quantization: Annotated[
        str | None, typer.Option(help="With --random: awq, gptq, gptq-int8, w4a16, w8a16, w8a8 (compressed-tensors).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights and of training.")] = 0,
) -> None:
    """Write a small Qwen3-Next checkpoint with tokenizer, chat template and MTP layer, in the published file layout."""
    if train and random:
        raise SettingsError("--train and --random exclude each other: give one of them.")
    if not random and (shape is not None or fp8 or quantization is not None):
        raise SettingsError("--shape, --fp8 and --quantization shape random weights: give --random with them.")
    if fp8 and quantization not in (None, "fp8"):
        raise SettingsError(f"--quantization is {quantization} and --fp8 says fp8: give one of them.")
    if directory.exists() and not directory.is_dir():
        raise SettingsError(f"{directory} is a file: give a directory to write the checkpoint into.")
    if random:
        from .random import write_random_checkpoint

        write_random_checkpoint(directory, shape or "tiny", seed, dtype, fp8=fp8, quantization=quantization)
        weights = "random weights" if any(directory.glob("*.safetensors")) else "config and tokenizer, no weights"
        print(f"{directory}: {shape or 'tiny'} ({weights}).")
    elif train:
        _train(directory, steps, minutes, seed, device)
    else:
        copy_shipped(directory)
        print(f"{directory}: the demo model. Serve it with: vllm serve {directory}")


def copy_shipped(directory: Path) -> None:
    """Copy the shipped checkpoint to ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in resources.files(__package__).joinpath(SHIPPED).iterdir():
        with resources.as_file(file) as path:
            shutil.copyfile(path, directory / file.name)


def _train(directory: Path, steps: int | None, minutes: float | None, seed: int, device: str) -> None:
    import torch

    from .evaluate import figures_of
    from .training import TrainingPlan, train

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise SettingsError(f"--device: {device!r} is not here: use cpu{' or cuda' * torch.cuda.is_available()}.")
    plan = TrainingPlan.for_device(device, steps=steps, minutes=minutes, seed=seed)
    figures = train(directory, plan)
    figures["evaluation"] = figures_of(directory)
    print(json.dumps(figures["evaluation"], indent=2))
    (directory / "training.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
