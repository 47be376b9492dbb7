"""A request that is left out of a step keeps its number of accepted tokens.

vLLM's V1 runner takes a running request that a step has no tokens for out of its batch and puts it back later as if its
last step had kept one token, while its recurrent state stays where the drafts left it: the next step then starts from
the state of an older token, and the answer is wrong from there on. It takes more decoding requests than a step has
tokens for: max_num_batched_tokens below max_num_seqs * (1 + num_speculative_tokens), or one long prompt in front.
To go as soon as vLLM keeps the number itself.
"""

from __future__ import annotations

import functools
from typing import Any

from qwen3next_plugin.errors import DriftError

_MARK = "_qwen3next_keeps_accepted_tokens"
_KEPT = "_qwen3next_accepted_tokens"


def keep_accepted_tokens_of_left_out_requests() -> None:
    """Makes the V1 runner of this process put a request back with the number it was taken out with. Safe to repeat.

    Raises DriftError where the runner's method for that is gone.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = getattr(GPUModelRunner, "_update_states", None)
    if original is None:
        raise DriftError(
            "vLLM has no vllm.v1.worker.gpu_model_runner.GPUModelRunner._update_states any more, which this plugin "
            "needs to keep MTP right when a request is left out of a step; use a supported vLLM version."
        )
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def update_states(self: Any, scheduler_output: Any) -> Any:
        batch = self.input_batch
        kept: dict[str, int] = self.__dict__.setdefault(_KEPT, {})
        before = dict(batch.req_id_to_index)
        for request in before.keys() - scheduler_output.num_scheduled_tokens.keys():
            kept[request] = int(batch.num_accepted_tokens_cpu[before[request]])
        # These start anew from a cached state, as after one token.
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        for request in (*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ()), *resumed):
            kept.pop(request, None)
        result = original(self, scheduler_output)
        for request in kept.keys() & batch.req_id_to_index.keys():
            batch.num_accepted_tokens_cpu[batch.req_id_to_index[request]] = kept.pop(request)
        return result

    setattr(update_states, _MARK, True)
    GPUModelRunner._update_states = update_states
