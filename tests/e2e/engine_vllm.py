"""vLLM as the end-to-end tests see it: `vllm serve`, /v1/completions, Prometheus counters."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import openai
import torch

from .engine import TOP_LOGPROBS, Chat, Completion, Engine, RefusedError, Setup
from .server import Server

_SHARE_OF_GPU = 0.1
"""vLLM starts where so much of the GPU is free, whatever else runs there; the cache's size is said in bytes."""


class VllmEngine(Engine):
    """Blocks of 32 tokens where a state fits in, a cache of 128 MiB, 8 requests at once."""

    name = "vllm"
    caches = ("align",)
    prompt_reserve = 1
    inherited = ("VLLM_",)
    stock_sign = "qwen_gdn_linear_attn.py"
    usual: ClassVar[dict[str, str]] = {}
    length_flag = "--max-model-len"
    version_change = ("vllm._version", "version = ", "version = '0.99.0'  # ")
    drift = (
        "vllm.v1.attention.backends.utils",
        "def mamba_get_block_table_tensor(",
        "def get_mamba_block_table(",
    )
    random_setups = (Setup("ratio2", eager=False), Setup("ratio1", 1, "align"), Setup("ratio4", 3, "align"))
    demo_setups = (Setup("demo", 1), Setup("demo", 2, "align"), Setup("demo", 3, "align"))
    limit_setups = (Setup("ratio2", 0, "align"), Setup("ratio2", 3, "align"))
    state_setups = (
        *(Setup("ratio2", 0, "align"), Setup("ratio1", 1, "align")),
        *(Setup("ratio4", 2, "align"), Setup("ratio2", 3, "align")),
    )

    def command(self, model: str, port: int) -> list[str]:
        script = Path(sys.executable).with_name("vllm")
        # An unpacked engine on PYTHONPATH has no script; the module is what it would run.
        start = [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
        return [*start, "serve", model, "--host", "127.0.0.1", "--port", str(port)]

    def context_reserve(self, num_drafts: int) -> int:
        return 0

    def flags(self, setup: Setup) -> list[str]:
        chosen = ["--dtype", setup.dtype, "--max-model-len", str(setup.max_model_len)]
        chosen += ["--max-num-seqs", "8", "--block-size", "32", "--kv-cache-memory-bytes", str(128 << 20)]
        chosen += ["--enable-prompt-tokens-details"]
        if setup.cache:
            chosen += ["--enable-prefix-caching", "--mamba-cache-mode", setup.cache]
        else:
            chosen += ["--no-enable-prefix-caching"]
        if setup.num_drafts:
            drafting = {"method": "mtp", "num_speculative_tokens": setup.num_drafts}
            chosen += ["--speculative-config", json.dumps(drafting)]
        if torch.cuda.is_available():
            # Graphs and torch.compile are part of what has to be right there.
            return [*chosen, "--gpu-memory-utilization", str(_SHARE_OF_GPU)]
        return chosen + ["--enforce-eager"] * setup.eager

    def variables(self) -> dict[str, str]:
        return {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CACHE_ROOT": str(Path(tempfile.gettempdir()) / f"qwen3next-e2e-{os.getuid()}"),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it is compiled at the first start, for two minutes
            "VLLM_CONFIGURE_LOGGING": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "PYTHONPATH": _vllm_alias(),
            # float32 runs in vLLM's Triton attention on a GPU, whose products are TF32 unless Triton is told otherwise:
            # they round to a part in 2000, and the oracle is to be met more closely.
            "TRITON_F32_DEFAULT": "ieee",
        }

    def complete(
        self,
        server: Server,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        temperature: float,
        seed: int | None,
        score_prompt: bool,
        ignore_eos: bool,
    ) -> Completion:
        extra: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": ignore_eos}
        if score_prompt:
            extra["prompt_logprobs"] = TOP_LOGPROBS
        try:
            answer = server.client.completions.create(
                model=server.model,
                prompt=list(prompt),
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                logprobs=TOP_LOGPROBS,
                extra_body=extra,
            )
        except openai.BadRequestError as refusal:
            raise RefusedError(str(refusal)) from refusal
        choice = answer.choices[0].model_dump()
        logprobs = choice["logprobs"]
        prompt_logprobs = [
            {int(token): entry["logprob"] for token, entry in place.items()}
            for place in choice.get("prompt_logprobs") or []
            if place is not None
        ]
        return Completion(
            tokens=choice["token_ids"],
            logprobs=logprobs["token_logprobs"],
            top_logprobs=[{_token_id(t): p for t, p in place.items()} for place in logprobs["top_logprobs"]],
            cached_tokens=_cached_tokens(answer),
            finish_reason=choice["finish_reason"],
            prompt_logprobs=prompt_logprobs,
        )

    def chat(self, server: Server, messages: list[Any], max_tokens: int, ignore_eos: bool) -> Chat:
        answer = server.client.chat.completions.create(
            model=server.model,
            messages=messages,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": ignore_eos},
        )
        content = answer.model_dump()
        return Chat(
            text=answer.choices[0].message.content or "",
            prompt=content["prompt_token_ids"],
            tokens=content["choices"][0]["token_ids"],
            cached_tokens=_cached_tokens(answer),
        )

    def forget(self, server: Server) -> None:
        pass  # prompts are scored without it

    def acceptance(self, server: Server) -> tuple[float, float]:
        prefix = "vllm:spec_decode_num"
        return server.metric(f"{prefix}_draft_tokens_total"), server.metric(f"{prefix}_accepted_tokens_total")

    def preemptions(self, server: Server) -> float:
        return server.metric("vllm:num_preemptions_total")

    def small_pool(self) -> list[str]:
        return ["--num-gpu-blocks-override", "48"]

    def inside(self, setup: Setup, tight: bool = False) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "dtype": setup.dtype,
            "enforce_eager": setup.eager,
            "max_model_len": setup.max_model_len,
            "max_num_seqs": 4,
            "block_size": 32,
            "kv_cache_memory_bytes": 64 << 20,
            "enable_prefix_caching": bool(setup.cache),
        }
        if torch.cuda.is_available():
            # With asynchronous scheduling drafts stay on the GPU, where nobody could replace them.
            arguments |= {"gpu_memory_utilization": _SHARE_OF_GPU, "async_scheduling": False}
        if setup.num_drafts:
            arguments["speculative_config"] = {"method": "mtp", "num_speculative_tokens": setup.num_drafts}
        return arguments | {"num_gpu_blocks_override": 40} if tight else arguments

    def override(self, changes: dict[str, Any]) -> list[str]:
        return ["--hf-overrides", json.dumps(changes)]

    def two_ranks(self) -> tuple[list[str], dict[str, str]]:
        return ["--tensor-parallel-size", "2"], {}


def _cached_tokens(answer: Any) -> int:
    """Prompt tokens that came from the prefix cache."""
    usage = answer.usage.model_dump() if answer.usage else {}
    return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _token_id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


@lru_cache(maxsize=1)
def _vllm_alias() -> str:
    """A folder with the metadata of a distribution "vllm", or "" where there is one.

    The `vllm` command of vllm-cpu 0.32.0 asks for the version of the distribution "vllm" and ends with
    PackageNotFoundError, because its own is called vllm-cpu.
    """
    try:
        metadata.version("vllm")
        return ""
    except metadata.PackageNotFoundError:
        version = f"{metadata.version('vllm-cpu')}+cpu"  # vLLM looks for "cpu" in it to choose its platform
    folder = Path(tempfile.mkdtemp(prefix="qwen3next-e2e-alias-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return str(folder)
