"""The parts of `qwen3next bench` one by one: rows, clock, client, floors."""

import asyncio
from pathlib import Path

import pytest
import torch
from torch import nn

from qwen3next_plugin.bench.client import BenchError, Client
from qwen3next_plugin.bench.engines import EngineSetup, Limits, command_of, environment_of, told
from qwen3next_plugin.bench.floors import expected_experts, floor_of
from qwen3next_plugin.bench.measure import quantile
from qwen3next_plugin.bench.prompts import prompt_of
from qwen3next_plugin.bench.results import told_command
from qwen3next_plugin.bench.rows import ALL_ROWS, Row, Side, parse_rows, plan_visits
from qwen3next_plugin.bench.server import free_port
from qwen3next_plugin.bench.steps import Step, decode_times, expert_counts, read_steps
from qwen3next_plugin.config import parse_config
from qwen3next_plugin.demo.shapes import config_of
from qwen3next_plugin.kernels.gpus import gpu_slug
from qwen3next_plugin.recording import Recorder, recorder

MS = 1_000_000


def test_every_row_has_a_unit_and_results() -> None:
    rows = parse_rows("all")
    assert [row.name for row in rows] == list(ALL_ROWS)
    assert {row.kind: row.unit for row in rows} == {"decode": "ms", "prefill": "s", "start": "s", "traffic": "ms"}
    assert parse_rows("traffic-2.5")[0].result_names == tuple(
        f"traffic-2.5-{metric}" for metric in ("ttft-p50", "ttft-p99", "itl-p50", "itl-p99")
    )


def test_visits_follow_the_order_and_starts_come_first() -> None:
    visits = plan_visits(["vllm", "sglang"], "A-B-A", parse_rows("decode-b1,warm-start,cold-start"), evidence=True)
    names = [visit.name for visit in visits]
    assert names[:6] == [
        *("vllm-1-stock", "vllm-2-plugin", "vllm-3-stock", "vllm-4-plugin"),
        *("vllm-evidence-stock", "vllm-evidence-plugin"),
    ]
    assert [name.replace("sglang", "vllm") for name in names[6:]] == names[:6]
    assert [[row.name for row in visit.rows] for visit in visits[:5]] == [
        ["cold-start", "decode-b1"],
        ["cold-start", "decode-b1"],
        ["warm-start", "decode-b1"],
        ["warm-start"],
        ["decode-b1"],
    ]


def test_only_steps_with_exactly_the_batch_count() -> None:
    """Two prompts arrive one after the other, decode together for five steps, then one goes on alone."""
    steps = [Step(0, 1, 900, 900), Step(10 * MS, 2, 901, 900)]
    steps += [Step((12 + 2 * i) * MS, 2, 2, 1) for i in range(6)]
    steps += [Step((23 + i) * MS, 1, 1, 1) for i in range(5)]
    steps += [Step((100 + 7 * i) * MS, 2, 2, 1) for i in range(4)]  # another two, later
    assert decode_times(steps, 2) == [2.0] * 4 + [7.0] * 2, "the first gap of each run is left out"
    assert decode_times(steps, 1) == [1.0] * 3
    assert decode_times(steps, 3) == []


def test_recorded_steps_are_read_back(tmp_path: Path) -> None:
    record = Recorder(tmp_path / "record")
    record.step(3, 1024, 1022)
    record.step(3, 3, 1)
    steps = read_steps(tmp_path / "record")
    assert [(s.requests, s.tokens, s.most) for s in steps] == [(3, 1024, 1022), (3, 3, 1)]
    assert steps[0].time < steps[1].time
    assert read_steps(tmp_path / "record", begin=steps[1].time) == steps[1:]


def test_a_process_has_one_recorder_a_directory(tmp_path: Path) -> None:
    directory = tmp_path / "below" / "record"
    assert recorder({}) is None and not directory.parent.exists()
    first = recorder({"QWEN3NEXT_RECORD": str(directory)})
    assert first is not None and directory.is_dir()
    directory.rmdir()
    assert recorder({"QWEN3NEXT_RECORD": str(directory)}) is first
    assert not directory.exists(), "another was made"


