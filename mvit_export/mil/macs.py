"""Multiply-accumulates of MIL ops, from shapes alone.

Only products of tensors count, which make up the compute of a vision network: convolution, linear, matrix product and
attention. Elementwise ops, norms and pooling count as 0, as is usual in papers and model zoos.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from mvit_export.mil.listing import Operand, Operation, Shape


class Unknown(Exception):
    """A size is unknown until the program runs."""


def count_macs(operation: Operation) -> int | None:
    """MACs of one run of the op; None if they depend on a flexible size, or shapes make no sense."""
    if operation.type not in MACS:
        return 0
    try:
        return MACS[operation.type](operation)
    except (Unknown, LookupError, ValueError):
        return None


def product(*sizes: int | None) -> int:
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        raise Unknown
    return math.prod(known)


def shape(operand: Operand | None) -> Shape:
    if operand is None:
        raise Unknown
    return operand.shape


def conv(operation: Operation) -> int:
    """weight (C_out, C_in / groups, *k): every output element needs C_in / groups * k."""
    return product(*operation.outputs[0].shape, *shape(operation.input("weight"))[1:])


def conv_transpose(operation: Operation) -> int:
    """weight (C_in, C_out / groups, *k): every input element needs C_out / groups * k, including cropped ones."""
    return product(*shape(operation.input("x")), *shape(operation.input("weight"))[1:])


def linear(operation: Operation) -> int:
    """weight (C_out, C_in)."""
    return product(*operation.outputs[0].shape, shape(operation.input("weight"))[-1])


def matmul(operation: Operation) -> int:
    x = shape(operation.input("x"))
    inner = x[-2] if operation.constant("transpose_x", False) and len(x) > 1 else x[-1]
    return product(*operation.outputs[0].shape, inner)


def einsum(operation: Operation) -> int:
    """The product of the sizes of all distinct letters."""
    terms = operation.constant("equation", "").split("->")[0].replace(" ", "").split(",")
    operands = operation.inputs.get("values", ())
    if "..." in "".join(terms) or len(terms) != len(operands):
        raise Unknown
    sizes = {
        letter: n for term, x in zip(terms, operands, strict=True) for letter, n in zip(term, x.shape, strict=True)
    }
    return product(*sizes.values())


def scaled_dot_product_attention(operation: Operation) -> int:
    """query (*, L, E), key (*, S, E), value (*, S, V): L * S * (E + V)."""
    query, key, value = (shape(operation.input(name)) for name in ("query", "key", "value"))
    return product(*query[:-1], key[-2]) * product(product(query[-1]) + product(value[-1]))


MACS: Mapping[str, Callable[[Operation], int]] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "einsum": einsum,
    "linear": linear,
    "matmul": matmul,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
