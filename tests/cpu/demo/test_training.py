"""The training script in miniature, and the way from fused weights back to the published names."""

import math
from pathlib import Path

import torch

from qwen3next_plugin.config import load_spec
from qwen3next_plugin.demo import write_random_checkpoint
from qwen3next_plugin.demo.export import checkpoint_tensors
from qwen3next_plugin.demo.training import TrainingPlan, train
from qwen3next_plugin.reference import ReferenceModel
from qwen3next_plugin.weights import check_checkpoint, fuse_checkpoint, open_checkpoint


def test_export_is_the_inverse_of_fusing(tmp_path: Path) -> None:
    for shape in ("ratio4", "dense"):
        directory = write_random_checkpoint(tmp_path / shape, shape, seed=5)
        spec = load_spec(directory)
        before = dict(open_checkpoint(directory))
        after = dict(checkpoint_tensors(fuse_checkpoint(before.items(), spec), spec))
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            assert tensor.dtype is before[name].dtype and torch.equal(tensor, before[name]), name


def test_a_few_steps_learn_and_leave_a_checkpoint(tmp_path: Path) -> None:
    said: list[str] = []
    plan = TrainingPlan.for_device("cpu", steps=16, tokens_per_step=256, warmup_steps=2, log_every=4, draft_from=0.5)
    figures = train(tmp_path, plan, log=said.append)
    history = figures["history"]
    assert figures["steps"] == 16 and len(said) == len(history) == 4
    assert history[-1]["loss"] < history[0]["loss"] < 1.2 * math.log(1024)
    assert "draft1" not in history[0] and "draft1" in history[-1]
    assert check_checkpoint(tmp_path, load_spec(tmp_path)).has_mtp
    logits = ReferenceModel.from_checkpoint(tmp_path)(torch.arange(10)[None])
    assert bool(torch.isfinite(logits).all())
    assert figures["plan"]["device"] == "cpu" and figures["tokens"] > 16 * 200


def test_plans_for_devices() -> None:
    assert TrainingPlan.for_device("cuda") == TrainingPlan(device="cuda")
    small = TrainingPlan.for_device("cpu", steps=3, minutes=None)
    assert small.steps == 3 and small.minutes > 0 and small.tokens_per_step < TrainingPlan().tokens_per_step
