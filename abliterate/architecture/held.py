"""What a model's code is made to compute so that gradients of its residual stream show what writes to it.

With c random, h the stream and r a direction, the gradient of `sum c <r, h>` by a weight W that writes linearly is
u xᵀ, where u is what r becomes on its way back from the stream to W: r itself, or g * r behind a norm with the gain g.
Two things would hide that, and are held constant here (the values of the forward pass stay what they are):

- a factor that scales a token's whole vector and depends on it: a norm's denominator, a router's weight, a gate;
- the input of a weight that contracts the stream's axis, such as a projection to queries: it reads the stream.

This goes by shapes, and relies on no other dimension being the stream's width, which a tiny twin can be built to obey.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = frozenset(("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"))
_QUOTIENTS = frozenset(("div", "__truediv__", "div_", "__itruediv__", "divide", "true_divide"))
_MATMULS = frozenset(("matmul", "__matmul__", "mm", "bmm", "_grouped_mm", "grouped_mm"))
_SUMMED_MATMULS = frozenset(("addmm", "baddbmm", "addbmm"))
_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST_FACTOR = 64


class HeldConstant(TorchFunctionMode):
    """While active, gradients flow along the stream's axis only, and through nothing that depends on the tokens.

    Args:
        width: of the stream.
        names: of the tensors that gradients are taken by, by id.
        widen: compute in fp64 also where the model's code asks for less, as in `.float()`.
        attach: let gradients flow through what the model detaches or runs under `torch.no_grad`.

    Attributes:
        scales: names of the tensors that were seen to multiply activations channel by channel: gains of norms and of
            skip paths, and depthwise convolutions.
    """

    def __init__(self, width: int, names: Mapping[int, str], widen: bool, attach: bool) -> None:
        super().__init__()
        self.scales: set[str] = set()
        self._width, self._names = width, names
        self._widen, self._attach = widen, attach
        self._norms: dict[str, Callable[..., Tensor]] = {
            "layer_norm": self._layer_norm,
            "rms_norm": self._rms_norm,
            "normalize": _normalize,
        }

    @contextmanager
    def active(self) -> Iterator[None]:
        """What runs inside is held; new tensors are of fp64 where it widens and no dtype is asked for."""
        default = torch.get_default_dtype()
        if self._widen:
            torch.set_default_dtype(torch.float64)
        try:
            with self:
                yield
        finally:
            torch.set_default_dtype(default)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs `func` on arguments that are detached where the class says so."""
        name, named = getattr(func, "__name__", ""), dict(kwargs or {})
        if self._attach and name in ("_set_grad_enabled", "detach"):
            return args[0] if name == "detach" else None
        if self._widen:
            if name in ("float", "half", "bfloat16") and isinstance(args[0], Tensor):
                return args[0].double()
            args, named = [_widened(a) for a in args], {key: _widened(value) for key, value in named.items()}
        if name in self._norms:
            return self._norms[name](*args, **named)
        result = func(*self._operands(name, list(args), named), **named)
        return result.detach() if name == "sigmoid" and not self._made_of(result) else result

    def _operands(self, name: str, args: list[Any], named: dict[str, Any]) -> list[Any]:
        """The positional arguments, detached where gradients must not flow; the named ones are changed in place."""
        if name in _PRODUCTS or name in _QUOTIENTS:
            return self._product(args)
        if name in _MATMULS and len(args) > 1:
            return [*self._matmul(args[0], args[1]), *args[2:]]
        if name in _SUMMED_MATMULS and len(args) > 2:
            return [args[0], *self._matmul(args[1], args[2]), *args[3:]]
        if name == "linear":
            return _detach_first(args, named)
        if name == "einsum" and isinstance(args[0], str):
            return self._einsum(args[0], args[1:])
        if name in ("conv1d", "conv2d"):
            return self._convolution(args, named)
        if name == "scaled_dot_product_attention" and len(args) > 2:
            return [args[0].detach(), args[1].detach(), *args[2:]]
        return args

    def _product(self, args: list[Any]) -> list[Any]:
        if len(args) < 2 or not (isinstance(args[0], Tensor) and isinstance(args[1], Tensor)):
            return args
        pair = [self._factor(args[0], args[1]), self._factor(args[1], args[0])]
        return pair + args[2:]

    def _factor(self, x: Tensor, other: Tensor) -> Tensor:
        """x as a factor of `other`: held constant where it scales whole vectors, noted where it scales channels."""
        if self._scales_vectors(x, other):
            return x.detach()
        if x.shape[-1:] == other.shape[-1:] and x.numel() < other.numel():
            self._note(x)
        return x

    def _scales_vectors(self, x: Tensor, other: Tensor) -> bool:
        if x.dim() == 0 or other.dim() == 0:
            return x.dim() < other.dim()
        if self._width in x.shape:
            return False
        return self._width in other.shape or (x.shape[-1] == 1 and other.shape[-1] > 1)

    def _matmul(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Only the operand that carries the result's stream axis keeps its gradient."""
        if y.dim() > 1 and y.shape[-1] == self._width:
            return x.detach(), y
        if x.dim() > 1 and x.shape[-2] == self._width:
            return x, y.detach()
        return x.detach(), y.detach()

    def _einsum(self, equation: str, args: Sequence[Any]) -> list[Any]:
        parts = list(args[0]) if isinstance(args[0], list | tuple) else list(args)
        left, arrow, right = equation.replace(" ", "").partition("->")
        terms = left.split(",")
        right = right if arrow else "".join(letter for letter in left if left.count(letter) == 1)
        kept = {
            letter
            for term, part in zip(terms, parts, strict=True)
            for letter, size in zip(reversed(term), reversed(part.shape), strict=False)
            if size == self._width and letter in right
        }
        return [equation, *(p if kept & set(t) else p.detach() for t, p in zip(terms, parts, strict=True))]

    def _convolution(self, args: list[Any], named: dict[str, Any]) -> list[Any]:
        weight = args[1] if len(args) > 1 else named["weight"]
        if weight.shape[1] > 1:
            return _detach_first(args, named)
        self._note(weight)
        return args

    def _note(self, factor: Tensor) -> None:
        self.scales.update(self._made_of(factor))

    def _made_of(self, tensor: Tensor) -> list[str]:
        """Names of the tensors that this one is made of, element by element, if it is made of nothing else."""
        leaves = [leaf for leaf in _leaves(tensor) if leaf.numel() > 1]
        named = all(id(leaf) in self._names and leaf.numel() == tensor.numel() for leaf in leaves)
        return [self._names[id(leaf)] for leaf in leaves] if named else []

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        axes = tuple(range(-len(normalized_shape), 0))
        y = self._rms_norm(input - input.mean(axes, keepdim=True), normalized_shape, weight, eps)
        return y if bias is None else y + bias

    def _rms_norm(
        self, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        axes = tuple(range(-len(normalized_shape), 0))
        eps = torch.finfo(input.dtype).eps if eps is None else eps
        y: Tensor = input * (input.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
        if weight is None:
            return y
        self._note(weight)
        return y * weight


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Tensor:
    scale: Tensor = torch.linalg.vector_norm(input.detach(), p, dim, keepdim=True).clamp_min(eps)
    return input / scale


def _detach_first(args: list[Any], named: dict[str, Any]) -> list[Any]:
    if args:
        return [args[0].detach(), *args[1:]]
    named["input"] = named["input"].detach()
    return args


def _widened(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _NARROW else argument


def _leaves(tensor: Tensor) -> list[Any]:
    """The leaves of a tensor's graph; none where that is long, as an activation's is."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    nodes: list[Any] = [tensor.grad_fn]
    for node in nodes:
        if len(nodes) > _LONGEST_FACTOR:
            return []
        nodes.extend(n for n, _ in node.next_functions if n is not None)
    return [node.variable for node in nodes if hasattr(node, "variable")]
