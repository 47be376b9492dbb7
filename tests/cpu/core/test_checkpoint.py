"""Checkpoint files: read back what was written, and one sentence with the file's name for each kind of damage."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen3next_plugin.errors import WeightError
from qwen3next_plugin.weights import check_checkpoint, fuse_checkpoint, has_mtp, open_checkpoint
from tests.cpu.core.checkpoints import Tensors, fp8_checkpoint, fp8_spec, random_checkpoint, small_spec, stacked

INDEX = "model.safetensors.index.json"


def write(folder: Path, tensors: Tensors, num_files: int = 2) -> Path:
    """A checkpoint directory in ``num_files`` files with an index, as published."""
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for i in range(num_files):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[i::num_files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("with_index", [True, False])
def test_reads_back_what_was_written(tmp_path: Path, num_files: int, with_index: bool) -> None:
    spec = small_spec()
    tensors = random_checkpoint(spec)
    write(tmp_path, tensors, num_files)
    if not with_index:
        (tmp_path / INDEX).unlink()
    found = dict(open_checkpoint(tmp_path))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    summary = check_checkpoint(tmp_path, spec)
    assert (summary.num_files, summary.num_tensors, summary.has_mtp) == (num_files, len(tensors), True)
    assert summary.num_bytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))


def test_has_mtp_reads_the_names(tmp_path: Path) -> None:
    assert not has_mtp(write(tmp_path, random_checkpoint(small_spec(), mtp=False)))
    assert has_mtp(write(tmp_path, random_checkpoint(small_spec(), mtp=True)))


def test_every_spelling_passes_the_check(tmp_path: Path) -> None:
    plain, fp8 = small_spec(mlp_only_layers=[0]), fp8_spec()
    checkpoints = [(plain, random_checkpoint(plain)), (fp8, fp8_checkpoint(fp8))]
    for spec, tensors in [*checkpoints, *((spec, stacked(tensors, spec)) for spec, tensors in checkpoints)]:
        write(tmp_path, tensors)
        assert check_checkpoint(tmp_path, spec).num_tensors == len(tensors)
        fuse_checkpoint(open_checkpoint(tmp_path), spec)


def _first(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def _truncate(keep: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = _first(folder).read_bytes()
        _first(folder).write_bytes(content[: keep(len(content))])

    return damage


def _overwrite(start: int, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with _first(folder).open("r+b") as stream:
            stream.seek(start)
            stream.write(content)

    return damage


def _change_header(old: bytes, new: bytes) -> Callable[[Path], None]:
    assert len(old) == len(new)

    def damage(folder: Path) -> None:
        content = _first(folder).read_bytes()
        assert old in content
        _first(folder).write_bytes(content.replace(old, new, 1))

    return damage


def _index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content)
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def _copy_first(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / "model-copy.safetensors").write_bytes(_first(folder).read_bytes())


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _remove(folder: Path) -> None:
    _empty(folder)
    folder.rmdir()


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "half a file": (_truncate(lambda n: n // 2), r"model-00001-of-00002\.safetensors is truncated.*bytes where"),
    "one byte short": (_truncate(lambda n: n - 1), r"model-00001-of-00002\.safetensors is truncated"),
    "half a header": (
        _truncate(lambda n: 100),
        r"model-00001-of-00002\.safetensors is truncated.*do not hold the header",
    ),
    "three bytes": (_truncate(lambda n: 3), r"model-00001-of-00002\.safetensors is truncated"),
    "nothing": (_truncate(lambda n: 0), r"model-00001-of-00002\.safetensors is truncated"),
    "a web page": (_overwrite(0, b"<!DOCTYPE html>"), r"model-00001-of-00002\.safetensors is truncated or damaged"),
    "header no JSON": (_overwrite(8, b"garbage"), r"model-00001-of-00002.*header is not that of a safetensors file"),
    "header of another shape": (
        _change_header(b'"shape":[64]', b'"shape":[65]'),
        r"00001-of-00002.*is truncated or damaged",
    ),
    "trailing bytes": (
        lambda folder: _first(folder).write_bytes(_first(folder).read_bytes() + b"x"),
        r"model-00001-of-00002\.safetensors is truncated or damaged.*bytes where",
    ),
    "missing file": (lambda folder: _first(folder).unlink(), r"model-00001-of-00002\.safetensors is missing"),
    "twice": (_copy_first, r"is in both .*safetensors and .*model-copy\.safetensors"),
    "index of nothing": (_index(lambda content: content.clear()), r"index\.json is not a safetensors index"),
    "index promises more": (
        _index(lambda c: c["weight_map"].update({"model.more": "model-00001-of-00002.safetensors"})),
        r"model-00001-of-00002\.safetensors lacks model\.more",
    ),
    "index no JSON": (lambda folder: (folder / INDEX).write_text("{"), r"index\.json is not a safetensors index"),
    "no files": (_empty, r"holds no \*\.safetensors file"),
    "no directory": (_remove, r"is not a directory"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_gets_one_sentence_with_the_files_name(tmp_path: Path, name: str) -> None:
    spec = small_spec()
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, random_checkpoint(spec))
    damage, message = DAMAGED[name]
    damage(folder)
    for read in (lambda: check_checkpoint(folder, spec), lambda: next(open_checkpoint(folder))):
        with pytest.raises(WeightError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def _spoil(name: str, tensor: torch.Tensor | None) -> Callable[[Tensors], None]:
    def spoil(tensors: Tensors) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return spoil


SPOILED: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "missing": (_spoil("model.layers.0.mlp.gate.weight", None), r"layers\.0\.mlp\.gate\.weight is not in"),
    "missing expert": (
        _spoil("model.layers.3.mlp.experts.7.down_proj.weight", None),
        r"experts\.7\.down_proj\.weight is not in",
    ),
    "missing scale": (
        _spoil("mtp.layers.0.self_attn.o_proj.weight_scale_inv", None),
        r"mtp\.layers\.0\.self_attn\.o_proj\.weight_scale_inv is not in",
    ),
    "shape": (_spoil("lm_head.weight", torch.rand(127, 64)), r"lm_head\.weight has shape \[127, 64\].*\[128, 64\]"),
    "unknown": (
        _spoil("model.layers.9.input_layernorm.weight", torch.rand(64)),
        r"layers\.9.* is no tensor of this model",
    ),
    "dtype": (_spoil("model.norm.weight", torch.ones(64, dtype=torch.int8)), r"model\.norm\.weight holds I8"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_headers_alone_show_what_does_not_fit_the_config(tmp_path: Path, name: str) -> None:
    spec = fp8_spec()
    tensors = fp8_checkpoint(spec)
    spoil, message = SPOILED[name]
    spoil(tensors)
    write(tmp_path, tensors)
    with pytest.raises(WeightError, match=message):
        check_checkpoint(tmp_path, spec)


def test_another_models_config_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, random_checkpoint(small_spec()))
    for change in ({"num_hidden_layers": 8}, {"hidden_size": 128}, {"num_experts": 16}, {"linear_num_value_heads": 8}):
        layers = change.get("num_hidden_layers", 4)
        layer_types = ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(layers)]
        with pytest.raises(WeightError):
            check_checkpoint(tmp_path, small_spec(layer_types=layer_types, **change))
