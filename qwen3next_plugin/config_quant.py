"""``quantization_config`` of config.json, in the words of each tool that writes it, to a checked `QuantSpec`.

Which modules a tool leaves alone, it says in its own way: AutoAWQ by parts of names (``modules_to_not_convert``),
GPTQModel by regular expressions (``dynamic``), compressed-tensors by names and ``re:`` expressions, the more specific
first. All of them become `ModuleRule`s. Checkpoints are not always true to them, so that loading goes by the tensors
found; the rules say in which format.
"""

import re
from collections.abc import Callable, Sequence

from .config_fields import Fields, broken, show
from .spec import IntegerFormat, ModuleRule, QuantSpec

MIN_GROUP = 16  # columns: the depth of a tensor-core instruction
_EVERYTHING = (".*",)
_HEAD = ModuleRule(None, frozenset({"lm_head"}))


def parse_quant(fields: Fields) -> QuantSpec | None:
    """``quantization_config``, None where there is none. Raises ConfigError for what cannot be served rightly."""
    section = fields.section("quantization_config")
    if section is None:
        return None
    method = section.text("quant_method", choices=tuple(_PARSERS))
    return _PARSERS[method](section)


def _parse_fp8(section: Fields) -> QuantSpec:
    ignored: list[str] = []
    for name in ("modules_to_not_convert", "ignored_layers", "ignore"):
        ignored += section.sequence(name, str, ())
    block = section.sequence("weight_block_size", int, ()) or None
    if block is not None and (len(block) != 2 or min(block) < 1):
        raise broken(section.name("weight_block_size"), f"is {show(list(block))}", "give two sizes, [128, 128]")
    section.text("fmt", "e4m3", choices=("e4m3",))
    return QuantSpec(
        method="fp8",
        weight_block_size=(block[0], block[1]) if block is not None else None,
        ignored=tuple(dict.fromkeys(ignored)),
        activation_scheme=section.text("activation_scheme") if section.has("activation_scheme") else None,
    )


def _parse_awq(section: Fields) -> QuantSpec:
    bits = section.integer("w_bit" if section.has("w_bit") else "bits")
    if bits != 4:
        raise broken(section.name("bits"), f"is {bits}", "AWQ weights of 4 bits are served")
    version = section.text("version", "gemm")
    if version.lower() != "gemm":
        raise broken(section.name("version"), f"is {show(version)}", "the packing of version gemm is read")
    if not section.flag("zero_point", True):
        raise broken(
            section.name("zero_point"), "is false", "AWQ weights with zero points are read, as gemm writes them"
        )
    group = _group_size(section, "q_group_size" if section.has("q_group_size") else "group_size")
    skipped = section.sequence("modules_to_not_convert", str, ())
    rules = (_HEAD, ModuleRule(None, parts=skipped), _all(IntegerFormat("awq", 4, group, symmetric=False)))
    return QuantSpec("awq", rules=rules)


def _parse_gptq(section: Fields) -> QuantSpec:
    bits = section.integer("bits")
    symmetric = section.flag("sym", True)
    if bits not in (4, 8):
        raise broken(section.name("bits"), f"is {bits}", "GPTQ weights of 4 or 8 bits are served")
    if bits == 8 and not symmetric:
        raise broken(section.name("sym"), "is false with bits 8", "8 bits are served with sym true, 4 bits with either")
    packing = section.text("checkpoint_format", "gptq", choices=("gptq", "gptq_v2"))
    group = _group_size(section, "group_size")
    section.flag("desc_act", False)  # whether columns are really reordered, the checkpoint's g_idx says
    if section.flag("lm_head", False):
        raise broken(section.name("lm_head"), "is true", "quantise the checkpoint with lm_head false")
    stored = IntegerFormat(packing, bits, group, symmetric)
    rules = [_HEAD, *_dynamic_rules(section, bits, group, symmetric)]
    blocks = section.values.get("modules_in_block_to_quantize")
    if blocks:
        names = [name for entry in blocks for name in ([entry] if isinstance(entry, str) else entry)]
        if not all(isinstance(name, str) for name in names):
            raise broken(section.name("modules_in_block_to_quantize"), f"is {show(blocks)}", "give lists of names")
        rules.append(ModuleRule(stored, patterns=tuple(rf"(.*\.)?{re.escape(name)}$" for name in names)))
    else:
        rules.append(_all(stored))
    return QuantSpec("gptq", rules=tuple(rules))


def _dynamic_rules(section: Fields, bits: int, group: int | None, symmetric: bool) -> list[ModuleRule]:
    """GPTQModel's ``dynamic``: ``-:expression`` leaves modules out, any other key changes how they are quantised."""
    dynamic = section.section("dynamic")
    same = {"bits": bits, "group_size": group or -1, "sym": symmetric}
    skipped = []
    for key, changes in (dynamic.values if dynamic is not None else {}).items():
        if str(key).startswith("-:"):
            skipped.append(_expression(section, "dynamic", str(key).removeprefix("-:")))
            continue
        differing = {name for name, value in same.items() if (changes or {}).get(name, value) != value}
        if differing:
            remedy = "one format for all quantised modules is read, leave modules out with keys that start with '-:'"
            raise broken(section.name("dynamic"), f"changes {', '.join(sorted(differing))} for {show(key)}", remedy)
    return [ModuleRule(None, patterns=tuple(skipped))]


