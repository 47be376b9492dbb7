"""What can go wrong on the user's side, one exception class a cause.

Every message is one sentence that names the field or file, what was found and what would work; command lines and
engines print it as it stands, without a traceback.
"""


class PluginError(Exception):
    """Base of every error this package raises on purpose; ``str(error)`` is a sentence for the user."""


class ConfigError(PluginError):
    """A field of config.json is missing, of the wrong type, or asks for something that cannot be.

    ``field`` is the field's name as it stands in config.json (dotted when nested), for programs that want it.
    """

    def __init__(self, message: str, field: str = "") -> None:
        # Only the message goes to Exception.args, so that the error survives pickling between engine processes.
        super().__init__(message)
        self.field = field


class WeightError(PluginError):
    """A checkpoint file or tensor is missing, damaged, of the wrong shape, or cannot be split as asked."""


class SettingsError(PluginError):
    """A ``QWEN3NEXT_*`` environment variable is unknown or has a value that means nothing."""


class UnsupportedEngineError(PluginError):
    """The engine is absent or of a version outside the supported range."""


class DriftError(PluginError):
    """Something this package relies on inside the engine is gone or has changed its signature."""


class RegistrationError(PluginError):
    """This package could not take its place inside the engine, which would otherwise run stock without a word."""
