"""The few OpenAI API calls that `make serve` makes itself, on the standard library."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from .errors import ServeError

# A proxy of the environment must not stand between this process and a server on the same machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Api:
    """A server's root ("http://127.0.0.1:8000") and its key, if it wants one."""

    root: str
    key: str | None = None

    def is_ready(self) -> bool:
        """True once /health answers 200."""
        try:
            with _OPENER.open(f"{self.root}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def model(self) -> str:
        """The name the server gives its model."""
        return str(self._call("/v1/models")["data"][0]["id"])

    def ask(self, model: str, question: str, max_tokens: int = 128) -> str:
        """One chat turn, greedy; raises ServeError if it is refused or the answer is empty."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        message = self._call("/v1/chat/completions", body)["choices"][0]["message"]
        answer = message.get("content") or message.get("reasoning") or message.get("reasoning_content") or ""
        if not answer.strip():
            raise ServeError("The server answered the question with nothing.")
        return str(answer).strip()

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data=data, headers=headers)
        try:
            with _OPENER.open(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as problem:
            said = " ".join(problem.read().decode(errors="replace").split())
            raise ServeError(f"The server refused {path} with {problem.code}: {said[:300]}") from None
        except OSError as problem:
            raise ServeError(f"The server did not answer {path}: {problem}.") from None