class _Routed(nn.Module):
    """Two layers whose gates answer as vLLM's (a tuple) and as plain ones (a tensor)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.ModuleDict({"gate": _Gate(i == 0)})}) for i in range(2))
        self.mtp = nn.ModuleDict({"mlp": nn.ModuleDict({"gate": _Gate(False)})})


class _Gate(nn.Module):
    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, logits: torch.Tensor) -> object:
        return (logits, None) if self.pair else logits


def test_distinct_experts_are_counted_layer_by_layer(tmp_path: Path) -> None:
    model = _Routed()
    record = Recorder(tmp_path)
    record.watch_routers(model, top_k=2)
    alike = torch.tensor([[9.0, 8.0, 0.0, 0.0, 0.0]] * 3)
    apart = torch.tensor([[9.0, 8.0, 0, 0, 0], [0, 9.0, 8.0, 0, 0], [0, 0, 0, 9.0, 8.0]])
    for logits in (alike, apart):
        for layer in model.layers:
            layer["mlp"]["gate"](logits)  # type: ignore[index]
        model.mtp["mlp"]["gate"](logits)  # type: ignore[index]
    model.layers[0]["mlp"]["gate"](alike[:1])  # type: ignore[index]
    model.layers[1]["mlp"]["gate"](apart[:1])  # type: ignore[index]
    assert expert_counts(tmp_path, 3) == [(2 + 5) / 2] * 2
    assert expert_counts(tmp_path, 1) == [2.0, 2.0]
    assert expert_counts(tmp_path, 7) == []


def test_both_sides_get_the_same_command_and_one_variable_apart(tmp_path: Path) -> None:
    setup = EngineSetup("python", None, ("--more",), {"A_VARIABLE": "1"})
    for engine in ("vllm", "sglang"):
        sides = [Side(engine, plugin) for plugin in (False, True)]
        commands = [command_of(side, setup, tmp_path, Limits(2048, 8), 1234, eager=False) for side in sides]
        assert commands[0] == commands[1]
        assert commands[0][-1] == "--more"
        one, other = (environment_of(side, setup, tmp_path / "c", tmp_path / "r") for side in sides)
        assert {name for name in one if one[name] != other[name]} == {"QWEN3NEXT_PLUGIN"}
        # SGLang's own kernels that nvcc compiles at first use, or the second start of any side would be a warm one
        assert Path(one["SGLANG_JIT_CACHE_DIR"]).is_relative_to(tmp_path / "c")
        kept = told(commands[0], one, {str(tmp_path): "place"})
        assert str(tmp_path) not in str(kept)
        assert "1234" not in str(kept)


def test_a_shell_file_sets_an_engines_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "env.sh"
    file.write_text("export PYTHONPATH=/a:/b\nUNEXPORTED='two words'\n")
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
    variables = EngineSetup(environment_file=file).variables()
    assert variables["PYTHONPATH"] == "/a:/b"
    assert variables["UNEXPORTED"] == "two words"
    assert "QWEN3NEXT_KERNELS" not in variables, "a switch of the shell must not reach one side or the other unseen"


def _serve_once(body: bytes, status: str = "200 OK") -> Client:
    """A client of a server that gives one answer, in pieces."""
    port = free_port()
    client = Client(port, "m")
    original = client.stream

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for piece in body.split(b"|"):
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()

    async def stream(*args: object) -> object:
        async with await asyncio.start_server(handle, "127.0.0.1", port):
            return await original(*args)  # type: ignore[arg-type]

    client.stream = stream  # type: ignore[method-assign, assignment]
    return client


def test_the_client_times_every_token() -> None:
    client = _serve_once(b'data: {"a": 1}\n\n|data: {"a": 2}\n\n|data: {"a": 3}\n\n|data: [DONE]\n\n')
    answer = asyncio.run(client.stream([1, 2], 3))
    assert len(answer.chunks) == 3
    assert all(0.005 < gap < 1 for gap in answer.gaps)
    assert answer.first_token > 0


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"error": "too long"}\n', "400 Bad Request", "answered 400"),
        (b'data: {"error": {"message": "gone"}}\n\n', "200 OK", "broke off"),
        (b"data: [DONE]\n\n", "200 OK", "without tokens"),
    ],
)
def test_a_server_that_fails_is_a_sentence(body: bytes, status: str, says: str) -> None:
    with pytest.raises(BenchError, match=says):
        asyncio.run(_serve_once(body, status).stream([1], 1))


def test_floors_are_those_of_the_published_model() -> None:
    """Against figures worked out by hand for the 80B shapes in FP8 at 4.3 TB/s, with bf16 and float32 states."""
    spec = parse_config(config_of("80b", fp8=True))
    ceilings = {"copy_gb_s": 4300.0, "bf16_tflop_s": 700.0, "fp8_tflop_s": 1400.0}
    for batch, bf16, fp32 in ((1, 0.94, 0.94), (8, 3.4, 3.5), (32, 9.7, 10.3), (128, 20.1, 22.4), (256, 24.5, 29.0)):
        row = Row(f"decode-b{batch}", "decode", batch)
        for dtype, expected in (("torch.bfloat16", bf16), ("torch.float32", fp32)):
            facts = {"ssm_state_dtype": dtype, "conv_state_dtype": "torch.bfloat16", "kv_dtype": "torch.bfloat16"}
            floor = floor_of(row, spec, ceilings, facts, None, 64)
            assert floor is not None
            assert abs(floor / expected - 1) < 0.06, (batch, dtype, floor)
    floor = floor_of(Row("prefill-4096", "prefill", 4096), spec, ceilings, {}, None, 64)
    assert floor is not None
    assert 0.015 < floor < 0.025
    assert floor_of(Row("cold-start", "start"), spec, ceilings, {}, None, 64) is None
    assert abs(expected_experts(spec, 32) - 240) < 1


def test_small_helpers() -> None:
    assert [gpu_slug(name) for name in ("NVIDIA H200", "CPU x86_64", "NVIDIA GeForce RTX 4090")] == [
        *("h200", "cpu", "rtx-4090")
    ]
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert quantile([5.0], 0.99) == 5.0
    assert prompt_of(50, "a", 151936) == prompt_of(50, "a", 151936) != prompt_of(50, "b", 151936)
    assert max(prompt_of(500, "a", 320)) < 240
    told = told_command(["bench", "--state=/a/b/s.json", "x/y.json", "/c/d", "--rows", "moe-*"])
    assert told == "qwen3next bench --state=s.json x/y.json d --rows 'moe-*'"
