"""Entry point of vLLM's general plugins; everything else in this folder is imported when vLLM asks for it."""


def register() -> None:
    """Called by vLLM in every process, possibly more than once. Does nothing when QWEN3NEXT_PLUGIN=0."""
    from qwen3next_plugin.errors import PluginError
    from qwen3next_plugin.settings import read_settings

    from .refusal import refuse

    try:
        settings = read_settings()
        if not settings.enabled:
            return
        from .registration import activate

        activate(settings)
    except PluginError as error:
        refuse(error)
