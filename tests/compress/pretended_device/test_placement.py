"""Compressing on a device that is not there, which has the place of a GPU and plain PyTorch in that of its kernels.

Tensors of that device hold their values in host memory. What a GPU would refuse is refused: an operation on tensors of
both sides, other than copies, lookups by indices of the host, and numbers without dimensions.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from bitdelta_compile.kernels import layout
from bitdelta_compile.lowering import device
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from bitdelta_compile.compress import compress
from bitdelta_compile.compress import signs as choice
from bitdelta_compile.encodings import Dense, Rows, Same, Sign
from bitdelta_compile.fidelity import verify
from bitdelta_compile.graph.context import Parameter
from bitdelta_compile.graph.rewrite import rewrite
from bitdelta_compile.sources import _placed

aten = torch.ops.aten
DEVICE = "pretended"
CROSSING = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}
ASSIGNMENTS = {aten.index_put_.default, aten.index_put.default}
TEXTS = ["the value of python", "language is not a value"]


class There(torch.Tensor):
    """A tensor of the pretended device."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here):
        layout = {"dtype": here.dtype, "device": DEVICE}
        found = torch.Tensor._make_wrapper_subclass(cls, here.shape, here.stride(), here.storage_offset(), **layout)
        found.here = here
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def tolist(self):
        return self.here.tolist()

    def data_ptr(self):
        return self.here.data_ptr()


def dispatch(func, args, kwargs):
    """The operation in host memory, and its results where a GPU would have them."""
    there = any(isinstance(leaf, There) for leaf in tree_leaves((args, kwargs)))
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == DEVICE
        kwargs = {**kwargs, "device": "cpu"}
    elif func is aten.copy_.default:
        there = isinstance(args[0], There)
    elif there and func not in CROSSING:
        operands = (args, kwargs)
        if func is aten.index.Tensor:
            operands = args[:1]
        elif func in ASSIGNMENTS:
            operands = (args[0], args[2])
        tensors = [leaf for leaf in tree_leaves(operands) if isinstance(leaf, torch.Tensor)]
        if not all(isinstance(tensor, There) or not tensor.ndim for tensor in tensors):
            raise RuntimeError(f"{func} of tensors on two devices")
    found = func(
        *tree_map_only(There, lambda leaf: leaf.here, args), **tree_map_only(There, lambda leaf: leaf.here, kwargs)
    )
    if not there:
        return found
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, There, found))


@pytest.fixture(scope="module")
def backend():
    _setup_privateuseone_for_python_backend(DEVICE)
    library = torch.library.Library("_", "IMPL")  # for operations without an operand that says where it is
    library.fallback(lambda func, *args, **kwargs: dispatch(func, args, kwargs), "PrivateUse1")
    yield
    library._destroy()


@pytest.fixture
def calls(backend, monkeypatch):
    """The pretended device, with kernels; counts their calls."""
    _device_constructors()  # remembers what `with torch.device(...)` applies to: the original among that
    made: Any = torch.tensor

    def tensor(*args, device=None, **kwargs):  # the original does not ask the device
        found = made(*args, **kwargs)
        return found if device is None else found.to(device)

    count = {"feed": 0, "flip": 0}

    def kernel(name, in_pytorch):
        def run(changed, signs, *others):
            count[name] += 1
            scale, columns = others[:2]
            for each in (changed, signs, scale) if columns is None else (changed, signs, scale, columns):
                assert isinstance(each, There)
                assert each.is_contiguous()
            in_pytorch(*tree_map_only(There, lambda leaf: leaf.here, (changed, signs, *others)))

        return run

    on_gpu = SimpleNamespace(feed=kernel("feed", choice._feed), flip=kernel("flip", choice._flip))
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(device, "column_kernels", lambda place: on_gpu if place.type == DEVICE else None)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention is not the same on every device
        yield count


def assert_alike(ours, theirs):
    """The same delta but for rounding, all of it in host memory."""
    assert ours.encodings.keys() == theirs.encodings.keys()
    for name, encoding in ours.encodings.items():
        other = theirs.encodings[name]
        assert other.kind == encoding.kind, name
        for field, value in encoding.tensors().items():
            found = other.tensors()[field]
            assert type(found) in (torch.Tensor, torch.nn.Parameter)
            if field in ("signs", "index"):
                assert (found != value).float().mean() < 0.02, name
            elif field not in ("left", "right"):  # of which the product counts
                assert torch.allclose(found.float(), value.float(), rtol=0.02, atol=1e-4), (name, field)
        error, expected = (each.report["parameters"].get(name, {}).get("error", 0.0) for each in (theirs, ours))
        assert error == pytest.approx(expected, rel=0.01, abs=1e-3), name


@pytest.mark.parametrize(
    ("name", "calibration", "options"),
    [
        ("bert_pair", TEXTS, {}),
        ("bert_pair", None, {}),
        ("bert_pair", TEXTS, {"quality": "balanced"}),
        ("bert_pair", TEXTS, {"bits": 2.0}),
        ("llama_pair", TEXTS, {}),
        ("llama_pair", None, {}),
        ("llama_pair", TEXTS, {"planes": 2, "rank": 2}),
        ("llama_pair", TEXTS, {"quality": "fast"}),
        ("llama_pair", TEXTS, {"sampled": 64}),
    ],
)
def test_checkpoints_in_host_memory(name, calibration, options, request, calls):
    pair = request.getfixturevalue(name)
    ours = compress(pair.base, pair.tuned, calibration, tokens=256, **options)
    assert not any(calls.values())
    theirs = compress(pair.base, pair.tuned, calibration, tokens=256, device=DEVICE, **options)
    assert bool(calls["feed"]) == (options.get("quality") != "fast")
    assert_alike(ours, theirs)


