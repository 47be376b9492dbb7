"""Greedy decoding with tie detection, and MTP drafting measured against it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from .cache import LayerState, ReferenceCache
from .model import ReferenceModel


@dataclass
class Generation:
    """A greedy answer: its tokens and, for each, by how many logits it beat the second best."""

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    @property
    def smallest_margin(self) -> float:
        """The closest decision; a prompt is fit for comparing engines when this is well above their rounding error."""
        return min(self.margins, default=float("inf"))


@torch.no_grad()
def generate_greedy(
    model: ReferenceModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
) -> list[Generation]:
    """Continue each prompt with the likeliest token until a stop token (kept in the answer) or ``max_new_tokens``.

    Prompts may differ in length; each runs with a cache of its own.
    """
    return [_continue_greedily(model, prompt, max_new_tokens, stop_tokens) for prompt in prompts]


def _continue_greedily(
    model: ReferenceModel, prompt: Sequence[int], max_new_tokens: int, stop_tokens: Collection[int]
) -> Generation:
    if not prompt:
        raise ValueError("prompt is empty: greedy decoding needs at least one token to start from")
    cache, answer = ReferenceCache(), Generation()
    step = list(prompt)
    while len(answer.tokens) < max_new_tokens:
        logits = model(model.tokens(step), cache)[0, -1].double()
        best, second = logits.topk(2).values.tolist()
        token = int(logits.argmax())
        answer.tokens.append(token)
        answer.margins.append(best - second)
        if token in stop_tokens:
            break
        step = [token]
    return answer


@dataclass
class DraftStatistics:
    """Drafts made and accepted at each depth; entry 0 is the first draft after a verified token."""

    drafted: list[int]
    accepted: list[int]

    @classmethod
    def empty(cls, depth: int) -> "DraftStatistics":
        """Counters for ``depth`` drafts a step, all zero."""
        return cls([0] * depth, [0] * depth)

    def add(self, other: "DraftStatistics") -> None:
        """Count ``other``'s drafts too."""
        self.drafted = [a + b for a, b in zip(self.drafted, other.drafted, strict=True)]
        self.accepted = [a + b for a, b in zip(self.accepted, other.accepted, strict=True)]

    @property
    def rates(self) -> list[float]:
        """Share of the drafts of each depth that were accepted (a draft behind a rejected one counts as rejected)."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True)]

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens, all depths together: what engines report."""
        return sum(self.accepted) / max(1, sum(self.drafted))

    @property
    def acceptance_length(self) -> float:
        """Tokens gained a decoding step: one verified token and the accepted drafts."""
        return 1.0 + (sum(self.accepted) / self.drafted[0] if self.drafted[0] else 0.0)


@torch.no_grad()
def accept_drafts(model: ReferenceModel, prompt: Sequence[int], answer: Sequence[int], depth: int) -> DraftStatistics:
    """Replay greedy speculative decoding of ``answer`` with ``depth`` MTP drafts a step (arXiv 2211.17192,
    temperature 0).

    Because the target is greedy, its tokens are known beforehand: a draft is accepted exactly when it equals the
    answer's token, and after each step decoding goes on behind the last accepted draft and the token that the
    verification adds.
    """
    tokens = model.tokens([*prompt, *answer])
    prefill = ReferenceCache()
    first = model.mtp(model.hidden(tokens[:, :-1]), tokens[:, 1:], prefill)
    keys_values = prefill.layer("mtp.layers.0.")
    assert keys_values.keys is not None and keys_values.values is not None
    statistics = DraftStatistics.empty(depth)
    position = len(prompt)  # of the newest known token; the MTP row before it drafts its successor
    while position < tokens.shape[1] - 1:
        row = position - 1
        state = LayerState(keys_values.keys[:, : row + 1], keys_values.values[:, : row + 1])
        cache = ReferenceCache(mtp_length=row + 1, layers={"mtp.layers.0.": state})
        hidden, accepted, rejected = first[:, row : row + 1], 0, False
        usable = min(depth, tokens.shape[1] - 1 - position)
        for d in range(usable):
            draft = model.logits(hidden).argmax(-1)
            statistics.drafted[d] += 1
            rejected = rejected or int(draft) != int(tokens[0, position + 1 + d])
            if not rejected:
                accepted += 1
                statistics.accepted[d] += 1
            if d + 1 < usable:
                hidden = model.mtp(hidden, draft, cache)
        position += accepted + 1
    return statistics
