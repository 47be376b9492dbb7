"""Stands in for an engine in tests of `qwen3next bench`: streams tokens over HTTP and records steps like a real one.

`python fake_engine.py -m vllm...` serves; what else a bench asks an engine's environment for, it makes up.
FAKE_STEP_MS is how long a step takes, with "/" between stock and plugin; FAKE_DIE=stock|plugin ends that side after its
first request.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from qwen3next_plugin.bench.ceilings import machine_id
from qwen3next_plugin.recording import Recorder

PLUGIN = os.environ.get("QWEN3NEXT_PLUGIN") == "1"
STEP = float(os.environ.get("FAKE_STEP_MS", "4/2").split("/")[PLUGIN]) / 1e3
EXPERTS = os.environ.get("FAKE_EXPERTS", "20/20").split("/")[PLUGIN]
DIES = os.environ.get("FAKE_DIE") == ("plugin" if PLUGIN else "stock")


class Engine:
    def __init__(self) -> None:
        directory = Path(os.environ["QWEN3NEXT_RECORD"])
        self.record = Recorder(directory)
        model = "qwen3next_plugin.model" if PLUGIN else "stock.model"
        types = dict.fromkeys(("dtype", "kv_dtype", "ssm_state_dtype", "conv_state_dtype"), "torch.bfloat16")
        self.record.facts(model_class=model, graph_mode="none", quantization=None, max_num_seqs=8, **types)
        self.waiting: list[tuple[int, int, asyncio.Queue[int]]] = []
        self.running: list[tuple[int, asyncio.Queue[int]]] = []
        self.experts = directory / "experts-1.txt"

    async def loop(self) -> None:
        while True:
            await asyncio.sleep(STEP)
            arrived, self.waiting = self.waiting, []
            tokens = sum(prompt for prompt, _, _ in arrived) + len(self.running)
            requests = [(left, queue) for _, left, queue in arrived] + self.running
            if not requests:
                continue
            self.record.step(len(requests), tokens, max([p for p, _, _ in arrived], default=1))
            if os.environ.get("QWEN3NEXT_RECORD_EXPERTS") == "1":
                with self.experts.open("a") as file:
                    print(tokens, EXPERTS, EXPERTS, file=file)
            for left, queue in requests:
                queue.put_nowait(left - 1)
            self.running = [(left - 1, queue) for left, queue in requests if left > 1]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path, length = (await reader.readline()).split()[1].decode(), 0
        while (line := (await reader.readline()).strip().lower()) != b"":
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        body = json.loads(await reader.readexactly(length) or b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        if "logprobs" in body:
            top = {f"token_id:{i}": -5.0 for i in range(20)}
            writer.write(json.dumps({"choices": [{"logprobs": {"top_logprobs": [top]}}]}).encode())
        elif path == "/v1/completions":
            queue: asyncio.Queue[int] = asyncio.Queue()
            self.waiting.append((len(body["prompt"]), body["max_tokens"], queue))
            left = body["max_tokens"]
            while left:
                left = await queue.get()
                writer.write(b'data: {"choices": [{"text": ""}]}\n\n')
                await writer.drain()
            writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()
        if path == "/v1/completions" and DIES:
            os._exit(7)


async def main(port: int) -> None:
    engine = Engine()
    async with await asyncio.start_server(engine.serve, "127.0.0.1", port, limit=1 << 22):
        await engine.loop()


if __name__ == "__main__":
    module, rest = sys.argv[2], sys.argv[3:]
    if module.endswith(".ceilings"):
        best = {"copy_gb_s": 1e4, "bf16_tflop_s": 1e3, "fp8_tflop_s": None}
        about = {
            "machine": machine_id(),
            "capability": None,
            "gpu": "CPU fake",
            "versions": {"torch": "0"},
            "ceilings": best,
        }
        print(json.dumps(about))
    elif module.endswith(".prebuild"):
        time.sleep(0.5)
        (Path(os.environ["XDG_CACHE_HOME"]).parent / "prebuilt").write_text(" ".join(rest))
    elif module.endswith(".oracle"):
        np.save(rest[1], np.random.default_rng(0).normal(size=(8, 320)))
    else:
        print("up", time.time())
        asyncio.run(main(int(rest[rest.index("--port") + 1])))
