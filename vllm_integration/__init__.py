"""Entry point of vLLM's general plugins; everything else in this folder is imported when vLLM asks for it."""


def register() -> None:
    """Called by vLLM in every process, possibly more than once.

    With QWEN3NEXT_PLUGIN=0 models and kernels stay vLLM's; what measures them beside ours is there all the same.
    """
    from qwen3next_plugin.errors import PluginError
    from qwen3next_plugin.settings import read_settings

    from .measuring import offer
    from .refusal import refuse

    try:
        offer()
        settings = read_settings()
        if not settings.enabled:
            return
        from .registration import activate

        activate(settings)
    except PluginError as error:
        refuse(error)
