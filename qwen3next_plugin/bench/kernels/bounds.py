"""What a machine's ceilings allow, and figures as files hold them."""

from typing import Any

BY_PEER = {"deepgemm-64": 64, "deepgemm-128": 128}
"""Ours with an engine's grouped product, and the height of its tiles."""
OWN = ("own", "plugin", "kernels", *BY_PEER)


def rounded(value: float) -> float:
    """Five digits."""
    return float(f"{value:.5g}")


def seconds_of(value: float, unit: str) -> float:
    """A value of a row in seconds."""
    return value * {"us": 1e-6, "ms": 1e-3}[unit]


def share_of_ceiling(row: dict[str, Any], value: float, ceilings: dict[str, Any]) -> tuple[float, str]:
    """Of a row's value: the shortest time that bytes over the copy bandwidth and products over the matrix throughput
    allow, over the time taken; and which of them it is, "bytes" or "products".
    """
    by_bytes = row["bytes"] / (ceilings["copy_gb_s"] * 1e9)
    by_products = row["flops"] / ((ceilings[f"{row['products']}_tflop_s"] or ceilings["bf16_tflop_s"]) * 1e12)
    bound, what = max((by_bytes, "bytes"), (by_products, "products"))
    return rounded(bound / seconds_of(value, row["unit"])), what


def fastest(peers: dict[str, dict[str, Any]], does: str) -> tuple[float | None, float | None]:
    """Of the peers that do this: the fastest of what engines run by themselves (their names), and of all."""
    values = {
        name: peer["value"]
        for name, peer in peers.items()
        if peer["value"] is not None and (peer.get("does") == "joined") == (does == "joined")
    }
    by_themselves = min((value for name, value in values.items() if "-" not in name), default=None)
    return by_themselves, min(values.values(), default=None)
