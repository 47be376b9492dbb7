"""`python3.11 -m qwen3next_plugin.serve [environment]`: what `make serve` and `make environment` run.

Reads MODEL, PORT, ARGS, ONCE, ENGINE and the other variables of `settings.NAMES`; exit code 0 only if all of it worked.
"""

import hashlib
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from .api import Api
from .engine_process import activation_line, wait_until_ready
from .environment import Environment
from .errors import ServeError
from .launch import command, defaults, variables
from .machine import choose_device
from .processes import running, stop_on_termination
from .progress import Progress
from .settings import Settings, read_engine

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What is the capital of France?"

GO_ON = """
It stays up. From another terminal:
  curl {root}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "{question}"}}]}}'
or in Python (pip install openai):
  from openai import OpenAI
  client = OpenAI(base_url="{root}/v1", api_key="none")
  chat = client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "{question}"}}])
  print(chat.choices[0].message.content)
Log: {log}
Stop it with Ctrl-C."""


def prepared_python(device: str) -> Path:
    """The interpreter of the engine's environment, which is made here if need be."""
    if own := os.environ.get("USE_ENV"):
        python = Path(own).expanduser().absolute() / "bin" / "python"
        if not python.exists():
            raise ServeError(f"USE_ENV={own} is not an environment: there is no {python}.")
        return python
    engine = read_engine()
    path = Path(os.environ.get("VENV") or ROOT / ".venv" / engine.name).expanduser().absolute()
    environment = Environment(path, ROOT, engine, device)
    environment.prepare()
    return environment.python


def demo_checkpoint(python: Path) -> Path:
    """The demo checkpoint, written by this project's command unless the one there is of the same making."""
    folder, log = ROOT / ".venv" / "demo", ROOT / ".venv" / "demo.log"
    sources = sorted(path for path in (ROOT / "qwen3next_plugin" / "demo").rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in sources:
        if "__pycache__" not in path.parts:
            digest.update(path.read_bytes())
    mark = folder.with_name("demo.made-from")
    if mark.is_file() and mark.read_text() == digest.hexdigest() and (folder / "config.json").is_file():
        return folder
    mark.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    with Progress("Writing the demo checkpoint") as step:
        log.unlink(missing_ok=True)
        with running([python.parent / "qwen3next", "demo-checkpoint", folder], log) as process:
            while process.poll() is None:
                step.update(str(folder), counts=True)
                time.sleep(0.1)
        if process.returncode != 0:
            raise ServeError(f"The demo checkpoint could not be written to {folder}.", log)
    mark.write_text(digest.hexdigest())
    return folder


def serve(settings: Settings, python: Path, device: str) -> None:
    """Start the engine, wait, ask, print; then stay until Ctrl-C, unless ONCE=1."""
    started = command(settings, python, device, settings.model or str(demo_checkpoint(python)))
    log = ROOT / ".venv" / f"serve-{settings.port}.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text(f"$ {shlex.join(map(str, started))}\n")
    start = log.stat().st_size
    api = Api(f"http://{settings.host}:{settings.port}", settings.api_key)
    stock = os.environ.get("QWEN3NEXT_PLUGIN") == "0"
    env = variables(settings, python, device, os.environ)
    shown = [f"{name}={env[name]}" for name in defaults(settings, device)]
    print("$", shlex.join([*shown, Path(started[0]).name, *map(str, started[1:])]), flush=True)
    with running(started, log, env) as process:
        wait_until_ready(process, log, start, api, settings.timeout)
        line = activation_line(log, start)
        if line is None and not stock:
            raise ServeError("The engine is up, but the plugin is not active: is it a Qwen3-Next?", log)
        print("QWEN3NEXT_PLUGIN=0: this is the stock engine, without the plugin." if stock else line, flush=True)
        name = api.model()
        question = settings.question or QUESTION
        print(f"\nQuestion: {question}", flush=True)
        print(f"Answer:   {api.ask(name, question)}", flush=True)
        if settings.once:
            print("\nONCE=1: stopping the server.", flush=True)
            return
        try:
            print(GO_ON.format(root=api.root, model=name, question=question.replace("'", "’"), log=log), flush=True)
            code = process.wait()
        except KeyboardInterrupt:
            print("\nStopping the server.", flush=True)
            return
        raise ServeError(f"The engine ended by itself with exit code {code}.", log)


def main(arguments: list[str]) -> int:
    """Run one of the two; a failed step is one sentence, the end of its log, and exit code 1."""
    stop_on_termination()
    try:
        device = choose_device()
        if arguments == ["environment"]:
            print(prepared_python(device) if os.environ.get("USE_ENV") else f"Ready: {prepared_python(device)}")
            return 0
        settings = Settings.read()
        serve(settings, prepared_python(device), device)
    except ServeError as problem:
        if problem.last_lines:
            print("\n    ".join([f"\nThe end of {problem.log}:", *problem.last_lines]), file=sys.stderr)
        print(f"\nFAILED: {problem}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
