"""SGLang's plugins, this one and the CPU stand-ins, loaded once as every process of SGLang's does."""

from importlib.util import find_spec

import pytest

if find_spec("sglang") is None:  # the vLLM environment
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session", autouse=True)
def _plugins_are_loaded() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
