"""Calls of every op with arguments that nobody should pass: run as a program, so that a crash is a failed test.

``python -m tests.ops.fuzz_ops SEED COUNT`` draws COUNT calls. Each is an ordinary call with one to three arguments
changed: integers at the ends of their range, lists of other lengths, tensors of another shape, dtype, layout or device.
The native kernel, the reference and the fake kernel must agree on whether they refuse it, and on the result.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from delfast.ops import OPS
from tests import cases
from tests.ops.calls import sample_calls

INTEGERS = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 4, 5, 7, 8, 64, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1]
NAMES = ["", "abs", "square", "grad", "weight", "weighted_grad", "mean", "max", "sum", "topk_mean"]
REFUSALS = (ValueError, IndexError)
# properties that a kernel reads in a tensor; a fake kernel does not
OF_VALUES = ("bits past the last", "expected state", "expected columns in", "expected index #", "index out of range")


def changed_tensor(tensor: Tensor, draw: random.Random) -> Tensor:
    """The tensor with another shape, dtype, layout or device."""
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.to("meta"),
        lambda t: t.to("meta"),
        lambda t: t.double() if t.is_floating_point() else t.float(),
        lambda t: t.to(draw.choice([torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])),
        lambda t: t.flatten(),
        lambda t: t.unsqueeze(draw.randint(0, t.ndim)),
        lambda t: t[:0] if t.ndim else t,
        lambda t: t.reshape(-1)[:1].reshape(()) if t.numel() else t,
        lambda t: t.transpose(0, -1) if t.ndim > 1 else t,
        lambda t: cases._channels_last(t),
        lambda t: cases._sliced(t) if t.is_floating_point() else t,
        lambda t: t[..., :1].expand(t.shape) if t.ndim and t.numel() else t,
        lambda t: t.expand(draw.choice([0, 1, 2]), *t.shape),
        lambda t: torch.cat([t, t]) if t.ndim else t,
    ]
    return draw.choice(changes)(tensor)


def changed_value(value: Any, draw: random.Random) -> Any:
    if isinstance(value, Tensor):
        return changed_tensor(value, draw)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice(INTEGERS)
    if isinstance(value, float):
        return draw.choice([0.0, 0.25, 0.5, 0.99])
    if isinstance(value, str):
        return draw.choice(NAMES)
    if value is None:
        return draw.choice([None, torch.tensor(1.0), torch.tensor([1.0, 2.0]), torch.tensor(1.0, device="meta")])
    assert isinstance(value, list)
    how = draw.random()
    if how < 0.1:
        return value + value[:1]
    if how < 0.2:
        return value[:-1]
    if value and how < 0.3:
        return [changed_value(value[0], draw)] * len(value)
    place = draw.randrange(len(value)) if value else 0
    return [changed_value(v, draw) if i == place else v for i, v in enumerate(value)]


def consistent_geometry(draw: random.Random) -> tuple[Any, ...]:
    """Arguments of per_example_accumulate_ with huge numbers that often fit each other."""
    big = draw.choice([2, 1000, 2**29, 2**30 - 1, 2**30, 2**40, 2**61, 2**62])
    dims = draw.randint(1, 3)
    padding, dilation = draw.choice([(big, min(2 * big, 2**63 - 1)), (big, big), (0, big)])
    stride = draw.choice([1, 2, big])
    kernel = 2 if dilation == 2 * padding else 1
    dtype = draw.choice(cases.DTYPES)
    sums = torch.zeros(3, 2, *[kernel] * dims)
    inputs, output_grad = torch.randn(4, 2, *[1] * dims).to(dtype), torch.randn(4, 3, *[1] * dims).to(dtype)
    return sums, inputs, output_grad, [stride] * dims, [padding] * dims, [dilation] * dims, 1, "abs"


def drawn_call(calls: list[Any], draw: random.Random) -> tuple[str, list[Any], dict[str, Any]]:
    number = draw.randrange(len(calls))
    packet, args, kwargs = copy.deepcopy(calls[number])
    name, args = packet.default.name().removeprefix("delfast::"), [*args]
    if name == "per_example_accumulate_" and draw.random() < 0.3:
        args = [*consistent_geometry(draw)]
    for _ in range(draw.randint(0, 3)):
        place = draw.randrange(len(args) + len(kwargs))
        if place < len(args):
            args[place] = changed_value(args[place], draw)
        else:
            key = list(kwargs)[place - len(args)]
            kwargs[key] = changed_value(kwargs[key], draw)
    return name, args, kwargs


def outcome(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """(result and arguments afterwards, None), or (None, the error)."""
    try:
        return (function(*args, **kwargs), args), None
    except Exception as error:
        assert "\n" not in str(error) or not isinstance(error, REFUSALS), error
        return None, error


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def copied(value: Any, device: str | None = None) -> Any:
    """Tensors copied with their strides, an expanded one expanded."""

    def copy_of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if device is not None or leaf.is_meta:
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device or "meta")
        length = 1 + sum((s - 1) * stride for s, stride in zip(leaf.shape, leaf.stride(), strict=True))
        memory = torch.as_strided(leaf, [length if leaf.numel() else 0], [1]).clone()
        return memory.as_strided(leaf.shape, leaf.stride())

    return torch.utils._pytree.tree_map(copy_of, value)


def check(name: str, args: list[Any], kwargs: dict[str, Any]) -> str:
    """Run one call in all ways; return "right" or "refused"."""
    reference = {op.name: op for op in OPS}[name]
    devices = {leaf.device for leaf in tensors_in((args, kwargs))}
    native, native_error = outcome(getattr(torch.ops.delfast, name), *copied((args, kwargs)))
    if len(devices) > 1:
        assert isinstance(native_error, REFUSALS) or "NotImplemented" in type(native_error).__name__, native_error
        return "refused"

    def checked(*args: Any, **kwargs: Any) -> Any:
        reference.check(*args, **kwargs)
        return reference.reference(*args, **kwargs)

    if torch.device("meta") in devices:
        return "refused" if native_error else "right"
    expected, reference_error = outcome(checked, *copied((args, kwargs)))
    _, fake_error = outcome(getattr(torch.ops.delfast, name), *copied((args, kwargs), "meta"))
    if native_error is None:
        assert reference_error is None, f"only the reference refuses: {reference_error!r}"
        assert fake_error is None, f"only the fake kernel refuses: {fake_error!r}"
        for result, wanted in zip(tensors_in(native), tensors_in(expected), strict=True):
            assert result.dtype == wanted.dtype and result.shape == wanted.shape
            close = dict(rtol=0.05, atol=1e-3) if result.dtype in cases.DTYPES[1:] else dict(rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(result, wanted, equal_nan=True, **close)
        return "right"
    assert reference_error is not None, f"only the kernel refuses: {native_error!r}"
    if isinstance(native_error, REFUSALS):
        assert isinstance(reference_error, REFUSALS), (native_error, reference_error)
        if not any(text in str(native_error) for text in OF_VALUES):
            assert isinstance(fake_error, REFUSALS), (native_error, fake_error)
    return "refused"


def main(seed: int, count: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    calls = sample_calls()
    seen: dict[str, int] = {}
    for number in range(count):
        name, args, kwargs = drawn_call(calls, draw)
        try:
            result = check(name, args, kwargs)
        except AssertionError as error:
            shown = torch.utils._pytree.tree_map(
                lambda x: f"{x.dtype} {tuple(x.shape)} {x.stride()} {x.device}" if isinstance(x, Tensor) else x,
                (args, kwargs),
            )
            raise AssertionError(f"call {number}: {name}{shown}") from error
        seen[result] = seen.get(result, 0) + 1
    print(f"right {seen.get('right', 0)}, refused {seen.get('refused', 0)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
