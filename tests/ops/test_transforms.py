"""Exports and derivatives of every kind see PyTorch's operators where an op is called."""

import warnings
from collections.abc import Callable

import pytest
import torch
from helpers.models import compressed, dense_model
from helpers.op_cases import plain_attention, plain_dense, plain_gated, plain_linear, plain_mlp
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

import adacomcat
from adacomcat import UserError, ops
from adacomcat.ops import backends, decompositions, inference

BATCH, TOKENS, WIDTH, HEADS = 2, 5, 12, 3


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) / 2


# Op → (the op, the same in PyTorch's operators, the arguments behind x).
def calls() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple]]:
    mlp = (draw(WIDTH, 4), draw(16, 4), draw(16), draw(16, 3), draw(WIDTH, 3), draw(WIDTH), "gelu")
    attention = (draw(HEADS * 2, WIDTH), draw(HEADS * 2), draw(HEADS * 2, WIDTH),
                 draw(HEADS * 4, WIDTH), draw(WIDTH, HEADS * 4), draw(WIDTH), HEADS, 0.3)
    return {
        "low_rank_linear": (ops.low_rank_linear, plain_linear,
                            (draw(WIDTH, 4), draw(9, 4), draw(9), "silu")),
        "gated_low_rank_linear": (ops.gated_low_rank_linear, plain_gated,
                                  (draw(WIDTH, 4), draw(4), draw(9, 4), draw(9))),
        "low_rank_mlp": (ops.low_rank_mlp, plain_mlp, mlp),
        "dense_mlp": (ops.dense_mlp, plain_dense,
                      (draw(16, WIDTH), draw(16), draw(WIDTH, 16), draw(WIDTH), "gelu_tanh")),
        "low_rank_attention": (ops.low_rank_attention, plain_attention, attention),
        "linear": (inference.linear, torch.nn.functional.linear, (draw(9, WIDTH), draw(9))),
    }


@pytest.fixture(params=calls())
def pair(request: pytest.FixtureRequest) -> tuple[Callable, Callable]:
    """An op and its plain form, as functions of x."""
    op, plain, others = calls()[request.param]
    return lambda x: op(x, *others), lambda x: plain(x, *others)


def close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_forward_mode(pair):
    op, plain = pair
    x, direction = draw(BATCH, TOKENS, WIDTH), draw(BATCH, TOKENS, WIDTH)
    found, expected = jvp(op, (x,), (direction,)), jvp(plain, (x,), (direction,))
    assert expected[1].abs().max() > 1e-2
    close(found, expected)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(op(forward_ad.make_dual(x, direction))).tangent
    close(tangent, expected[1])


def test_the_operator_itself_refuses_forward_mode():
    """Its derivative would be zero, silently."""
    x, v, u = draw(4, 6), draw(6, 3), draw(5, 3)
    function = torch.ops.adacomcat.low_rank_linear
    with forward_ad.dual_level():
        function(x, v, u, None, None, None, False)
        with pytest.raises(UserError, match="has no forward-mode derivative"):
            function(forward_ad.make_dual(x, x), v, u, None, None, None, False)


def test_forward_mode_of_parameters():
    layer = adacomcat.LowRankLinear(6, 5, 3)
    x, direction = torch.randn(4, 6), torch.randn(6, 3)
    _, found = jvp(lambda v: torch.func.functional_call(layer, {"v": v}, (x,)),
                   (layer.v.detach(),), (direction,))
    torch.testing.assert_close(found, x @ direction @ layer.u.T.detach())


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_forward_mode_on_every_backend(name):
    if backends.available()[name] is not None:
        pytest.skip(str(backends.available()[name]))
    layer, x, direction = adacomcat.LowRankLinear(6, 5, 3), torch.randn(4, 6), torch.randn(4, 6)
    with backends.use_backend(name):
        _, found = jvp(layer, (x,), (direction,))
    torch.testing.assert_close(found, direction @ layer.weight.T)


def test_reverse_mode_in_functorch(pair):
    op, plain = pair
    x = draw(BATCH, TOKENS, WIDTH)
    close(jacrev(op)(x), jacrev(plain)(x))
    each = [vmap(grad(lambda image, f=f: f(image[None]).square().sum()))(x) for f in (op, plain)]
    close(*each)


def test_hessian_of_an_mlp():
    weights = calls()["low_rank_mlp"][2]
    x = draw(1, WIDTH)
    found, expected = (torch.func.hessian(lambda x, f=f: f(x, *weights).square().sum())(x)
                       for f in (ops.low_rank_mlp, plain_mlp))
    close(found, expected)


@pytest.mark.parametrize("function", [
    decompositions.singular_values,
    lambda a: decompositions.gram(a),
    lambda a: decompositions.eigenvalues(a.mT @ a),
    lambda a: decompositions.batched_svd(a, 2)[0],
    lambda a: decompositions.low_rank_approximation(a, 2)[2],
    lambda a: decompositions.factored_svd(a, a[..., :4, :] + 1)[1],
    lambda a: decompositions.truncation_errors(torch.linalg.svdvals(a)),
], ids=["singular_values", "gram", "eigenvalues", "batched_svd", "low_rank_approximation",
        "factored_svd", "truncation_errors"])
def test_forward_mode_of_decompositions(function):
    """Against central differences."""
    a, direction = draw(2, 7, 4), draw(2, 7, 4)
    _, found = jvp(function, (a,), (direction,))
    step = 1e-5
    expected = (function(a + step * direction) - function(a - step * direction)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_per_sample_gradients_of_a_model():
    model = compressed().double()
    images, parameters = draw(3, 3, 32, 32), dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's attention has no rule for a batch of its own
        found = vmap(grad(loss), (None, 0))(parameters, images)
    for index, image in enumerate(images):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(found[name][index], parameter.grad, rtol=1e-6, atol=1e-8)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target).partition(".")[0] for node in program.graph.nodes
            if node.op == "call_function"}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("optimized", [False, True])
def test_exports_know_pytorchs_operators_only(strict, optimized):
    model = compressed()
    model = adacomcat.optimize(model) if optimized else model.requires_grad_(False)
    images = torch.randn(2, 3, 32, 32)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=strict)
        assert "adacomcat" not in operators(program)
        for count in (1, 2, 5):
            images = torch.randn(count, 3, 32, 32)
            torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4,
                                       atol=1e-5)


@pytest.mark.parametrize("optimized", [False, True])
def test_traces_of_torchscript_know_pytorchs_operators_only(optimized):
    model, images = compressed().requires_grad_(False), torch.randn(2, 3, 32, 32)
    model = adacomcat.optimize(model) if optimized else model
    traced = torch.jit.trace(model, images)
    assert "adacomcat::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)


def test_compiled_models_keep_the_ops():
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    model = compressed()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(2, 3, 32, 32))
    assert any("adacomcat.low_rank_attention" in target for target in seen)


def test_torchscript_compiles_plain_forms_and_leaves_models_alone():
    model, images = compressed(), torch.randn(2, 3, 32, 32)
    scripted = torch.jit.script(adacomcat.to_plain(model))
    with torch.no_grad():
        torch.testing.assert_close(scripted(images), model(images), rtol=1e-4, atol=1e-5)
        dense = dense_model()
        torch.testing.assert_close(torch.jit.script(dense)(images), dense(images))
    for refused in (model, adacomcat.optimize(model)):
        classes = [type(module) for module in refused.modules()]
        with pytest.raises(UserError, match="script adacomcat.to_plain"):
            torch.jit.script(refused)
        assert [type(module) for module in refused.modules()] == classes
