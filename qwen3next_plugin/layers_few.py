"""What an engine's linear layers do with a few rows: our product instead of theirs, in one launch.

The engine builds the layers, loads and re-lays their weights, sums over ranks, and runs more rows itself. The place
where its layer asks its quantisation method for the product of this rank, `quant_method.apply`, is the same in both
engines. Where the weight is no longer [N, K] as loaded by then, or another layer stands in the place, nothing of ours
runs.

Compiled graphs serve all numbers of rows, so there the choice is made inside one opaque operation.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase

from .kernels import dispatch
from .kernels.gemm import few_matmul, few_matmul_of_norm, few_matmul_pair, fits_few, runs_few
from .kernels.norm import norm_of_sum
from .kernels.rope import sigmoid_gate
from .layers_base import ZeroCentredRMSNorm

_BY_NAME: "weakref.WeakValueDictionary[str, FewRows]" = weakref.WeakValueDictionary()


class LayerKey(OpaqueBase):
    """A name that compiled graphs take as an input, so that layers of one kind share one graph and its compilation."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerKey) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        """How torch writes the name into the code of a graph."""
        return f"LayerKey({self.name!r})", {"LayerKey": LayerKey}


register_opaque_type(LayerKey, typ="value", hoist=True)


class FewRows:
    """One of an engine's layers, or two that share their input, and how this rank's products come about.

    ``name`` is one of a kind in this process among the layers of compiled models; ``gated`` says whether x comes with a
    gate, ``normed`` whether it is a norm, and ``keeps`` whether that is wanted besides. Neither a module nor a holder
    of parameters of its own.
    """

    def __init__(
        self, name: str, *layers: nn.Module, gated: bool = False, normed: bool = False, keeps: bool = False
    ) -> None:
        self.layers = layers
        self.gated, self.normed, self.keeps = gated, normed, keeps
        self.name = name
        self._applies: list[Callable[..., torch.Tensor]] = []
        for layer in layers:
            method: Any = getattr(layer, "quant_method", None)
            if method is not None:
                self._applies.append(method.apply)
        _BY_NAME[name] = self

    @property
    def lent(self) -> bool:
        """Whether all layers are an engine's: those of this package have no such method."""
        return len(self._applies) == len(self.layers)

    def tensors(self) -> list[torch.Tensor]:
        """The layers' weights and factors as they are now, the first one's weight first."""
        return [tensor for layer in self.layers for tensor in _weight(layer) if tensor is not None]

    def runs(self, x: torch.Tensor, *present: nn.Module) -> bool:
        """Whether x may come here: Triton is what runs on its device, and the weights are as the product takes them.

        ``present`` are the layers in the model now; one that stands in another's place (LoRA) is called instead.
        """
        if not self.lent or dispatch.choose(x, None) != dispatch.TRITON:
            return False
        pairs = zip(self.layers, present, strict=True)
        return all(layer is now and fits_few(x, *_weight(layer)) for layer, now in pairs)

    def __call__(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> list[torch.Tensor]:
        """x [T, K], which has passed `runs`, behind a gate or not -> each layer's [T, N], not summed over ranks."""
        return self._product(x, gate)

    def of_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: ZeroCentredRMSNorm, *present: nn.Module
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Each layer's product of norm(x + residual), then, if it is kept, the norm itself; and the sum.

        x and residual [T, K]; ``present`` as in `runs`: where that says no, they are called with the norm. With one row
        all of it is one launch.
        """
        if not self.runs(x, *present):
            y, total = norm.add(x, residual)
            return [layer(y)[0] for layer in present] + [y] * self.keeps, total
        found = self._product(x, None, residual, norm.weight, norm.eps)
        products, left = found[: len(self.layers)], found[len(self.layers) :]
        return products + left[len(left) - self.keeps :], x if residual is None else left[0]

    def _product(
        self,
        x: torch.Tensor,
        gate: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        norm_weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> list[torch.Tensor]:
        call = (x, gate, residual, norm_weight, eps, *self._weights(), self.keeps)
        return dense(*call, LayerKey(self.name)) if torch.compiler.is_compiling() else _run(self, *call)

    def _weights(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        second = _weight(self.layers[1]) if len(self.layers) > 1 else (None, None)
        return *_weight(self.layers[0]), *second

    def by_engine(self, x: torch.Tensor, gate: torch.Tensor | None) -> list[torch.Tensor]:
        """The same by the engine's own products."""
        x = x if gate is None else sigmoid_gate(x, gate)
        return [apply(layer, x, None) for apply, layer in zip(self._applies, self.layers, strict=True)]


def few_rows_of(modules: Iterable[nn.Module]) -> list[FewRows]:
    """Those of an engine's layers that are all among ``modules``, by name."""
    there = set(map(id, modules))
    found = [few for _, few in sorted(_BY_NAME.items()) if all(id(layer) in there for layer in few.layers)]
    return [few for few in found if few.lent]


def _weight(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return layer.weight, getattr(layer, "weight_scale_inv", None)


def take_few_rows(name: str, layer: nn.Module) -> None:
    """Let ``layer``, one of the engine's, take few rows through our product; others, and biases, as before."""
    method: Any = getattr(layer, "quant_method", None)
    if method is None:
        return
    few, engines = FewRows(name, layer), method.apply

    def apply(asked: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if bias is None and few.runs(x, asked):
            return few(x)[0]
        return engines(asked, x, bias)

    method.apply = apply


def _run(
    few: FewRows,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    second: torch.Tensor | None,
    second_scale_inv: torch.Tensor | None,
    keep: bool,
) -> list[torch.Tensor]:
    if not runs_few(x.shape[0], weight):
        if norm_weight is None:
            return few.by_engine(x, gate)
        y, total = norm_of_sum(x, residual, norm_weight, eps)
        return few.by_engine(y, None) + [left for left, wanted in ((total, residual is not None), (y, keep)) if wanted]
    if norm_weight is not None:
        weights = (weight, scale_inv, second, second_scale_inv)
        return few_matmul_of_norm(x, residual, norm_weight, eps, *weights, keep=keep)
    if second is None:
        return [few_matmul(x, weight, scale_inv, gate)]
    return list(few_matmul_pair(x, weight, scale_inv, second, second_scale_inv))


def _dense_fake(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    second: torch.Tensor | None,
    second_scale_inv: torch.Tensor | None,
    keep: bool,
    key: LayerKey,
) -> list[torch.Tensor]:
    outs = [x.new_empty((x.shape[0], each.shape[0])) for each in (weight, second) if each is not None]
    return outs + [x.new_empty(x.shape) for wanted in (residual is not None, keep) if wanted]


@dispatch.custom_op(fake=_dense_fake)
def dense(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    second: torch.Tensor | None,
    second_scale_inv: torch.Tensor | None,
    keep: bool,
    key: LayerKey,
) -> list[torch.Tensor]:
    """The products of the `FewRows` of this name, whose weights these are, of x, x behind a gate, or a norm.

    With a residual its sum with x comes behind them, and what is kept of the norm comes last. RuntimeError if the
    weights are another's.
    """
    few = _BY_NAME.get(key.name)
    if few is None or _weight(few.layers[0])[0].data_ptr() != weight.data_ptr():
        raise RuntimeError(
            f"the compiled layer {key.name!r} is no longer the last of its name in this process: start one engine in it"
        )
    weights = (weight, scale_inv, second, second_scale_inv)
    return _run(few, x, gate, residual, norm_weight, eps, *weights, keep)
