"""The SGLang side of `inside.py`: `python -m tests.e2e.inside_sglang job.json result.pt`.

SGLang's scheduler is a process of its own, into which this module goes as a plugin (`look_in`, by an entry point that
exists for this run only). It gives the scheduler two methods, which the engine's own remote calls reach: one fills the
state pool with NaN, one saves every recurrent state that the radix cache would hand to a later request.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .inside import Drafts

JOB = "E2E_INSIDE_JOB"


def look_in() -> None:
    """The plugin: keeps a job's drafts coming and opens the scheduler's state pool. Does nothing without a job."""
    if JOB not in os.environ:
        return
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

    job = json.loads(Path(os.environ[JOB]).read_text())
    drafts = Drafts(job)
    keys: list[Any] = []
    insert, draft, draft_forward = UnifiedRadixCache.insert, EagleDraftWorker.draft, EagleDraftWorker.draft_forward

    def remember_key(self: Any, params: Any) -> Any:
        keys.append(params.key)
        return insert(self, params)

    def remember_batch(self: Any, batch: Any, **kwargs: Any) -> Any:
        self.probed = batch
        return draft(self, batch, **kwargs)

    def replace_drafts(self: Any, forward_batch: Any) -> Any:
        parents, scores, tokens, probabilities = draft_forward(self, forward_batch)
        for row, request in enumerate(self.probed.reqs):
            prompt = list(request.origin_input_ids)
            done = int(self.probed.seq_lens[row]) + 1 - len(prompt)  # the newest token is not in seq_lens yet
            made = drafts(prompt, done, tokens.shape[1])
            tokens[row, : len(made)] = torch.tensor(made, dtype=tokens.dtype)
        return parents, scores, tokens, probabilities

    def capture_nothing(self: Any) -> None:
        self.cuda_graph_runner = self.cuda_graph_runner_for_draft_extend = None

    def poison_states(self: Any) -> None:
        for state in _states(self):
            state.fill_(float("nan"))

    def save_states(self: Any, path: str) -> None:
        found = {tuple(state["tokens"]): state for key in keys for state in _cached_states(self, key)}
        torch.save(list(found.values()), path)

    UnifiedRadixCache.insert = remember_key
    if drafts.fault_rate >= 0:
        EagleDraftWorker.draft, EagleDraftWorker.draft_forward = remember_batch, replace_drafts
        # On a GPU: a graph of the drafter would hold the drafts of its capture. The verification keeps its graphs.
        EagleDraftWorker._capture_cuda_graphs = capture_nothing
    Scheduler.poison_states, Scheduler.save_states = poison_states, save_states


def _pool(scheduler: Any) -> Any:
    return scheduler.tree_cache.req_to_token_pool


def _states(scheduler: Any) -> list[torch.Tensor]:
    """Every tensor of the state pool: convolution and recurrent states, and what is kept of the drafts of a step."""
    pool = _pool(scheduler).mamba_pool
    records = getattr(pool, "draft_records", None)
    return [*pool.mamba_cache.conv, pool.mamba_cache.temporal, *(records.tensors() if records is not None else ())]


def _cached_states(scheduler: Any, key: Any) -> list[dict[str, Any]]:
    """The states that requests which begin with `key` would start from, the longest first."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

    pool, cache = _pool(scheduler), scheduler.tree_cache
    found, length = [], len(key)
    while length > 0:
        match = cache.match_prefix(MatchPrefixParams(key=key[:length]))
        matched = getattr(match, "device_prefix_len", None)
        matched = len(match.device_indices) if matched is None else matched
        slot = cache.tree_core.get_component_device_value(match.best_match_node, ComponentType.MAMBA)
        if not matched or slot is None:
            break
        states = pool.mamba_pool.mamba_cache
        conv, ssm = {}, {}
        for layer, place in pool.mamba_map.items():
            name = f"model.layers.{layer}.linear_attn"
            conv[name] = states.conv[0][place, int(slot)].T.cpu().clone()
            ssm[name] = states.temporal[place, int(slot)].cpu().clone()
        found.append({"tokens": list(key.raw_token_ids())[:matched], "conv": conv, "ssm": ssm})
        length = matched - 1
    return found


def _entry_point(folder: Path) -> None:
    """Metadata of a distribution whose plugin is `look_in`."""
    info = folder / "qwen3next_e2e_inside-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qwen3next-e2e-inside\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\ne2e_inside = {look_in.__module__}:look_in\n")


def run(engine: Any, asks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One round: all requests at once."""
    prompts = [ask["prompt"] for ask in asks]
    params = [{"temperature": 0.0, "max_new_tokens": ask["max_tokens"]} for ask in asks]
    answers: list[dict[str, Any]] = engine.generate(input_ids=prompts, sampling_params=params)
    return answers


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    with tempfile.TemporaryDirectory(prefix="qwen3next-inside-") as folder:
        _entry_point(Path(folder))
        os.environ[JOB] = job_path
        sys.path.insert(0, folder)  # the scheduler's process starts with this one's

        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.server_args import prepare_server_args

        engine = Engine(server_args=prepare_server_args(["--model-path", job["model"], *job["engine"]["flags"]]))
        try:
            if job["poison"]:
                engine.collective_rpc("poison_states")
            rounds = [run(engine, asks) for asks in job["rounds"]]
            saved = Path(folder) / "states.pt"
            engine.collective_rpc("save_states", path=str(saved))
            states = torch.load(saved)
        finally:
            engine.shutdown()
    metas = [[answer["meta_info"] for answer in answers] for answers in rounds]
    accepted: dict[int, int] = {}
    for meta in (meta for row in metas for meta in row):
        for drafts, count in enumerate(meta.get("spec_correct_drafts_histogram") or []):
            if count:
                accepted[drafts + 1] = accepted.get(drafts + 1, 0) + count
    torch.save(
        {
            "tokens": [[answer["output_ids"] for answer in answers] for answers in rounds],
            "cached": [[meta["cached_tokens"] for meta in row] for row in metas],
            "states": states,
            "block_size": job["engine"]["block_size"],
            "preemptions": sum(meta["num_retractions"] for row in metas for meta in row),
            "accepted": accepted,
        },
        result_path,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
