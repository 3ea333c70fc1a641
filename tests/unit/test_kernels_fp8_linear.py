"""The linear map in FP8: defined gradients, now or later, in every type, and what it holds."""

from __future__ import annotations

import copy

import pytest
import torch

from deepopt_kernels.fp8_format import (
    dequantise,
    product_reference,
    quantise_blocks,
    quantise_tiles,
)
from deepopt_kernels.fp8_linear import Fp8Linear, fp8_linear, to_fp8
from deepopt_kernels.weight_grad import WeightGradHolder, WeightGradQueue, defer_linears

TYPES = [torch.float32, torch.bfloat16]


def make(
    inputs: int = 200, outputs: int = 144, *, dtype: torch.dtype, bias: bool = True
) -> Fp8Linear:
    torch.manual_seed(1)
    return to_fp8(torch.nn.Linear(inputs, outputs, bias=bias).to(dtype))


def run(
    module: torch.nn.Linear, x: torch.Tensor, grad: torch.Tensor, *, late: bool = False
) -> list[torch.Tensor | None]:
    """Output, gradients of input, weight and bias."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = module(x)
    if late:
        holder = WeightGradHolder()
        defer_linears(module, holder)
        out = module(x)
        queue = WeightGradQueue(holder)
        with queue.capture():
            out.backward(grad)
        assert module.weight.grad is None
        queue.flush()
    else:
        out.backward(grad)
    return [
        out.detach(),
        x.grad,
        module.weight.grad,
        None if module.bias is None else module.bias.grad,
    ]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 24, 131, 260])
def test_the_three_products_are_those_of_the_quantised_values(
    dtype: torch.dtype, tokens: int
) -> None:
    module = make(dtype=dtype)
    x, grad = torch.randn(tokens, 200).to(dtype), torch.randn(tokens, 144).to(dtype)
    weight = module.weight.detach()
    out, grad_x, grad_weight, grad_bias = run(module, x, grad)
    forward = dequantise(quantise_tiles(x)) @ dequantise(quantise_blocks(weight)).t()
    assert out is not None
    torch.testing.assert_close(out, (forward + module.bias.detach()).to(dtype))
    backward = dequantise(quantise_tiles(grad)) @ dequantise(quantise_blocks(weight))
    torch.testing.assert_close(grad_x, backward.to(dtype))
    # Along the tokens: 131 and 260 are more than one tile.
    expected = product_reference(
        quantise_tiles(grad.t()), quantise_tiles(x.t()), out_dtype=dtype
    )
    torch.testing.assert_close(grad_weight, expected)
    torch.testing.assert_close(grad_bias, grad.sum(0))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_gradient_that_waits_has_the_bits_of_one_that_does_not(
    dtype: torch.dtype, bias: bool
) -> None:
    x, grad = torch.randn(2, 65, 200).to(dtype), torch.randn(2, 65, 144).to(dtype)
    now = run(make(dtype=dtype, bias=bias), x, grad)
    late = run(make(dtype=dtype, bias=bias), x, grad, late=True)
    for a, b in zip(now, late, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def test_bits_do_not_depend_on_layout_nor_on_what_the_batch_looked_like() -> None:
    module = make(dtype=torch.float32)
    x, grad = torch.randn(6, 25, 200), torch.randn(6, 25, 144)
    expected = run(module, x, grad)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.empty(6, 25, 144, 2)
    wide[..., 0] = grad
    for a, b in zip(expected, run(module, turned, wide[..., 0]), strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(module(x), expected[0])  # type: ignore[arg-type]
        assert module(x[0, 0]).shape == (144,)
        assert module(x[:0]).shape == (0, 25, 144)


@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_come_near_those_of_nn_linear(dtype: torch.dtype) -> None:
    module = make(256, 384, dtype=dtype)
    plain = torch.nn.Linear(256, 384).to(dtype)
    plain.load_state_dict(module.state_dict())
    x, grad = torch.randn(512, 256).to(dtype), torch.randn(512, 384).to(dtype)
    for found, exact in zip(run(module, x, grad), run(plain, x, grad), strict=True):
        assert found is not None
        assert exact is not None
        assert found.dtype == exact.dtype
        assert (found.float() - exact.float()).norm() <= 0.038 * exact.float().norm()


def test_a_frozen_weight_holds_nothing_and_passes_the_gradient_on() -> None:
    module = make(dtype=torch.float32).requires_grad_(False)
    x = torch.randn(30, 200, requires_grad=True)
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        out = module(x)
    assert held == []
    out.sum().backward()
    assert x.grad is not None
    assert module.weight.grad is None


def test_between_forward_and_backward_a_byte_a_value_is_held() -> None:
    module = make(256, 128, dtype=torch.bfloat16)
    x = torch.randn(512, 256).to(torch.bfloat16).requires_grad_()
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        module(x)
    assert sum(t.nbytes for t in held) == 512 * 256 * (1 + 4 / 128)


def test_nothing_of_the_module_changes_but_its_products() -> None:
    linear = torch.nn.Linear(128, 128)
    calls: list[object] = []
    linear.register_forward_hook(lambda *_: calls.append(None))
    names, weight = list(linear.state_dict()), linear.weight
    module = to_fp8(linear)
    assert module is linear
    assert module.weight is weight
    assert list(module.state_dict()) == names
    assert isinstance(copy.deepcopy(module), Fp8Linear)
    module(torch.randn(3, 128))
    assert len(calls) == 1


def test_autocast_decides_the_type_as_for_nn_linear() -> None:
    module, x = make(dtype=torch.float32), torch.randn(40, 200, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert module.weight.grad is not None
    assert module.weight.grad.dtype == torch.float32


def test_what_does_not_fit_is_refused_with_its_shapes() -> None:
    weight = torch.randn(16, 32)
    with pytest.raises(
        ValueError, match=r"\(4, 16\) does not fit a weight of shape \(16, 32\)"
    ):
        fp8_linear(torch.randn(4, 16), weight)
    with pytest.raises(ValueError, match=r"bfloat16 and the weight torch\.float32"):
        fp8_linear(torch.randn(4, 32).to(torch.bfloat16), weight)


# torch's compiler makes an object of the Function, which torch calls outdated.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_module_gives_the_same_bits() -> None:
    modules = torch.nn.Sequential(make(256, 128, dtype=torch.float32), torch.nn.ReLU())
    x = torch.randn(32, 256)
    plain = modules(x)
    plain.sum().backward()
    weight = modules[0].weight
    expected, weight.grad = weight.grad, None
    found = torch.compile(modules, backend="aot_eager", fullgraph=True)(x)
    found.sum().backward()
    assert torch.equal(found, plain)
    assert torch.equal(weight.grad, expected)
