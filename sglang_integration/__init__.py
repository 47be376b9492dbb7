"""Entry point of SGLang's plugins. There is no SGLang integration in this version, and a server must not hide that."""

import logging

logger = logging.getLogger("sglang.qwen3next_plugin")

NOTICE = (
    "qwen3next-plugin %s does not take over Qwen3-Next in SGLang: this server is stock SGLang; "
    "serve with vLLM 0.32 to use the plugin, or set QWEN3NEXT_PLUGIN=0 to silence this line."
)


def register() -> None:
    """Says once a process that the engine is the stock one; nothing at all when QWEN3NEXT_PLUGIN=0."""
    from qwen3next_plugin.activation import plugin_version
    from qwen3next_plugin.settings import read_settings

    if read_settings().enabled:
        logger.warning(NOTICE, plugin_version())
