"""What a user asked of the rotary embedding, completed from the checkpoint: one whole dict and its context length.

An engine's override replaces the checkpoint's rope dict instead of adding to it, and engines fill the holes with
defaults of other models (base 10000, full rotary), which spoils the output without a word. So each adapter hands in
what it was given and puts in place what comes out; nothing here knows an engine.
"""

import copy
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .config_fields import Fields, broken, show
from .config_rope import ROPE_TYPES, parse_rope
from .errors import ConfigError, SettingsError
from .rope import attention_factor
from .spec import RopeSpec

ROPE_DICTS = ("rope_parameters", "rope_scaling")
_WRITTEN = (*ROPE_DICTS, "rope_theta", "partial_rotary_factor", "max_position_embeddings")
_COMMON_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_YARN_KEYS = (
    *("factor", "original_max_position_embeddings", "attention_factor", "attn_factor"),
    *("beta_fast", "beta_slow", "truncate", "finetuned"),
)
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # Peng et al. 2023, "YaRN", section 3.2
_USUAL_FACTOR = 4.0  # of the model's card: 262144 tokens to a million
_SHORTCUT = re.compile(r"yarn:(?P<factor>\d+(?:\.\d+)?)(?::(?P<original>[1-9]\d*))?")


@dataclass(frozen=True)
class RopeShortcut:
    """``QWEN3NEXT_ROPE``: YaRN by ``factor``; ``original`` (tokens) is only compared with the checkpoint's."""

    factor: float
    original: int | None = None


def parse_shortcut(text: str) -> RopeShortcut:
    """``yarn:FACTOR`` or ``yarn:FACTOR:ORIGINAL``; raises SettingsError for anything else or a factor below 1."""
    match = _SHORTCUT.fullmatch(text)
    if match is None or float(match["factor"]) < 1.0:
        wanted = "yarn:FACTOR or yarn:FACTOR:ORIGINAL_LENGTH with a factor of at least 1, for example yarn:4"
        raise SettingsError(f"QWEN3NEXT_ROPE is {show(text)}: use {wanted}.")
    return RopeShortcut(float(match["factor"]), int(match["original"]) if match["original"] else None)


@dataclass(frozen=True)
class CompleteRope:
    """A rope that leaves nothing to an engine's defaults, and the tokens it covers."""

    spec: RopeSpec
    context_length: int

    @property
    def parameters(self) -> dict[str, Any]:
        """The dict for config.json, ``rope_parameters`` in transformers' names."""
        spec = self.spec
        common = {
            "rope_type": spec.rope_type,
            "rope_theta": spec.theta,
            "partial_rotary_factor": spec.partial_rotary_factor,
        }
        if spec.rope_type == "default":
            return common
        return common | {
            "factor": spec.factor,
            "original_max_position_embeddings": spec.original_max_position_embeddings,
            "attention_factor": attention_factor(spec),
            "beta_fast": spec.beta_fast,
            "beta_slow": spec.beta_slow,
            "truncate": spec.truncate,
        }


