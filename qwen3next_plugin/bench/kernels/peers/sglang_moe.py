"""SGLang's grouped products, by the entry that its Triton runner calls (0.5.20), the shared expert one of them."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..moe_work import JOINED, ROUTED, MoeInputs
from ..work import Prepared, Work
from . import named
from .sglang_context import publish

_PACKAGE = "sglang.srt.layers.moe.moe_runner.triton_utils"
_CONFIGS = f"{_PACKAGE}.fused_moe_triton_config"


def _module(path: str) -> Any:
    return importlib.import_module(path)


def _alone() -> None:
    """One process without ranks: the output needs no memory that other ranks can see."""
    publish()
    module = _module(f"{_PACKAGE}.fused_moe")
    module.get_tp_group = lambda: None
    module.is_allocation_symmetric = lambda: True
    module.use_symmetric_memory = lambda *_, **__: nullcontext()


@contextmanager
def _as_gpu(name: str) -> Iterator[None]:
    """SGLang's look-up of config files, told that the GPU is another."""
    module = _module(_CONFIGS)
    before, module.get_device_name = module.get_device_name, lambda *_: name
    module.get_moe_configs.cache_clear()
    try:
        yield
    finally:
        module.get_device_name = before
        module.get_moe_configs.cache_clear()


def _prepared(work: Work, does: str, gpu: str | None = None) -> list[Prepared]:
    first: MoeInputs = work.inputs[0]
    if first.s13 is not None and first.w2.shape[2] % 128:
        raise ValueError(f"stock SGLang refuses a slice of {first.w2.shape[2]} columns in FP8 blocks of 128")
    _alone()
    run, config = (
        named(f"{_PACKAGE}.fused_moe:fused_experts"),
        named("sglang.srt.layers.moe.moe_runner:MoeRunnerConfig"),
    )

    def place() -> AbstractContextManager[None]:
        return nullcontext() if gpu is None else _as_gpu(gpu)

    def call_of(one: MoeInputs) -> Callable[[], Tensor]:
        x, w13, w2, weights, ids, s13, s2 = one.arguments(does)
        experts = w13.shape[0]
        settings = config(num_experts=experts, num_local_experts=experts, inplace=False)
        fp8 = {} if s13 is None else {"use_fp8_w8a8": True, "w1_scale": s13, "w2_scale": s2, "block_shape": [128, 128]}

        def call() -> Tensor:
            with place():
                out: Tensor = run(x, w13, w2, (weights, ids, None), settings, **fp8)
            return out

        return call

    with place():
        found = _config_of(first, does)
    facts = {"config": found, "source": f"SGLang's look-up{'' if gpu is None else f', as if on {gpu}'}"}
    return [Prepared([call_of(one) for one in work.inputs], does, facts)]


def _config_of(one: MoeInputs, does: str) -> Any:
    x, w13, w2, _, ids, s13, _ = one.arguments(does)
    look_up = named(f"{_CONFIGS}:try_get_optimal_moe_config")
    dtype, block = (None, None) if s13 is None else ("fp8_w8a8", [128, 128])
    found, (down, _) = look_up(
        w13.shape, w2.shape, ids.shape[1], dtype, x.shape[0], block_shape=block, return_down_config=True
    )
    return {"gate_up": dict(found), "down": None if down is None else dict(down)}


def joined(work: Work) -> list[Prepared]:
    """As stock SGLang runs it: the shared expert one of 513."""
    return _prepared(work, JOINED)


def joined_h200(work: Work) -> list[Prepared]:
    """The same with the files that SGLang ships for H200."""
    if "H200" in torch.cuda.get_device_name():
        raise ValueError("this is an H200: SGLang's own look-up finds these files")
    return _prepared(work, JOINED, "NVIDIA H200")


def routed(work: Work) -> list[Prepared]:
    """Routed experts alone (--disable-shared-experts-fusion), the shared one left out."""
    return _prepared(work, ROUTED)
