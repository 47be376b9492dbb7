"""Training of the demo checkpoint: the oracle itself is trained, so nothing is learnt that the engines do not
compute."""

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qwen3next_plugin.config import Qwen3NextSpec, parse_config
from qwen3next_plugin.reference import ReferenceModel
from qwen3next_plugin.weights import fuse_checkpoint

from .batches import Batch, BatchMaker
from .corpus import conversation
from .drafting import draft_hidden
from .export import checkpoint_tensors
from .random import random_tensors, save_shards
from .shapes import config_of
from .tokenizer import SPECIAL_TOKENS, learn_merges, write_tokenizer

DRAFT_WEIGHTS = (0.4, 0.3, 0.2)  # of the losses of the first, second and third draft


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how to train; training ends at ``steps`` or ``minutes``, whichever comes first.

    The defaults are those that the shipped checkpoint was trained with, on one H200 in 4.3 minutes.
    """

    device: str = "cuda"
    steps: int = 2500
    minutes: float = 30.0
    tokens_per_step: int = 8192
    learning_rate: float = 4e-3
    draft_from: float = 0.3
    warmup_steps: int = 60
    seed: int = 0
    save_every: int = 250
    log_every: int = 20

    @classmethod
    def for_device(cls, device: str, **overrides: Any) -> "TrainingPlan":
        """The plan for ``cuda``, or one that a CPU can finish: smaller steps, several hours. ``overrides`` are
        fields, None for unset."""
        defaults = {"device": device} if device != "cpu" else _CPU_PLAN
        return cls(**(defaults | {name: value for name, value in overrides.items() if value is not None}))


_CPU_PLAN: dict[str, Any] = {"device": "cpu", "tokens_per_step": 2048, "steps": 6000, "minutes": 300.0}


def initial_weights(spec: Qwen3NextSpec, seed: int, device: str = "cpu") -> dict[str, Tensor]:
    """Fused float32 weights to start from: neutral norms, a silent head, and outputs scaled down by the depth."""
    tensors = []
    for name, tensor in random_tensors(spec, seed):
        tensor = tensor.float()
        if name.endswith("linear_attn.norm.weight"):
            tensor = torch.ones_like(tensor)
        elif name.endswith("norm.weight") or "layernorm" in name or "pre_fc_norm" in name:
            tensor = torch.zeros_like(tensor)
        elif name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            tensor = tensor * (2 * spec.num_layers) ** -0.5
        elif name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensor = tensor * (0.1 if name == "lm_head.weight" else 0.5)
        elif name.endswith("mlp.gate.weight"):
            tensor = tensor * 0.5
        tensors.append((name, tensor))
    return {name: w.to(device).requires_grad_() for name, w in fuse_checkpoint(tensors, spec).items()}


def losses(model: ReferenceModel, batch: Batch, depth: int) -> tuple[Tensor, list[Tensor]]:
    """Cross entropy (nats a token of the assistant) of the next token and of each of ``depth`` MTP drafts."""
    tokens, length = batch.tokens, batch.tokens.shape[1] - len(DRAFT_WEIGHTS) - 1

    def ahead(t: Tensor, by: int) -> Tensor:
        return t[:, by : by + length]

    def cross_entropy(hidden: Tensor, by: int) -> Tensor:
        rows = ahead(batch.answers, by)
        return functional.cross_entropy(model.logits(hidden[rows]), ahead(tokens, by)[rows])

    hidden = model.hidden(tokens[:, :length])
    if depth == 0:
        return cross_entropy(hidden, 1), []
    wanted = torch.stack([ahead(batch.answers, d + 2) for d in range(depth)]).any(0)
    drafts = draft_hidden(model, hidden, tokens, depth, wanted)
    return cross_entropy(hidden, 1), [cross_entropy(draft, d + 2) for d, draft in enumerate(drafts)]


def _schedule(progress: float, step: int, plan: TrainingPlan) -> float:
    """Warm-up, a plateau, and a straight way to (nearly) zero over the last half."""
    warmup = min(1.0, (step + 1) / plan.warmup_steps)
    return plan.learning_rate * warmup * min(1.0, max(0.01, 2.0 * (1.0 - progress)))


def _optimizer(weights: dict[str, Tensor]) -> torch.optim.Optimizer:
    matrices = [w for w in weights.values() if w.ndim > 1]
    others = [w for w in weights.values() if w.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-9, fused=True)


def prepare_directory(directory: Path, seed: int) -> tuple[Qwen3NextSpec, Callable[[str], list[int]]]:
    """Learn the tokenizer, write it and config.json below ``directory``; returns the model's shape and the encoder."""
    import random

    from tokenizers import Tokenizer

    end = config_of("demo")["vocab_size"]  # the tokenizer fills the vocabulary, special tokens last
    config = config_of("demo", eos_token_id=end - 1, pad_token_id=end - 3)
    spec = parse_config(config)
    rng = random.Random(seed)
    texts = (m["content"] for _ in range(6000) for m in conversation(rng, 4).messages)
    roles = ["system\n", "user\n", "assistant\n"] * 2000
    merges = learn_merges([*texts, *roles], spec.vocab_size - 256 - len(SPECIAL_TOKENS))
    write_tokenizer(directory, merges, spec.max_position_embeddings, spec.vocab_size)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return spec, lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def train(directory: Path, plan: TrainingPlan, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Train the demo model and write it as a checkpoint below ``directory``, again and again while training goes on.

    Returns:
        the figures of the run: plan, minutes, steps, tokens, and the losses over time.
    """
    torch.manual_seed(plan.seed)
    spec, encode = prepare_directory(directory, plan.seed)
    weights = initial_weights(spec, plan.seed, plan.device)
    model = ReferenceModel(spec, weights, delta_rule="chunked")
    batches = BatchMaker(encode, plan.tokens_per_step, len(DRAFT_WEIGHTS) + 1, plan.seed + 1)
    optimizer = _optimizer(weights)
    history: list[dict[str, float]] = []
    torch.set_float32_matmul_precision("high")
    begin, tokens, step, progress = time.monotonic(), 0, 0, 0.0
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = _schedule(progress, step, plan)
        batch = batches(progress).to(plan.device)
        # Drafting is learnt once there is something to draft; the deeper steps cost more and need it less often.
        depth = 0 if progress < plan.draft_from else 1 + step % len(DRAFT_WEIGHTS)
        main, drafts = losses(model, batch, depth)
        total = main + sum(weight * loss for weight, loss in zip(DRAFT_WEIGHTS, drafts, strict=False))
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        if math.isfinite(float(norm)):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += batch.tokens.numel()
        step += 1
        minutes = (time.monotonic() - begin) / 60
        progress = max(step / plan.steps, minutes / plan.minutes)
        if step % plan.log_every == 0 or progress >= 1.0:
            entry = {"step": step, "minutes": minutes, "loss": main.item()}
            entry |= {f"draft{d + 1}": loss.item() for d, loss in enumerate(drafts)}
            history.append({name: round(value, 4) for name, value in entry.items()})
            log("  ".join(f"{name} {value:.3f}" for name, value in entry.items()))
        if step % plan.save_every == 0 or progress >= 1.0:
            save_shards(directory, checkpoint_tensors(weights, spec))
    name = torch.cuda.get_device_name() if plan.device == "cuda" else platform.processor() or platform.machine()
    made_on = {"device": name, "torch": torch.__version__}
    done = {"steps": step, "tokens": tokens, "minutes": round(minutes, 2)}
    return {"plan": asdict(plan), **made_on, **done, "history": history}