def written_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the rope, copied: engines overwrite it with overrides before they ask for the rope."""
    return {name: copy.deepcopy(config[name]) for name in _WRITTEN if name in config}


def check_rope_dicts(overrides: Mapping[str, Any]) -> None:
    """Raise ConfigError if an override of the rope is no dict, or two of them differ: an engine takes the later one."""
    new, old = (overrides.get(name) for name in ROPE_DICTS)
    for name, value in zip(ROPE_DICTS, (new, old), strict=True):
        if value is not None and not isinstance(value, Mapping):
            remedy = 'give a dict such as {"rope_type": "yarn", "factor": 4.0}'
            raise broken(name, f"is {show(value)} ({type(value).__name__})", remedy)
    if new and old and new != old:
        raise broken("rope_scaling", f"is {show(old)} while rope_parameters is {show(new)}", "give one of the two")


def complete_rope(
    checkpoint: Mapping[str, Any],
    *,
    asked: Mapping[str, Any] | None = None,
    shortcut: RopeShortcut | None = None,
    asked_length: int | None = None,
) -> CompleteRope:
    """The rope to run with.

    Args:
        checkpoint: config.json as written (either spelling); only its rope fields and max_position_embeddings count.
        asked: the user's ``rope_parameters`` or ``rope_scaling``, which replaces the checkpoint's dict.
        shortcut: the same in short; where both are given they must agree.
        asked_length: tokens of context the user asked for, None for all that the rope covers.

    Raises:
        ConfigError: a field of either that is wrong, contradicts the checkpoint or another one, or does not cover
            ``asked_length``: one sentence, with the right dict in it as JSON.
    """
    fields = Fields(checkpoint)
    written_length = fields.integer("max_position_embeddings")
    own = parse_rope(fields, written_length)
    trained = own.original_max_position_embeddings or written_length
    try:
        spec = _asked_spec(own, trained, asked, shortcut, asked_length)
        covered = round((spec.factor or 1.0) * trained)
        # A config.json with YaRN in it says the trained length or, as transformers wants it, the extended one.
        context = written_length if spec == own and written_length != trained else covered
        if asked_length is not None and asked_length > max(covered, context):
            raise _too_long(spec, covered, asked_length, "max_position_embeddings")
    except ConfigError as error:
        factors = (shortcut.factor if shortcut else None, (asked or {}).get("factor"))
        raise _with_right_dict(error, own, trained, factors, asked_length) from None
    return CompleteRope(spec, context if asked_length is None else asked_length)


def check_context(rope: CompleteRope, asked_length: int, field: str) -> None:
    """Raise ConfigError, the right dict in it, if ``field`` asks for more tokens of context than the rope covers."""
    if asked_length <= rope.context_length:
        return
    trained = rope.spec.original_max_position_embeddings or rope.context_length
    error = _too_long(rope.spec, rope.context_length, asked_length, field)
    raise _with_right_dict(error, rope.spec, trained, (rope.spec.factor,), asked_length)


def _too_long(spec: RopeSpec, covered: int, asked_length: int, field: str) -> ConfigError:
    by = f"YaRN with factor {spec.factor:g}" if spec.rope_type == "yarn" else "the checkpoint without YaRN"
    return broken(
        field, f"is {asked_length} while {by} covers {covered} tokens", f"ask for at most {covered} or extend"
    )


def _with_right_dict(
    error: ConfigError, own: RopeSpec, trained: int, factors: Iterable[Any], asked_length: int | None
) -> ConfigError:
    """The error with what was most likely meant: a factor that makes sense, everything else as it has to be."""
    sensible = [f for f in factors if isinstance(f, int | float) and not isinstance(f, bool) and 1 <= f < math.inf]
    factor = float(sensible[0]) if sensible else _USUAL_FACTOR
    if asked_length is not None and asked_length > factor * trained:
        factor = float(math.ceil(asked_length / trained))
    right = json.dumps({"rope_parameters": CompleteRope(_yarn(own, trained, factor), 0).parameters})
    reason = str(error).removeprefix("config.json: ").removesuffix(".")
    return ConfigError(f"{reason}; the right dict is {right}.", error.field)


def _asked_spec(
    own: RopeSpec,
    trained: int,
    asked: Mapping[str, Any] | None,
    shortcut: RopeShortcut | None,
    asked_length: int | None,
) -> RopeSpec:
    if shortcut is not None and shortcut.original not in (None, trained):
        raise broken("QWEN3NEXT_ROPE", f"says {shortcut.original} tokens", f"the checkpoint was trained on {trained}")
    if not asked:
        return own if shortcut is None else _yarn(own, trained, shortcut.factor)
    section = Fields(asked, "rope_parameters.")
    rope_type = _rope_type(section)
    for name, mine in (("rope_theta", own.theta), ("partial_rotary_factor", own.partial_rotary_factor)):
        theirs = section.number(name, mine)
        if theirs != mine:
            raise broken(section.name(name), f"is {theirs:.10g}", f"the checkpoint's is {mine:.10g}")
    if rope_type == "default":
        if shortcut is not None:
            raise broken(section.name("rope_type"), "is 'default' while QWEN3NEXT_ROPE asks for YaRN", "drop one")
        return RopeSpec(own.theta, own.partial_rotary_factor)
    spec = _asked_yarn(section, own, trained, asked_length)
    if shortcut is not None and shortcut.factor != spec.factor:
        found = f"is {spec.factor:g} while QWEN3NEXT_ROPE says {shortcut.factor:g}"
        raise broken(section.name("factor"), found, "make them equal or drop one")
    return spec


def _rope_type(section: Fields) -> str:
    """The type, checked together with the keys that go with it."""
    new, old = section.values.get("rope_type"), section.values.get("type")
    if new is not None and old is not None and new != old:
        raise broken(section.name("type"), f"is {show(old)} while rope_type is {show(new)}", "drop type")
    rope_type = section.text("rope_type" if old is None else "type", choices=ROPE_TYPES)
    for key in section.values:
        if key in ("mscale", "mscale_all_dim"):
            raise broken(section.name(key), "belongs to DeepSeek's YaRN", "say it with attention_factor")
        if key not in _COMMON_KEYS + _YARN_KEYS:
            raise broken(section.name(key), "is not a field of a rope dict", "drop it")
        if rope_type == "default" and key not in _COMMON_KEYS and section.has(key):
            raise broken(section.name(key), "does nothing with rope_type 'default'", "make rope_type 'yarn'")
    return str(rope_type)


def _asked_yarn(section: Fields, own: RopeSpec, trained: int, asked_length: int | None) -> RopeSpec:
    original = section.integer("original_max_position_embeddings", trained)
    if original != trained:
        name = section.name("original_max_position_embeddings")
        raise broken(name, f"is {original}", f"the checkpoint was trained on {trained}")
    # transformers' rule for a dict without a factor; without a length there is nothing to tell it from.
    factor = section.number("factor") if asked_length is None else section.number("factor", asked_length / trained)
    if factor < 1.0:
        raise broken(section.name("factor"), f"is {factor:g}", "give the extension factor, at least 1")
    beta_fast, beta_slow = section.number("beta_fast", _BETA_FAST), section.number("beta_slow", _BETA_SLOW)
    if beta_fast <= beta_slow:
        raise broken(section.name("beta_fast"), f"is {beta_fast:g}, not above beta_slow ({beta_slow:g})", "swap them")
    return RopeSpec(
        theta=own.theta,
        partial_rotary_factor=own.partial_rotary_factor,
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=trained,
        attention_factor=_asked_attention_factor(section, attention_factor(_yarn(own, trained, factor))),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=section.flag("truncate", True),
    )


def _asked_attention_factor(section: Fields, usual: float) -> float:
    """``attention_factor`` is all that cos and sin are multiplied by; engines multiply the usual by ``attn_factor``."""
    if not section.has("attn_factor"):
        return section.number("attention_factor", usual)
    multiplied = section.number("attn_factor") * usual
    name = section.name("attn_factor")
    if not section.has("attention_factor"):
        raise broken(name, "means different things to different engines", f"say attention_factor {multiplied:g}")
    given = section.number("attention_factor")
    if not math.isclose(given, multiplied, rel_tol=1e-6):
        raise broken(name, f"makes the factor {multiplied:g} while attention_factor is {given:g}", "drop attn_factor")
    return given


def _yarn(own: RopeSpec, trained: int, factor: float) -> RopeSpec:
    """YaRN with the paper's constants over the checkpoint's base."""
    usual = 0.1 * math.log(factor) + 1.0
    return RopeSpec(own.theta, own.partial_rotary_factor, "yarn", factor, trained, usual, _BETA_FAST, _BETA_SLOW, True)
