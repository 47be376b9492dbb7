"""Entry point of SGLang's plugins; everything else in this folder is imported when SGLang asks for it.

SGLang logs an exception from here and goes on as the stock engine, so whatever goes wrong ends the process instead.
"""


def register() -> None:
    """Called by SGLang in every process that it loads plugins in. With QWEN3NEXT_PLUGIN=0 only says so.

    What measures stock SGLang beside ours is there all the same.
    """
    from qwen3next_plugin.errors import PluginError, RegistrationError
    from qwen3next_plugin.settings import read_settings

    from .refusal import end

    try:
        settings = read_settings()
        from .measuring import offer

        offer()
        if not settings.enabled:
            from .activation import say_stock

            say_stock()
            return
        from .registration import activate

        activate(settings)
    except PluginError as error:
        end(error)
    except Exception as error:
        found = f"{type(error).__name__}: {error}".rstrip(".")
        remedy = "reinstall qwen3next-plugin and sglang, or set QWEN3NEXT_PLUGIN=0 to run the stock engine"
        end(RegistrationError(f"registering with SGLang failed ({found}): {remedy}."))
