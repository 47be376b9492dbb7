"""What is measured: operations of a layer by their names, with the sizes in them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from qwen3next_plugin.errors import SettingsError

Kind = Literal["kernels", "moe"]

BATCHES = (1, 8, 64, 256, 1024)
DENSE = ("qkvz", "out", "qkv", "o", "router")

KERNEL_CASES = (
    *(f"gdn-decode-b{batch}{state}" for state in ("", "-bf16state") for batch in BATCHES),
    *(f"gdn-verify{tokens}-b{batch}" for tokens in (2, 4, 8) for batch in (1, 64, 256)),
    *(f"gdn-prefill-{rows}" for rows in ("1x4096", "1x32768", "1x131072", "4x8192", "8x1024", "64x256")),
    "conv-prefill-8192",
    *(f"{part}-{tokens}" for part in ("norm-add", "qk-norm-rope-write") for tokens in (1, 64, 8192)),
    *(f"dense-{name}-m{rows}" for name in DENSE for rows in (1, 8, 16)),
)

MOE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
MOE_CASES = tuple(
    f"moe-{mode}-tp{tp}-m{tokens}" for mode in ("fp8", "bf16") for tp in (1, 2, 4, 8) for tokens in MOE_TOKENS
)

ALL_CASES: dict[Kind, tuple[str, ...]] = {"kernels": KERNEL_CASES, "moe": MOE_CASES}

_PATTERNS: tuple[tuple[Kind, str, str], ...] = (
    ("kernels", "gdn-decode", r"gdn-decode-b(?P<rows>[1-9]\d*)(?P<variant>-bf16state)?"),
    ("kernels", "gdn-verify", r"gdn-verify(?P<tokens>[1-9]\d*)-b(?P<rows>[1-9]\d*)"),
    ("kernels", "gdn-prefill", r"gdn-prefill-(?P<rows>[1-9]\d*)x(?P<tokens>[1-9]\d*)"),
    ("kernels", "conv-prefill", r"conv-prefill-(?P<tokens>[1-9]\d*)"),
    ("kernels", "norm-add", r"norm-add-(?P<tokens>[1-9]\d*)"),
    ("kernels", "qk-norm-rope-write", r"qk-norm-rope-write-(?P<tokens>[1-9]\d*)"),
    ("kernels", "dense", rf"dense-(?P<variant>{'|'.join(DENSE)})-m(?P<tokens>[1-9]\d*)"),
    ("moe", "moe", r"moe-(?P<variant>fp8|bf16)-tp(?P<ranks>[1248])-m(?P<tokens>[1-9]\d*)"),
)

_SIZE = re.compile(r"(?:-b|-m|x|-)(\d+)$")
_STATE = "-bf16state"


@dataclass(frozen=True)
class Case:
    """One row of a result file.

    op: the operation; rows: requests; tokens: of each of them, or of all where there are no requests; variant: which
    dense layer, which weights, "-bf16state"; ranks: tensor-parallel size whose share one GPU has.
    """

    name: str
    op: str
    rows: int = 1
    tokens: int = 1
    variant: str = ""
    ranks: int = 1

    @property
    def unit(self) -> str:
        """ms for prefills, us for all else."""
        return "ms" if self.op == "gdn-prefill" else "us"


def parse_case(kind: Kind, name: str) -> Case:
    """The case called ``name``. Raises SettingsError if there is none of that kind."""
    for of, op, pattern in _PATTERNS:
        match = re.fullmatch(pattern, name)
        if match is not None and of == kind:
            found = {key: value or "" for key, value in match.groupdict().items()}
            sizes = {key: int(found[key]) for key in ("rows", "tokens", "ranks") if key in found}
            return Case(name, op, variant=found.get("variant", ""), **sizes)
    raise SettingsError(f"--rows: {name!r} is no row of {kind}: use names such as {', '.join(ALL_CASES[kind][:3])}.")


def family_and_size(case: str) -> tuple[str, int]:
    """``gdn-decode-b64-bf16state`` -> ("gdn-decode-bf16state", 64): what is drawn as one line, and where on it."""
    stem = case.removesuffix(_STATE)
    match = _SIZE.search(stem)
    if match is None:
        return case, 1
    return stem[: match.start()] + case[len(stem) :], int(match[1])


def parse_cases(kind: Kind, text: str) -> list[Case]:
    """Cases from names or patterns (``moe-fp8-tp1-*``) with commas between; "all" is every one of them.

    Raises SettingsError for a name unknown and for a pattern that fits none.
    """
    names: list[str] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        fitting = [name for name in ALL_CASES[kind] if word == "all" or fnmatchcase(name, word)]
        if not fitting and any(letter in word for letter in "*?["):
            raise SettingsError(f"--rows: {word!r} fits no row of {kind}.")
        names += fitting or [word]
    return [parse_case(kind, name) for name in dict.fromkeys(names)]


def profiled_among(names: Sequence[str], text: str) -> list[str]:
    """Those of the rows run whose profile is asked for, by names or patterns with commas between; "all" is every one.

    Raises SettingsError for a name or pattern that fits none of them.
    """
    found: set[str] = set()
    for word in filter(None, (part.strip() for part in text.split(","))):
        fitting = [name for name in names if word == "all" or fnmatchcase(name, word)]
        if not fitting:
            raise SettingsError(f"--profile: {word!r} fits none of the rows that are run: ask for it in --rows too.")
        found.update(fitting)
    return [name for name in names if name in found]
