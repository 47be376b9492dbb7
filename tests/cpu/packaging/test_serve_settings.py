"""`make serve`: what each variable may be, and the sentence when it is not."""

import socket
from pathlib import Path

import pytest

from qwen3next_plugin.serve import machine
from qwen3next_plugin.serve.errors import ServeError
from qwen3next_plugin.serve.launch import CPU_CACHE_GIB, command, variables
from qwen3next_plugin.serve.settings import Settings


def test_nothing_said_means_the_demo_on_a_free_port_until_ctrl_c() -> None:
    settings = Settings.read({})
    assert settings.engine.name == "vllm" and settings.model is None and not settings.once
    assert settings.host == "127.0.0.1" and settings.engine_arguments == ()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", settings.port))


def test_a_model_is_a_folder_with_a_config_or_a_hub_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert Settings.read({"MODEL": str(tmp_path)}).model == str(tmp_path)
    assert Settings.read({"MODEL": "Qwen/Qwen3-Next-80B-A3B-Instruct"}).model == "Qwen/Qwen3-Next-80B-A3B-Instruct"


def test_engine_arguments_keep_their_quotes_and_their_key_and_host_are_seen() -> None:
    settings = Settings.read({"ARGS": "--host 0.0.0.0 --api-key=sesame --hf-overrides '{\"a\": 1}'"})
    assert settings.engine_arguments[-1] == '{"a": 1}'
    assert settings.host == "127.0.0.1" and settings.api_key == "sesame"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"ENGINE": "llama"}, "ENGINE=llama is not known; there is ENGINE=vllm, ENGINE=sglang, ENGINE=sglang-next."),
        ({"PORT": "http"}, "PORT=http is not a port"),
        ({"PORT": "70000"}, "PORT=70000 is not a port"),
        ({"ONCE": "yes"}, "ONCE=yes means nothing"),
        ({"TIMEOUT": "soon"}, "TIMEOUT=soon is not a number"),
        ({"TIMEOUT": "0"}, "TIMEOUT=0 is not a number of seconds above zero"),
        ({"ARGS": "--port 1"}, "say PORT="),
        ({"ARGS": "--x 'y"}, "cannot be split"),
        ({"MODEL": "./nowhere"}, "MODEL=./nowhere is not there"),
        ({"MODEL": "a/b/c"}, "MODEL=a/b/c is not there"),
    ],
)
def test_a_value_that_means_nothing_is_named(variables: dict[str, str], sentence: str) -> None:
    with pytest.raises(ServeError) as caught:
        Settings.read(variables)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"without config\.json"):
        Settings.read({"MODEL": str(tmp_path)})


def test_a_port_in_use_is_refused_if_asked_for() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"PORT={port} is in use"):
            Settings.read({"PORT": str(port)})


def test_the_engine_gets_the_users_variables_but_not_makes() -> None:
    given = {"MODEL": "a/b", "PORT": "1", "MAKELEVEL": "1", "HF_HOME": "/h", "PATH": "/bin"}
    env = variables(Settings.read({}), Path("/e/bin/python"), "gpu", given)
    assert env == {"HF_HOME": "/h", "PATH": "/e/bin:/bin"}


def test_on_a_cpu_the_cache_leaves_memory_to_others_unless_the_user_says_how_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "available_memory_gib", lambda: 22.5)

    def cache(given: dict[str, str], said: dict[str, str]) -> str | None:
        return variables(Settings.read(said), Path("/e/bin/python"), "cpu", given).get(CPU_CACHE_GIB)

    assert cache({}, {}) == "1"
    assert cache({}, {"MODEL": "a/b"}) == "5"
    assert cache({CPU_CACHE_GIB: "7"}, {"MODEL": "a/b"}) == "7"
    assert cache({}, {"ARGS": "--kv-cache-memory-bytes 1G"}) is None


def test_sglang_is_told_to_stay_on_the_cpu_and_out_of_this_folder() -> None:
    settings = Settings.read({"ENGINE": "sglang"})
    env = variables(settings, Path("/e/bin/python"), "cpu", {"PATH": "/bin", "TORCHDYNAMO_DISABLE": "0"})
    assert env["SGLANG_USE_CPU_ENGINE"] == "1" and env["PYTHONSAFEPATH"] == "1"
    assert env["TORCHDYNAMO_DISABLE"] == "0"  # the user's wish
    on_gpu = variables(settings, Path("/e/bin/python"), "gpu", {})
    assert "SGLANG_USE_CPU_ENGINE" not in on_gpu and on_gpu["PYTHONSAFEPATH"] == "1"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_what_the_user_gives_comes_last(tmp_path: Path, device: str) -> None:
    (tmp_path / "sglang").touch()
    settings = Settings.read({"ENGINE": "sglang", "ARGS": "--mem-fraction-static 0.8", "PORT": ""})
    started = [str(part) for part in command(settings, tmp_path / "python", device, "/demo")]
    assert started[1:5] == ["-m", "sglang.launch_server", "--model-path", "/demo"]
    assert started[-2:] == ["--mem-fraction-static", "0.8"] and started[-4:-2] == ["--served-model-name", "demo"]
    assert ("torch_native" in started) is (device == "cpu")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_that_is_not_there_is_named(tmp_path: Path, engine: str) -> None:
    with pytest.raises(ServeError, match=f"{engine} is not installed beside"):
        command(Settings.read({"ENGINE": engine}), tmp_path / "python", "cpu", "/demo")


def test_available_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 99 kB\nMemAvailable:   3145728 kB\n")
    assert machine.available_memory_gib(meminfo) == 3.0
    assert machine.available_memory_gib(tmp_path / "none") == 0.0


def test_the_device_is_found_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not machine.has_nvidia_gpu(tmp_path / "none")
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert machine.has_nvidia_gpu(tmp_path / "gpus")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    assert machine.has_nvidia_gpu(tmp_path / "none")
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert not machine.has_nvidia_gpu(tmp_path / "none")


def test_device_may_be_said_but_not_invented() -> None:
    assert machine.choose_device({"DEVICE": "gpu"}) == "gpu"
    with pytest.raises(ServeError, match="DEVICE=tpu"):
        machine.choose_device({"DEVICE": "tpu"})
