"""Compile two of the package's kernels and one of somebody else's for a GPU that is not there, and print as JSON what
`compilations` says of it. Run as a process of its own, without TRITON_INTERPRET, with 90 as argument.
"""

import json
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qwen3next_plugin.kernels import compilations
from qwen3next_plugin.kernels.norm import triton as norm

from .compile_layers import NamesTargetOnly, compile_only


class NoJson:
    """A constant as some packages' kernels have them."""

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoJson)


@triton.jit
def _somebody_elses_kernel(x, CONSTANT: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x, 1.0)


def main() -> None:
    """Compile before, within and after `serve`, one of them twice; print the object."""
    driver.set_active(NamesTargetOnly())
    JITFunction.run = compile_only(JITFunction.run)
    heard: list[str] = []
    said: list[str] = []

    def others(**event: Any) -> None:
        heard.append(event["fn"].name)

    triton.knobs.runtime.jit_post_compile_hook = others
    compilations.observe()
    compilations.observe()
    x, weight = torch.zeros(2, 64), torch.zeros(64)
    norm.rms_norm(x, weight, 1e-6)
    found = {"before": len(compilations.compiled()), "warned_before": list(said)}
    compilations.serve(said.append)
    norm.rms_norm(x, weight, 1e-6)
    found["warned_of_known"] = list(said)
    with compilations.expected():
        norm.add_rms_norm(x, x, weight, 1e-6)
    found["warned_of_expected"] = list(said)
    _somebody_elses_kernel.run(x, CONSTANT=NoJson(), grid=(1,), warmup=False)
    norm.rms_norm(x.half(), weight, 1e-6)
    norm.rms_norm(x.half(), weight, 1e-6)
    compilations.serve(None)
    norm.rms_norm(x.half(), weight.half(), 1e-6)
    faults = [fault.kernel for fault in compilations.compiled_while_serving()]
    print(json.dumps(found | {"said": said, "faults": faults, "all": len(compilations.compiled()), "heard": heard}))


if __name__ == "__main__":
    main()
