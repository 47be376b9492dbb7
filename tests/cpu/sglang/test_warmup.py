"""SGLang's runners compile before they capture, without touching a state."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qwen3next_plugin import warmup_gdn as core
from qwen3next_plugin.kernels import compilations, dispatch
from qwen3next_plugin.layers import GdnParts
from qwen3next_plugin.sglang_integration import warmup
from qwen3next_plugin.sglang_integration.gdn_layer import Qwen3NextGdnLayer
from tests.cpu.core.parallel import layers
from tests.cpu.sglang.gdn_pool import Harness, publish
from tests.cpu.sglang.gdn_sequences import K_HEADS, KEY_DIM, LINEAR_LAYERS, V_HEADS, VALUE_DIM, WIDTH


@pytest.fixture(autouse=True)
def _kernels_run() -> Iterator[None]:
    publish()
    dispatch.prefer(dispatch.TRITON)
    yield
    dispatch.prefer(None)
    compilations.serve(None)


class Model(nn.Module):
    """The harness's linear layers, or, for a drafter, none."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        key, value = K_HEADS * KEY_DIM, V_HEADS * VALUE_DIM
        gdn = SimpleNamespace(
            num_k_heads=K_HEADS, num_v_heads=V_HEADS, head_v_dim=VALUE_DIM, conv_dim=2 * key + value, key_dim=key,
            value_dim=value, conv_kernel_size=WIDTH,
        )  # fmt: skip
        self.spec = SimpleNamespace(gdn=gdn, hidden_size=16, rms_norm_eps=1e-6, moe=SimpleNamespace(top_k=2))
        self.head = nn.Linear(1, 1)
        self.layers = nn.ModuleList()
        for layer_id in LINEAR_LAYERS if recurrent else ():
            layer = Qwen3NextGdnLayer.__new__(Qwen3NextGdnLayer)
            spec: Any = self.spec
            GdnParts.__init__(layer, spec, layers(0, 1), f"model.layers.{layer_id}.linear_attn")
            layer.attn = SimpleNamespace(layer_id=layer_id)
            self.layers.append(layer)


def runner_of(harness: Harness, recurrent: bool = True) -> Any:
    return SimpleNamespace(
        model=Model(recurrent),
        model_config=SimpleNamespace(dtype=torch.float32, hf_config=SimpleNamespace(model_type="qwen3_next")),
        req_to_token_pool=harness.pool,
        server_args=SimpleNamespace(chunked_prefill_size=-1, max_prefill_tokens=64),
    )


@pytest.mark.parametrize("num_drafts", [0, 4])
def test_every_kind_of_step_is_warm_before_capture(num_drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(num_drafts=num_drafts)
    runner, commits = runner_of(harness), []
    events: list[str] = []
    gdn_step, gdn_commit = core.gdn_step, warmup.gdn_commit

    def stepped(qkvz: torch.Tensor, *args: Any, **rows: Any) -> None:
        ((name, held),) = rows.items()
        held = held[0] if name == "drafts" else held
        kept = getattr(held, "snapshot_slots", None) is not None
        event = f"{name} {held.max_query_len if name == 'drafts' else kept}"
        if events[-1:] != [event]:  # each comes with several numbers of tokens and tiles
            events.append(event)
        gdn_step(qkvz, *args, **rows)

    def committed(*args: Any, **options: Any) -> None:
        commits.append((options["last_tokens"].dtype, "snapshot_slots" in options))
        gdn_commit(*args, **options)

    monkeypatch.setattr(core, "gdn_step", stepped)
    monkeypatch.setattr(warmup, "gdn_commit", committed)
    before = [state.clone() for state in harness._states()]

    def capture(held: Any, **options: Any) -> None:
        assert held is runner and options == {"capture_decode_cuda_graph": False} and compilations._warn is None
        events.append("captured")

    warmup.init_cuda_graphs(capture, runner, capture_decode_cuda_graph=False)
    expected = ["prefill False", "recurrent False", "prefill True", "recurrent True"]
    if num_drafts:
        expected += [f"drafts {length}" for length in (1, 2, 4, 5)]
    assert events == [*expected, "captured"]
    assert set(commits) == (
        {(dtype, kept) for dtype in (torch.int32, torch.int64) for kept in (False, True)} if num_drafts else set()
    )
    assert compilations._warn is not None
    for state, then in zip(harness._states(), before, strict=True):
        assert torch.equal(state, then) or bool(state.isnan().all() and then.isnan().all())


def test_a_drafter_commits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "gdn_commit", None)
    assert warmup.warm(runner_of(Harness(num_drafts=2), recurrent=False)).layers == 0


def test_other_models_and_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "warm", None)
    runner, called = runner_of(Harness()), []
    monkeypatch.setenv("QWEN3NEXT_WARMUP", "0")
    warmup.init_cuda_graphs(lambda *args: called.append(args), runner, True)
    monkeypatch.delenv("QWEN3NEXT_WARMUP")
    runner.model_config.hf_config.model_type = "qwen3_5"
    warmup.init_cuda_graphs(lambda *args: called.append(args), runner, True)
    assert called == [(runner, True), (runner, True)]
    assert compilations._warn is None
