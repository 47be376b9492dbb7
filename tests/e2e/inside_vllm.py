"""The vLLM side of `inside.py`: `python -m tests.e2e.inside_vllm job.json result.pt`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .inside import Drafts


class _Engine:
    """The engine and the few places where this process looks into it."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(model=job["model"], skip_tokenizer_init=True, **job["engine"])
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.block_size = self.llm.llm_engine.vllm_config.cache_config.block_size
        self.drafts = Drafts(job)
        self.requests: dict[str, Any] = {}
        self.preemptions = self.skipped_steps = 0
        self.accepted: dict[int, int] = {}
        self.step_lengths: dict[int, int] = {}
        self._watch()
        if job["poison"]:
            for state in self._states():
                state.fill_(float("nan"))

    def _states(self) -> list[torch.Tensor]:
        layers = self.runner.compilation_config.static_forward_context.values()
        return [state for layer in layers if isinstance(layer.kv_cache, tuple) for state in layer.kv_cache]

    def _watch(self) -> None:
        scheduler, runner = self.scheduler, self.runner
        add, preempt, update = scheduler.add_request, scheduler._preempt_request, scheduler.update_draft_token_ids
        schedule, sampled = scheduler.schedule, runner._update_states_after_model_execute

        def add_request(request: Any) -> None:
            self.requests[request.request_id] = request
            add(request)

        def preempt_request(*args: Any, **kwargs: Any) -> None:
            self.preemptions += 1
            preempt(*args, **kwargs)

        def update_draft_token_ids(drafts: Any) -> None:
            if self.drafts.fault_rate >= 0:
                for i, (request_id, proposed) in enumerate(zip(drafts.req_ids, drafts.draft_token_ids, strict=True)):
                    request = self.requests[request_id]
                    made = self.drafts(request.prompt_token_ids, request.num_output_tokens, len(proposed))
                    drafts.draft_token_ids[i] = self.drafts.shortened(made)
            update(drafts)

        def count_step(*args: Any, **kwargs: Any) -> Any:
            running = {r.request_id for r in scheduler.running if r.num_computed_tokens >= r.num_prompt_tokens}
            output = schedule(*args, **kwargs)
            alive = running & {r.request_id for r in scheduler.running}
            self.skipped_steps += len(alive - set(output.num_scheduled_tokens))
            for request_id in alive & set(output.num_scheduled_tokens):
                length = output.num_scheduled_tokens[request_id]
                self.step_lengths[length] = self.step_lengths.get(length, 0) + 1
            return output

        def count_accepted(tokens: torch.Tensor, output: Any) -> None:
            for request_id, kept in zip(runner.input_batch.req_ids, (tokens != -1).sum(1).tolist(), strict=True):
                if request_id in output.scheduled_spec_decode_tokens:
                    self.accepted[kept] = self.accepted.get(kept, 0) + 1
            sampled(tokens, output)

        scheduler.add_request, scheduler._preempt_request = add_request, preempt_request
        scheduler.update_draft_token_ids, scheduler.schedule = update_draft_token_ids, count_step
        runner._update_states_after_model_execute = count_accepted

    def run(self, asks: Sequence[dict[str, Any]]) -> tuple[list[list[int]], list[int]]:
        """One round: all requests at once; returns their tokens and how many prompt tokens came from the cache."""
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=0.0, max_tokens=ask["max_tokens"], ignore_eos=True, detokenize=False)
            for ask in asks
        ]
        outputs = self.llm.generate([{"prompt_token_ids": ask["prompt"]} for ask in asks], params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs], [o.num_cached_tokens or 0 for o in outputs]

    def cached_states(self) -> list[dict[str, Any]]:
        """Every recurrent state that a later request could start from, once."""
        manager = self.scheduler.kv_cache_manager
        groups = manager.kv_cache_config.kv_cache_groups
        context = self.runner.compilation_config.static_forward_context
        mamba = [i for i, g in enumerate(groups) if isinstance(context[g.layer_names[0]].kv_cache, tuple)]
        found: dict[bytes, dict[str, Any]] = {}
        for request in self.requests.values():
            for index, block_hash in enumerate(request.block_hashes):
                blocks = manager.block_pool.get_cached_block(block_hash, mamba)
                if blocks is None or block_hash in found:
                    continue
                conv, ssm = {}, {}
                for group, block in zip(mamba, blocks, strict=True):
                    for name in groups[group].layer_names:
                        states = context[name].kv_cache
                        conv[name], ssm[name] = (state[block.block_id].clone() for state in states)
                size = manager.block_pool.hash_block_size
                found[block_hash] = {
                    "tokens": list(request.all_token_ids)[: (index + 1) * size],
                    "conv": conv,
                    "ssm": ssm,
                }
        return list(found.values())


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    engine = _Engine(job)
    rounds = [engine.run(asks) for asks in job["rounds"]]
    torch.save(
        {
            "tokens": [tokens for tokens, _ in rounds],
            "cached": [cached for _, cached in rounds],
            "states": engine.cached_states() if job["engine"].get("enable_prefix_caching") else [],
            "block_size": engine.block_size,
            "preemptions": engine.preemptions,
            "accepted": engine.accepted,
            "step_lengths": engine.step_lengths,
            "skipped_steps": engine.skipped_steps,
        },
        result_path,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
