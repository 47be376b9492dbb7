"""TEST AID: plain-torch stand-ins for ``sgl_kernel`` and ``torchvision``, with which SGLang serves Qwen3-Next on a CPU.

Nothing here is fast or general. See README.md for what stands in for what and why it cannot be installed beside the
real packages. Importing this module does nothing: `finder` runs at each start of Python, `plugin` in SGLang's
processes.
"""

DISTRIBUTION = "qwen3next-sglang-cpu-standins"
