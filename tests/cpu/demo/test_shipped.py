"""The shipped checkpoint: what `qwen3next demo-checkpoint DIR` writes, how small it is, and what it can do."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Qwen3NextForCausalLM

from qwen3next_plugin.config import LayerKind, load_spec
from qwen3next_plugin.demo.batches import encode_chat
from qwen3next_plugin.demo.command import copy_shipped
from qwen3next_plugin.demo.corpus import Message, note
from qwen3next_plugin.demo.evaluate import evaluate, figures_of, open_demo
from qwen3next_plugin.demo.random import count_parameters, tensor_shapes
from qwen3next_plugin.reference import generate_greedy
from qwen3next_plugin.weights import check_checkpoint, open_checkpoint
from tests.helpers import relative_error

CHAT: list[Message] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "My name is Ada."},
    {"role": "assistant", "content": "Nice to meet you, Ada."},
    {"role": "user", "content": "What is my name?"},
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "checkpoint"
    copy_shipped(directory)
    return directory


def test_files_and_their_size(demo: Path) -> None:
    files = {path.name: path.stat().st_size for path in demo.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 8_000_000


def test_layout_is_the_published_one(demo: Path) -> None:
    config = json.loads((demo / "config.json").read_text())
    assert config["model_type"] == "qwen3_next" and config["architectures"] == ["Qwen3NextForCausalLM"]
    assert config["num_nextn_predict_layers"] == 1
    spec = load_spec(demo)
    assert spec.layer_kinds == (LayerKind.LINEAR,) * 3 + (LayerKind.FULL,)
    assert spec.dtype is torch.bfloat16 and spec.gdn.heads_per_group == 2
    tensors = dict(open_checkpoint(demo))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == dict(tensor_shapes(spec))
    assert sum(t.numel() for t in tensors.values()) == count_parameters(spec)
    for name, tensor in tensors.items():
        expected = torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16
        assert tensor.dtype is expected, name
        assert bool(torch.isfinite(tensor.float()).all()), name
    assert check_checkpoint(demo, spec).has_mtp


def test_tokenizer_loads_and_round_trips(demo: Path) -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(demo), AutoConfig.from_pretrained(demo)
    assert len(tokenizer) == config.vocab_size == 1024
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == config.eos_token_id
    assert tokenizer.pad_token_id == config.pad_token_id
    for text in ("Hello!", "  two  spaces\n\tand a tab", "12 345", "Grüße, 世界 🙂", "don't", "x" * 300):
        ids = tokenizer(text).input_ids
        assert max(ids) < 1021 and tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer("a<|im_end|>b").input_ids, skip_special_tokens=True) == "ab"


def test_chat_template_gives_what_the_model_was_trained_on(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("What is my name?<|im_end|>\n<|im_start|>assistant\n")
    _, encode, stop = open_demo(demo)
    assert encode(text) == encode_chat(CHAT, encode) == tokenizer(text).input_ids
    assert stop == set(json.loads((demo / "generation_config.json").read_text())["eos_token_id"])


@torch.no_grad()
def test_transformers_computes_the_same_logits(demo: Path) -> None:
    model, encode, _ = open_demo(demo)
    theirs = Qwen3NextForCausalLM.from_pretrained(demo, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.tensor([encode_chat(CHAT, encode)])
    assert relative_error(model(tokens), theirs(tokens).logits.double()) < 1e-4


def test_held_out_answers_and_drafts(demo: Path) -> None:
    model, encode, stop = open_demo(demo)
    result = evaluate(model, encode, stop, per_kind=4)
    assert result.accuracy > 0.9, result.mistakes
    assert min(result.accuracy_of(kind) for kind in result.asked) >= 0.5, result.mistakes
    assert len(result.drafts.rates) == 3 and min(result.drafts.drafted) > 100
    assert min(result.drafts.rates) > 0.5, f"acceptance by depth {result.drafts.rates}"
    # Fit for golden prompts: bfloat16 engines differ from the oracle by some tenths.
    assert sorted(result.margins)[len(result.margins) // 10] > 2.0


def test_figures_of_a_checkpoint_are_plain_json(demo: Path) -> None:
    figures = json.loads(json.dumps(figures_of(demo, per_kind=1)))
    assert figures["parameters"] == count_parameters(load_spec(demo)) and figures["answers"] == 8
    assert figures["accuracy"] > 0.8 and len(figures["acceptance_by_depth"]) == 3
    assert figures["margin_smallest"] <= figures["margin_lowest_tenth"] <= figures["margin_median"]


def test_bfloat16_gives_the_same_answers(demo: Path) -> None:
    wide, encode, stop = open_demo(demo)
    narrow, _, _ = open_demo(demo, torch.bfloat16)
    prompts = [
        encode_chat([{"role": "user", "content": content}], encode)
        for content in ("Hello!", "Count from 3 to 9.", "Repeat: river stone apple", "What is the capital of France?")
    ]
    expected, found = (generate_greedy(model, prompts, 32, stop) for model in (wide, narrow))
    assert [g.tokens for g in found] == [g.tokens for g in expected]


def test_a_fact_survives_a_long_prompt(demo: Path) -> None:
    import random

    model, encode, stop = open_demo(demo)
    notes = "\n".join(note(random.Random(n)) for n in range(150))
    chat = [{"role": "system", "content": f"You are a helpful assistant.\n{notes}"}, *CHAT[1:]]
    prompt = encode_chat(chat, encode)
    assert 1200 < len(prompt) < model.spec.max_position_embeddings
    answer = generate_greedy(model, [prompt], 12, stop)[0]
    assert answer.tokens == encode("Your name is Ada.<|im_end|>")
