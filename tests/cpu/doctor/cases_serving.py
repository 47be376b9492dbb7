"""What can be wrong with settings, names, engines and checkpoints: how to bring it about, and what is to be said."""

import json

from tests.cpu.doctor.places import ENTRY_POINTS, PLUGIN, Case, Place, both, with_sglang

SGLANG_ONLY = "[sglang.srt.plugins]\nqwen3next = qwen3next_plugin.sglang_integration:register\n"
KINDS = ["linear_attention"] * 3 + ["full_attention"]
NEW_ROPE = {"rope_parameters": {"rope_theta": 1e7}}


def _egg_info_first(place: Place, entry_points: str) -> None:
    place.install(PLUGIN, "0.0.9", entry_points=entry_points, site=place.folder, kind="egg-info")
    place.path.insert(0, place.folder)


def _editable(place: Place) -> None:
    info = place.install(PLUGIN, "0.1.0", entry_points=ENTRY_POINTS)
    told = {"url": (place.root / "checkout").as_uri(), "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(told))


def _fp8_on_ampere(place: Place) -> None:
    place.gpus("NVIDIA A100-SXM4-80GB, 8.0, 81920, 580.95.05")
    place.config(quantization_config={"quant_method": "fp8"})


def _fp8_on_turing(place: Place) -> None:
    place.gpus("Tesla T4, 7.5, 15360, 580.95.05")
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


def _stock_sglang(place: Place) -> None:
    with_sglang(place)
    place.environ["QWEN3NEXT_PLUGIN"] = "0"


CASES = {
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
        both(
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
    "the plugin cannot be imported": Case(
        lambda p: p.vllm_says("stock", "vllm.models:X", log="ModuleNotFoundError: No module named numpy"),
        "error",
        "vllm",
        "vllm.models:X (ModuleNotFoundError: No module named numpy)",
        "what vLLM logs",
    ),
    "vllm is stock as asked": Case(
        both(lambda p: p.vllm_says("stock", "vllm.models:X"), lambda p: p.environ.update(QWEN3NEXT_PLUGIN="0")),
        "warning",
        "vllm",
        "is stock",
        "unset QWEN3NEXT_PLUGIN",
    ),
    "vllm cannot be imported": Case(
        lambda p: p.vllm_says("broken", "OSError: libcudart.so.13"), "error", "vllm", "libcudart.so.13", "install vLLM"
    ),
    "the inquiry has no Python": Case(
        lambda p: (p.bin / "python").unlink(), "error", "vllm", "python was not found", "install vLLM"
    ),
    "the inquiry dies": Case(
        lambda p: p.python("vllm", "echo 'ImportError: no x' >&2; exit 3"),
        "error",
        "vllm",
        "ImportError: no x",
        "install vLLM",
    ),
    "sglang refuses": Case(
        lambda p: p.sglang_says("refused", "sglang.x is gone in sglang 0.5.23: install another sglang."),
        "error",
        "sglang",
        "sglang.x is gone in sglang 0.5.23",
        "install another sglang.",
    ),
    "sglang is stock": Case(
        lambda p: p.sglang_says("stock", "sglang.srt.models.qwen3_next:Qwen3NextForCausalLM"),
        "error",
        "sglang",
        "0.5.20 is stock: Qwen3NextForCausalLM is sglang.srt.models.qwen3_next",
        "what SGLang logs",
    ),
    "the plugin fails in sglang": Case(
        lambda p: p.sglang_says("stock", "sglang.srt.models:X", log="KeyError: nothing"),
        "error",
        "sglang",
        "sglang.srt.models:X (KeyError: nothing)",
        "what SGLang logs",
    ),
    "sglang is stock as asked": Case(
        both(lambda p: p.sglang_says("stock", "sglang:X"), lambda p: p.environ.update(QWEN3NEXT_PLUGIN="0")),
        "warning",
        "sglang",
        "is stock",
        "unset QWEN3NEXT_PLUGIN",
    ),
    "sglang cannot be imported": Case(
        lambda p: p.sglang_says("broken", "ImportError: libcuda.so.1"),
        "error",
        "sglang",
        "libcuda.so.1",
        "install SGLang again",
    ),
    "sglang's inquiry dies": Case(
        both(with_sglang, lambda p: p.python("sglang", "echo 'ImportError: no y' >&2; exit 3")),
        "error",
        "sglang",
        "ImportError: no y",
        "install SGLang again",
    ),
    # checkpoint
    "no interval": Case(
        lambda p: p.config(layer_types=KINDS * 2),
        "warning",
        "config.json",
        "no full_attention_interval",
        'add "full_attention_interval": 4,',
    ),
    "no interval where SGLang is stock": Case(
        both(_stock_sglang, lambda p: p.config(layer_types=KINDS)),
        "error",
        "config.json",
        "without which stock SGLang cannot read it",
        "4,",
    ),
    "theta in the inner dict where SGLang is stock": Case(
        both(_stock_sglang, lambda p: p.config(**NEW_ROPE)), "error", "config.json", "takes 10000", '"rope_theta"'
    ),
    "layers that do not repeat": Case(
        lambda p: p.config(layer_types=[*KINDS, "full_attention"]),
        "warning",
        "config.json",
        "no full",
        "keep the plugin active",
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
    "FP8 on Ampere": Case(_fp8_on_ampere, "warning", "fp8", "8.0) has no FP8 units: FP8 weights are widened", "bf16"),
    "FP8 on Turing": Case(_fp8_on_turing, "error", "fp8", "need compute capability 8.0, Tesla T4 has 7.5", "GPU"),
}
