"""The rotary fields of config.json, in the form of transformers 4.57 or 5.x, as a `RopeSpec`."""

import math
from typing import Any

from .config_fields import Fields, broken, show
from .spec import RopeSpec

ROPE_TYPES = ("default", "yarn")
_YARN_KEYS = frozenset(
    "rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings attention_factor "
    "beta_fast beta_slow truncate mscale mscale_all_dim finetuned".split()
)


def parse_rope(fields: Fields, max_position_embeddings: int) -> RopeSpec:
    """Read ``rope_parameters`` (5.x) or ``rope_scaling`` + ``rope_theta`` + ``partial_rotary_factor`` (4.57).

    A base or partial factor that is nowhere is an error, not a default: a dict given to an engine as an override
    replaces the checkpoint's whole dict, and a base of 10000 or full rotary would then spoil the output silently.
    """
    section = _section(fields)
    theta = _either(fields, section, "rope_theta", upper=math.inf)
    partial = _either(fields, section, "partial_rotary_factor", upper=1.0)
    if section is None:
        return RopeSpec(theta, partial)
    kind_field = "rope_type" if section.has("rope_type") or not section.has("type") else "type"
    rope_type = section.text(kind_field, "default", choices=ROPE_TYPES)
    if rope_type == "default":
        return RopeSpec(theta, partial)
    return _parse_yarn(section, theta, partial, max_position_embeddings)


def _section(fields: Fields) -> Fields | None:
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    if new is not None and old is not None:
        for key in sorted(set(new.values) & set(old.values)):
            if new.values[key] != old.values[key]:
                found = f"is {show(old.values[key])} while rope_parameters.{key} is {show(new.values[key])}"
                raise broken(f"rope_scaling.{key}", found, "keep one of the two dicts")
    return new if new is not None else old


def _either(fields: Fields, section: Fields | None, name: str, upper: float) -> float:
    """A number from the rope dict or from the top level; both must agree where both are given."""
    inner = section.number(name, at_most=upper) if section is not None and section.has(name) else None
    outer = fields.number(name, at_most=upper) if fields.has(name) else None
    if inner is None and outer is None:
        where = section.prefix[:-1] if section is not None else "rope_parameters"
        raise broken(name, "is missing", f"give it in {where} or at the top level")
    if inner is not None and outer is not None and inner != outer and section is not None:
        raise broken(name, f"is {outer:g} while {section.name(name)} is {inner:g}", "make them equal or drop one")
    return inner if inner is not None else float(outer or 0.0)


def _parse_yarn(section: Fields, theta: float, partial: float, max_position_embeddings: int) -> RopeSpec:
    unknown = sorted(set(section.values) - _YARN_KEYS)
    if unknown:
        found = "is not a field of a YaRN dict"
        raise broken(section.name(unknown[0]), found, f"use only {', '.join(sorted(_YARN_KEYS))}")
    if theta <= 1.0:
        raise broken("rope_theta", f"is {theta:g}", "YaRN needs a base above 1, for example 10000000")
    original = section.integer("original_max_position_embeddings", max_position_embeddings)
    factor = section.number("factor", max_position_embeddings / original)
    if factor < 1.0:
        raise broken(section.name("factor"), f"is {factor:g}", "give the extension factor, at least 1")
    beta_fast = section.number("beta_fast", 32.0)
    beta_slow = section.number("beta_slow", 1.0)
    if beta_fast <= beta_slow:
        found = f"is {beta_fast:g}, not above {section.name('beta_slow')} ({beta_slow:g})"
        raise broken(section.name("beta_fast"), found, "use the paper's 32 and 1")
    return RopeSpec(
        theta=theta,
        partial_rotary_factor=partial,
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=_attention_factor(section, factor),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=section.flag("truncate", True),
    )


def _attention_factor(section: Fields, factor: float) -> float | None:
    """The factor given, or the one DeepSeek's ``mscale`` pair stands for, or None for the paper's default."""
    if section.has("attention_factor"):
        return section.number("attention_factor")
    pair: list[Any] = [section.values.get(key) for key in ("mscale", "mscale_all_dim")]
    if not all(pair):
        return None
    scale, scale_all = section.number("mscale"), section.number("mscale_all_dim")
    return (0.1 * scale * math.log(factor) + 1.0) / (0.1 * scale_all * math.log(factor) + 1.0)