def perturbed(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.005 * torch.randn_like(parameter)
    return model.eval()


def gpt2(seed):
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2, use_cache=False
    )
    torch.manual_seed(0)
    return perturbed(transformers.GPT2LMHeadModel(config), seed)


def grown(seed):
    """A table and a head of which the fine-tune has rows that the base lacks."""
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    if seed:
        model.resize_token_embeddings(100, mean_resizing=False)
    return perturbed(model, seed)


def batches(place):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(64, (2, 16), generator=generator).to(place)} for _ in range(2)]


def on(model, place):
    model.to(place)
    model.tie_weights()  # a tensor of a class of its own is moved once for each name
    return model


@pytest.mark.parametrize("place", ["cpu", DEVICE])
@pytest.mark.parametrize("model", [gpt2, grown])
def test_models_in_memory(model, place, calls):
    """Stored [K, N] (gpt2), and rows beside planes (grown), on either side."""
    ours = compress(model(0), model(1), batches("cpu"))
    computes = None if place == DEVICE else DEVICE
    theirs = compress(on(model(0), place), on(model(1), place), batches(place), device=computes)
    assert_alike(ours, theirs)
    assert calls["feed"]
    if model is grown:
        assert ours.encodings["lm_head.weight"].kind == "rows"
        assert ours.encodings["lm_head.weight"].over is not None


def sign(generator, n, transposed=False, **others):
    shape = (64, n) if transposed else (n, 64)
    signs = layout.pack(torch.rand(1, n, 64, generator=generator) < 0.5)
    return Sign(shape, torch.float32, signs, torch.rand(1, n, generator=generator), transposed=transposed, **others)


def test_a_delta_is_applied_where_the_base_is(backend):
    generator = torch.Generator().manual_seed(0)
    parts = {"col_scale": torch.rand(1, 64, generator=generator), "left": torch.ones(40, 2), "right": torch.ones(2, 64)}
    rows = {"index": torch.tensor([1, 40]), "values": torch.rand(2, 64, generator=generator)}
    for encoding in (
        Same((40, 64), torch.float32),
        sign(generator, 40),
        sign(generator, 40, transposed=True),
        sign(generator, 40, **parts),
        Rows((41, 64), torch.float32, **rows, over=None, transposed=False),
        Rows((41, 64), torch.float32, **rows, over=sign(generator, 40), transposed=False),
        Rows((64, 41), torch.float32, **rows, over=sign(generator, 40, transposed=True), transposed=True),
    ):
        base = torch.randn(64, 40) if getattr(encoding, "transposed", False) else torch.randn(40, 64)
        found = encoding.apply(base.to(DEVICE))
        assert isinstance(found, There)
        assert torch.equal(found.cpu(), encoding.apply(base))


def test_a_graph_on_the_device(backend):
    """`substitute_base` and `_placed`: what is stored outright is where the base is, too."""
    generator = torch.Generator().manual_seed(0)
    encodings = {"w": sign(generator, 40), "b": Dense((40,), torch.float32, torch.randn(40, generator=generator))}
    base = {"w": torch.randn(40, 64), "b": torch.randn(40)}
    x = torch.randn(3, 64)
    results = []
    for place in ("cpu", DEVICE):
        graph = fx.Graph()
        inputs = {name: graph.placeholder(name) for name in ("x", "w", "b")}
        graph.output((graph.call_function(torch.nn.functional.linear, tuple(inputs.values())),))
        there = {name: tensor.to(place) for name, tensor in (base | {"x": x}).items()}
        for name, node in inputs.items():
            node.meta["example_value"] = there[name]
        module = fx.GraphModule(torch.nn.Module(), graph)
        parameters = {
            inputs[name]: Parameter(name, _placed(encodings[name], there[name]), there[name]) for name in encodings
        }
        rewritten, context = rewrite(module, parameters)
        values = [context.values.get(name, there[name]) for name in ("x", "w", "b")]
        (found,) = rewritten(*values, *context.added)
        results.append(found.cpu())
    expected = x @ encodings["w"].apply(base["w"]).T + encodings["b"].value
    assert torch.allclose(results[0], expected, atol=1e-4)
    assert torch.allclose(results[1], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["bert_pair", "llama_pair"])
def test_verify_with_a_base_on_the_device(name, request, calls):
    pair = request.getfixturevalue(name)
    delta = compress(pair.base, pair.tuned, method="mean_abs")
    load = transformers.AutoModel if name == "bert_pair" else transformers.AutoModelForCausalLM
    base = load.from_pretrained(pair.base, dtype=torch.float32, use_cache=False).eval()
    expected = verify(delta, base, pair.tuned, TEXTS)
    found = verify(delta, on(base, DEVICE), pair.tuned, TEXTS)
    for figure in ("base", "compressed", "count", "layers"):
        assert getattr(found, figure) == pytest.approx(getattr(expected, figure), rel=0.02)
