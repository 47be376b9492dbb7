"""Routing, the mixture of experts and the shared expert's gate in Triton."""

from .experts import fused_moe
from .route import add_shared_expert, route

__all__ = ["add_shared_expert", "fused_moe", "route"]
