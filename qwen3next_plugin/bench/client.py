"""A streaming client of the engines' OpenAI API on asyncio alone: cheap, so that it is not what gets measured."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3next_plugin.errors import PluginError


class BenchError(PluginError):
    """A measurement could not be made; the sentence says why."""


@dataclass
class Answer:
    """Times of one streamed completion, in seconds of `time.perf_counter`."""

    sent: float
    chunks: list[float] = field(default_factory=list)
    text: str = ""

    @property
    def first_token(self) -> float:
        """Seconds from sending to the first token."""
        return self.chunks[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one chunk and the next."""
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]


class Client:
    """Talks to one engine on the loopback interface."""

    def __init__(self, port: int, model: str, seconds: float = 600.0) -> None:
        self.port, self.model, self.seconds = port, model, seconds

    async def stream(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        """Completes token ids greedily, ``max_tokens`` long whatever comes. Raises BenchError if the server fails."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        payload = json.dumps(body).encode()
        reader, writer = await self._connect(1 << 20)
        answer = Answer(time.perf_counter())
        try:
            writer.write(_head("POST", "/v1/completions", len(payload)) + payload)
            await writer.drain()
            status = await _status(reader)
            async with asyncio.timeout(self.seconds):
                async for line in _lines(reader):
                    if status != 200:
                        raise BenchError(f"The server answered {status}: {line[:300]!r}")
                    if line.startswith(b"data: [DONE]"):
                        break
                    if line.startswith(b"data: "):
                        if b'"error"' in line[:20]:
                            raise BenchError(f"The server broke off: {line[:300]!r}")
                        answer.chunks.append(time.perf_counter())
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            raise BenchError(f"The server went away during a request ({type(error).__name__}); see its log.") from error
        finally:
            writer.close()
        if not answer.chunks:
            raise BenchError("The server sent an answer without tokens; see its log.")
        return answer

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A whole JSON answer. Raises BenchError if it is none."""
        payload = json.dumps(body).encode()
        return await self._whole("POST", path, payload)

    async def ready(self) -> bool:
        """Whether /health answers with 200."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            writer.write(_head("GET", "/health", 0))
            return await asyncio.wait_for(_status(reader), 10.0) == 200
        except (OSError, TimeoutError, asyncio.IncompleteReadError, BenchError):
            return False
        finally:
            writer.close()

    async def _connect(self, limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        except OSError as error:
            raise BenchError(f"The server on port {self.port} is gone ({error}); see its log.") from error

    async def _whole(self, method: str, path: str, payload: bytes) -> dict[str, Any]:
        reader, writer = await self._connect(1 << 26)
        try:
            writer.write(_head(method, path, len(payload)) + payload)
            await writer.drain()
            status, length, chunked = await _headers(reader)
            data = await reader.read() if chunked or length is None else await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise BenchError(f"The server went away during {path} ({type(error).__name__}); see its log.") from error
        finally:
            writer.close()
        text = data[data.find(b"{") : data.rfind(b"}") + 1]
        if status != 200 or not text:
            raise BenchError(f"{path}: the server answered {status}: {data[:300]!r}")
        return dict(json.loads(text))


def _head(method: str, path: str, length: int) -> bytes:
    lines = (f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {length}", "", "")).encode()


async def _status(reader: asyncio.StreamReader) -> int:
    return (await _headers(reader))[0]


async def _headers(reader: asyncio.StreamReader) -> tuple[int, int | None, bool]:
    """Status, Content-Length and whether the body is chunked."""
    words = (await reader.readline()).split()
    if len(words) < 2 or not words[1].isdigit():
        raise BenchError("The server's answer was no HTTP.")
    length, chunked = None, False
    while (line := (await reader.readline()).strip().lower()) != b"":
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
        chunked |= line.startswith(b"transfer-encoding:") and b"chunked" in line
    return int(words[1]), length, chunked


async def _lines(reader: asyncio.StreamReader) -> Any:
    """Lines of a body; those that only give a chunk's size are among them and start with no field name."""
    while line := await reader.readline():
        yield line.strip()