def _parse_compressed_tensors(section: Fields) -> QuantSpec:
    if section.has("kv_cache_scheme"):
        raise broken(section.name("kv_cache_scheme"), "is given", "scales of a quantised cache are not read, drop it")
    for name, harmless in (("sparsity_config", ("dense", None)), ("transform_config", ())):
        inner = section.section(name)
        if inner is not None and inner.values.get("format") not in harmless:
            raise broken(section.name(name), "is given", "dense weights without transforms are read")
    groups = section.section("config_groups")
    if groups is None:
        raise broken(
            section.name("config_groups"), "is missing", "take the config.json that belongs to this checkpoint"
        )
    names, patterns, classes = [], [], []
    for key in groups.values:
        group = groups.section(key)
        if group is None:
            continue
        stored = _compressed_format(group, section)
        targets = group.sequence("targets", str)
        exact = frozenset(target for target in targets if not target.startswith("re:") and target != "Linear")
        matching = _expressions(group, "targets", targets)
        names += [ModuleRule(stored, exact)] * bool(exact)
        patterns += [ModuleRule(stored, patterns=matching)] * bool(matching)
        classes += [_all(stored)] * ("Linear" in targets)
    ignore = section.sequence("ignore", str, ())
    exact = frozenset(entry for entry in ignore if not entry.startswith("re:"))
    ignored = ModuleRule(None, exact, patterns=_expressions(section, "ignore", ignore))
    return QuantSpec("compressed-tensors", rules=(ignored, *names, *patterns, *classes))


def _compressed_format(group: Fields, section: Fields) -> IntegerFormat:
    owner = group if group.has("format") else section
    packing = owner.text("format", choices=("pack-quantized", "int-quantized"))
    weights = group.section("weights")
    if weights is None:
        raise broken(group.name("weights"), "is missing", "integer weights are read: give their num_bits and strategy")
    weights.text("type", "int", choices=("int",))
    bits = weights.integer("num_bits", 8)
    if bits not in ((4, 8) if packing == "pack-quantized" else (8,)):
        remedy = "pack-quantized weights of 4 or 8 bits and int-quantized ones of 8 are served"
        raise broken(weights.name("num_bits"), f"is {bits} in format {packing}", remedy)
    symmetric = weights.flag("symmetric", True)
    if bits == 8 and not symmetric:
        raise broken(
            weights.name("symmetric"), "is false with 8 bits", "8 bits are served symmetric, 4 bits with either"
        )
    if weights.values.get("actorder") in (True, "group", "dynamic"):
        remedy = 'columns in another order than the activations\' are not served: use actorder "weight" or null'
        raise broken(weights.name("actorder"), f"is {show(weights.values['actorder'])}", remedy)
    strategy = weights.text(
        "strategy", "group" if weights.has("group_size") else "channel", choices=("group", "channel")
    )
    size = _group_size(weights, "group_size") if strategy == "group" else None
    if group.has("output_activations"):
        raise broken(group.name("output_activations"), "is given", "outputs are not quantised here, drop it")
    activations = group.section("input_activations")
    if activations is not None:
        _check_activations(activations, packing, size)
    return IntegerFormat(packing, bits, size, symmetric, quantize_activations=activations is not None)


def _check_activations(activations: Fields, packing: str, group_size: int | None) -> None:
    """INT8 with a scale a token found while running, beside int-quantized weights with a scale a row."""
    if packing != "int-quantized" or group_size is not None:
        found = f"is given with format {packing}" + (f" in groups of {group_size}" if group_size else "")
        raise broken(activations.prefix[:-1], found, "W8A8 is served as int-quantized with strategy channel")
    activations.text("type", "int", choices=("int",))
    activations.text("strategy", choices=("token",))
    for name, wanted in (("num_bits", 8), ("dynamic", True), ("symmetric", True)):
        found = activations.values.get(name, wanted if name != "dynamic" else False)
        if found != wanted:
            raise broken(activations.name(name), f"is {show(found)}", f"activations are rounded with {name} {wanted}")


def _group_size(section: Fields, name: str) -> int | None:
    """Columns a scale covers; None for -1, a whole row."""
    size = section.integer(name, minimum=-1)
    if size == -1:
        return None
    if size < MIN_GROUP or size % MIN_GROUP:
        raise broken(
            section.name(name), f"is {size}", f"give -1 (a whole row) or a multiple of {MIN_GROUP}, such as 128"
        )
    return size


def _all(stored: IntegerFormat) -> ModuleRule:
    return ModuleRule(stored, patterns=_EVERYTHING)


def _expressions(section: Fields, name: str, entries: Sequence[str]) -> tuple[str, ...]:
    marked = (entry.removeprefix("re:") for entry in entries if entry.startswith("re:"))
    return tuple(_expression(section, name, pattern) for pattern in marked)


def _expression(section: Fields, name: str, pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        remedy = "take the config.json that belongs to this checkpoint"
        raise broken(section.name(name), f"has {show(pattern)}, no regular expression ({error})", remedy) from None
    return pattern


_PARSERS: dict[str, Callable[[Fields], QuantSpec]] = {
    "fp8": _parse_fp8,
    "compressed-tensors": _parse_compressed_tensors,
    "awq": _parse_awq,
    "gptq": _parse_gptq,
}
