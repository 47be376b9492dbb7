"""SGLang as the end-to-end tests see it: `python -m sglang.launch_server`, /generate, figures in each answer.

/generate is SGLang's own way in; it takes and gives token ids with exact log-probabilities and says of each answer how
many drafts were proposed and kept and how often it was retracted. The OpenAI ways are tested beside it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import httpx
import torch

from .engine import TOP_LOGPROBS, Chat, Completion, Engine, RefusedError, Setup
from .server import REQUEST_SECONDS, Server

STATE_EVERY = 64
"""Tokens between two states of a growing answer that are kept; prefill keeps them at multiples of 64 in any case."""

# Left alone, an idle scheduler keeps a core busy that another test could use.
_ON_CPU = ["--device", "cpu", "--attention-backend", "torch_native", "--sleep-on-idle"]
# FlashAttention, which SGLang takes on Hopper, has no float32.
_FLOAT32_ON_GPU = ["--attention-backend", "triton"]
# SGLang leaves the rest of what is free alone, and refuses to start when others take that much while it loads. On a GPU
# that others use, too, it shall take its pools, whose sizes are said, from the last of it.
_SHARE_OF_CPU, _SHARE_OF_GPU = "0.3", "0.95"
# Requests are admitted as if their answers were short, so that they outgrow the pool and some are retracted.
_SMALL_POOL = ["--schedule-conservativeness", "0.2"]


class SglangEngine(Engine):
    """Chunks of 128 tokens (a state is kept every 64), 4096 tokens and 80 states in the pools, 8 requests at once.

    Contexts beyond that get a larger pool and chunks of 1024: a chunk costs a CPU much the same whatever its length.
    """

    name = "sglang"
    caches = ("extra_buffer", "extra_buffer_lazy", "no_buffer")
    prompt_reserve = 7
    inherited = ("SGLANG_",)
    stock_sign = "this server is stock SGLang"
    usual: ClassVar[dict[str, str]] = {"SGLANG_MAMBA_CONV_DTYPE": "bfloat16"}
    length_flag = "--context-length"
    version_change = ("sglang._version", "version = ", "version = '0.99.0'  # ")
    drift = (
        "sglang.srt.layers.attention.linear.gdn_backend",
        "class GDNAttnBackend(",
        "class GatedDeltaNetBackend(",
    )
    # No extra_buffer_lazy with drafts: SGLang wants drafting overlapped with it, which it does on a GPU only. Both
    # versions get 1, 2 and 3 drafts and each way to cache; with which test is shared out between them.
    random_setups = (
        *(Setup("ratio2"), Setup("ratio1", 1, "no_buffer", further=True)),
        *(Setup("ratio2", 2, "extra_buffer"), Setup("ratio4", 3, "extra_buffer", further=True)),
    )
    demo_setups = (
        *(Setup("demo", 0, "extra_buffer_lazy"), Setup("demo", 2, "extra_buffer", further=True)),
        Setup("demo", 1, "no_buffer"),
    )
    limit_setups = (Setup("ratio2", 0, "extra_buffer"), Setup("ratio2", 2, "no_buffer", further=True))
    state_setups = (
        *(Setup("ratio2", 0, "no_buffer"), Setup("ratio4", 0, "extra_buffer_lazy", further=True)),
        *(Setup("ratio1", 1, "extra_buffer", further=True), Setup("ratio2", 3, "extra_buffer")),
    )

    def command(self, model: str, port: int) -> list[str]:
        launch = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
        return [*launch, "--host", "127.0.0.1", "--port", str(port)]

    def context_reserve(self, num_drafts: int) -> int:
        return max(2, num_drafts + 1)  # drafts have their place in the context too

    def flags(self, setup: Setup) -> list[str]:
        chosen = [] if torch.cuda.is_available() else list(_ON_CPU)
        if torch.cuda.is_available() and setup.dtype == "float32":
            chosen += _FLOAT32_ON_GPU
        chosen += ["--mem-fraction-static", _SHARE_OF_GPU if torch.cuda.is_available() else _SHARE_OF_CPU]
        chosen += ["--dtype", setup.dtype, "--context-length", str(setup.max_model_len)]
        chosen += ["--max-running-requests", "8", "--max-total-tokens", str(max(4096, setup.max_model_len + 64))]
        chunk = 128 if setup.max_model_len <= 4096 else 1024
        chosen += ["--max-mamba-cache-size", "80", "--chunked-prefill-size", str(chunk)]
        chosen += ["--mamba-track-interval", str(STATE_EVERY)]
        # The watchdog ends a server that a busy machine, or whoever paused the tests, kept from its work for 5 minutes.
        chosen += ["--enable-cache-report", "--random-seed", "0", "--watchdog-timeout", "3000"]
        if setup.cache:
            chosen += ["--mamba-radix-cache-strategy", setup.cache]
            chosen += ["--disable-overlap-schedule"] * (setup.cache == "no_buffer")
        else:
            chosen += ["--disable-radix-cache"]
        if setup.num_drafts:
            chosen += ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(setup.num_drafts)]
            chosen += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(setup.num_drafts + 1)]
        return chosen

    def variables(self) -> dict[str, str]:
        exact = {"SGLANG_MAMBA_CONV_DTYPE": "float32"}  # bfloat16 otherwise, whatever --dtype says
        if torch.cuda.is_available():
            # SGLang's Triton attention multiplies float32 as TF32 unless Triton is told otherwise: that rounds to
            # a part in 2000, and the oracle is to be met more closely.
            return exact | {"TRITON_F32_DEFAULT": "ieee"}
        # torch.compile would spend half a minute on one helper of NEXTN's.
        return exact | {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}

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
        sampling = {"temperature": temperature, "max_new_tokens": max_tokens, "ignore_eos": ignore_eos}
        if seed is not None:
            sampling["sampling_seed"] = seed
        body = {
            "input_ids": list(prompt),
            "sampling_params": sampling,
            "return_logprob": True,
            "top_logprobs_num": TOP_LOGPROBS,
            "logprob_start_len": 0 if score_prompt else -1,
        }
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=REQUEST_SECONDS)
        if answer.status_code == 400:
            raise RefusedError(answer.text)
        answer.raise_for_status()
        content = answer.json()
        meta = content["meta_info"]
        self._count(server, meta)
        return Completion(
            tokens=content["output_ids"],
            logprobs=[logprob for logprob, *_ in meta["output_token_logprobs"]],
            top_logprobs=[_by_token(place) for place in meta["output_top_logprobs"]],
            cached_tokens=meta["cached_tokens"],
            finish_reason=meta["finish_reason"]["type"],
            prompt_logprobs=_prompt_logprobs(prompt, meta) if score_prompt else [],
        )

    def chat(self, server: Server, messages: list[Any], max_tokens: int, ignore_eos: bool) -> Chat:
        answer = server.client.chat.completions.create(
            model=server.model,
            messages=messages,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"return_token_ids": True, "return_meta_info": True, "ignore_eos": ignore_eos},
        )
        choice = answer.choices[0].model_dump()
        self._count(server, choice["meta_info"])
        return Chat(
            text=answer.choices[0].message.content or "",
            prompt=choice["prompt_token_ids"],
            tokens=choice["response_token_ids"],
            cached_tokens=choice["meta_info"]["cached_tokens"],
        )

    def _count(self, server: Server, meta: dict[str, Any]) -> None:
        server.counts.add("drafted", meta.get("spec_num_proposed_drafts") or 0)
        server.counts.add("accepted", meta.get("spec_num_correct_drafts") or 0)
        server.counts.add("retractions", meta.get("num_retractions") or 0)

    def forget(self, server: Server) -> None:
        httpx.post(f"{server.url}/flush_cache", timeout=30.0).raise_for_status()

    def acceptance(self, server: Server) -> tuple[float, float]:
        return server.counts["drafted"], server.counts["accepted"]

    def preemptions(self, server: Server) -> float:
        return server.counts["retractions"]

    def small_pool(self) -> list[str]:
        return [*_SMALL_POOL, "--max-total-tokens", "500"]

    def inside(self, setup: Setup, tight: bool = False) -> dict[str, Any]:
        flags = self.flags(setup) + [*_SMALL_POOL, "--max-total-tokens", "560"] * tight
        return {"flags": flags, "block_size": 1}  # a chunk of a prompt may end anywhere, and a state stands there

    def override(self, changes: dict[str, Any]) -> list[str]:
        return ["--json-model-override-args", json.dumps(changes)]

    def two_ranks(self) -> tuple[list[str], dict[str, str]]:
        # Left alone, SGLang gives each rank a NUMA node of its own, and most machines have one.
        cores = sorted(os.sched_getaffinity(0))
        return ["--tp-size", "2"], {"SGLANG_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}


def _by_token(place: list[list[Any]]) -> dict[int, float]:
    return {token: logprob for logprob, token, *_ in place}


def _prompt_logprobs(prompt: Sequence[int], meta: dict[str, Any]) -> list[dict[int, float]]:
    """The entry of each prompt token but the first: the likeliest tokens there, and the one that stands there.

    Tokens from the prompt, not from the answer: there SGLang writes 0 for the vocabulary's last one.
    """
    found = meta["input_token_logprobs"]
    own = [{token: logprob} for token, (logprob, *_) in zip(prompt[1:], found[1:], strict=True)]
    top = [_by_token(place) for place in meta["input_top_logprobs"][1:]]
    return [a | b for a, b in zip(own, top, strict=True)]
