"""How far a recurrent state kept in 16 bits drifts from a float64 one over tens of thousands of decode steps.

    python benchmarks/state_drift.py [--steps 32768] [--out FILE]

Each step is the one that the kernels do: load the state, one step of the gated delta rule in float32, round, store.
What differs is the stored type, and how it is rounded: to nearest, or stochastically (up with a probability equal to
the fraction cut off, so that updates below half a unit are not lost on average). Heads forget over 4 tokens to 100,000
and write with a strength about a half or about a fiftieth; keys are what SiLU makes of normal numbers, so they overlap
as real ones do.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from qwen3next_plugin.kernels.gdn.reference import l2_normalize

RESULT = Path(__file__).parent / "results" / "cpu" / "state-drift.json"
MEMORIES = (4, 100, 3_000, 100_000)
"""Tokens after which a head has forgotten all but 1/e."""

STRENGTHS = (0.0, -4.0)
"""Middle of the range, 4 wide, in which a head's b is drawn; beta = sigmoid(b). Each memory has a head with each."""

SIZE = 128
WINDOW = 256
"""Steps over which an error is taken, ending at each of the steps reported."""

STORED = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float16 stochastic": torch.float16,
    "bfloat16 stochastic": torch.bfloat16,
}


def stochastic(state: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """float32 rounded to ``dtype`` and back, up or down at random so that the mean is kept: random bits are added below
    the last one kept, which is what a kernel would do. Magnitudes that ``dtype`` holds as normal numbers only.
    """
    cut = 23 - {torch.bfloat16: 7, torch.float16: 10}[dtype]
    noise = torch.randint(0, 1 << cut, state.shape, generator=generator, dtype=torch.int32)
    bits = (state.view(torch.int32) + noise) & -(1 << cut)
    return bits.view(torch.float32)


def step(
    state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: S <- exp(g) S, S <- S + beta (v - S k) k^T, o = S q (arXiv 2412.06464, section 3).

    state [..., heads, V, K]; q, k [heads, K]; v [heads, V]; decay = exp(g) and beta [heads].
    """
    state = state * decay[:, None, None]
    error = v - torch.einsum("...hvk,hk->...hv", state, k)
    state = state + (beta[:, None] * error).unsqueeze(-1) * k.unsqueeze(-2)
    return state, torch.einsum("...hvk,hk->...hv", state, q)


def measure(steps: int, seed: int = 0) -> dict[str, dict[str, list[list[float]]]]:
    """Relative errors against float64 by stored type: of outputs and of the state, for each reported step and head."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    heads = len(MEMORIES) * len(STRENGTHS)
    memories = torch.tensor(MEMORIES).repeat(len(STRENGTHS))
    strengths = torch.tensor(STRENGTHS).repeat_interleave(len(MEMORIES))
    reported = [n for n in (1 << p for p in range(10, 31)) if n <= steps] or [steps]
    exact = torch.zeros(heads, SIZE, SIZE, dtype=torch.float64)
    kept = torch.zeros(len(STORED), heads, SIZE, SIZE)
    wrong, whole = torch.zeros(len(STORED), heads, dtype=torch.float64), torch.zeros(heads, dtype=torch.float64)
    found: dict[str, dict[str, list[list[float]]]] = {name: {"output": [], "state": []} for name in STORED}
    for number in range(1, reported[-1] + 1):
        q, k, v = torch.randn(3, heads, SIZE)
        q, k = (l2_normalize(torch.nn.functional.silu(x)) for x in (q, k))
        decay = torch.exp(-torch.rand(heads) * 2 / memories)
        beta = (torch.rand(heads) * 4 - 2 + strengths).sigmoid()
        kept, outputs = step(kept, q, k, v, decay, beta)
        for place, (name, dtype) in enumerate(STORED.items()):
            if name.endswith("stochastic"):
                kept[place] = stochastic(kept[place], dtype, generator)
            else:
                kept[place] = kept[place].to(dtype).float()
        exact, right = step(exact, q.double(), k.double(), v.double(), decay.double(), beta.double())
        wrong += (outputs - right).square().sum(-1)
        whole += right.square().sum(-1)
        if number in reported:
            for place, name in enumerate(STORED):
                difference = (kept[place] - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
                found[name]["output"].append((wrong[place] / whole).sqrt().tolist())
                found[name]["state"].append(difference.tolist())
        if number in reported or any(number == n - WINDOW for n in reported):
            wrong.zero_()
            whole.zero_()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=32768)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    begin = time.monotonic()
    found = measure(arguments.steps)
    heads = len(MEMORIES)
    steps = [1 << (10 + place) for place in range(len(next(iter(found.values()))["output"]))]
    rows = [
        {"stored": name, "of": of, "steps": step, "b": b, "errors": [float(f"{e:.3g}") for e in errors[i : i + heads]]}
        for name, kinds in found.items()
        for of, table in kinds.items()
        for step, errors in zip(steps, table, strict=True)
        for b, i in zip(STRENGTHS, range(0, 2 * heads, heads), strict=True)
    ]
    head = {
        "what": "relative error of a stored recurrent state, and of the outputs it gives, against float64",
        "memories": MEMORIES,
        "window": WINDOW,
        "seconds": round(time.monotonic() - begin, 1),
        "torch": torch.__version__,
    }
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(head, indent=1)[:-2] + f',\n "drift": [\n  {lines}\n ]\n}}\n')
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
