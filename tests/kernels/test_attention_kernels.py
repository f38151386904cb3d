"""Attention's CUDA kernels: their loops on the host everywhere, the kernels themselves where there is a GPU."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch._subclasses import FakeTensorMode

from flatkern import kernels
from flatkern.kernels import _attention_blocks, _attention_kernels, _select, attention
from flatkern.kernels._attention_layout import Form, Saved
from flatkern.kernels._select import attention_available

from .test_attention import CASES, TRANSFORMS, decomposed, random, scalar

pytestmark = pytest.mark.skipif(not attention_available(), reason="built without attention's kernels")
on_gpu = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not kernels.active().cuda, reason="built without CUDA kernels"),
    ],
)


@pytest.fixture(params=["cpu", on_gpu])
def device(request, monkeypatch):
    """Where the kernels' loops run; on the CPU they are never taken by themselves."""
    if request.param == "cpu":
        monkeypatch.setattr(_attention_kernels, "takes", _attention_kernels.fits)
    calls = []
    for name in ("forward", "tangent", "gradient", "second"):
        form = getattr(_attention_kernels, name)

        def counted(*args, form=form, name=name):
            calls.append(name)
            return form(*args)

        monkeypatch.setattr(_attention_kernels, name, counted)
    yield request.param
    assert calls  # it was the kernels that ran


# of the transforms that the PyTorch form is tested with
FEW = ["value", "jvp", "jvp of grad", "grad of jvp", "double backward", "double backward, batched",
       "gradient in the cotangent", "vmap of vjp of grad"]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("transform", FEW)
def test_it_is_the_decomposed_form(name, transform, device):
    tensors, options = CASES[name]()
    vectors = tuple(random(*t.shape) for t in tensors)
    run = TRANSFORMS[transform]
    expected = run(scalar(decomposed, options), tensors, vectors)
    single = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if isinstance(single.get("attn_mask"), torch.Tensor) and single["attn_mask"].dtype != torch.bool:
        single["attn_mask"] = single["attn_mask"].float()
    put = [tuple(t.float().to(device) for t in group) for group in (tensors, vectors)]
    got = run(scalar(attention, single), *put)
    got, expected = (torch.utils._pytree.tree_leaves(r) for r in (got, expected))
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        known = theirs.isfinite()  # reverse over forward of torch's form is NaN where a row has no key
        assert ours.dtype == torch.float32
        assert known.all() or transform == "grad of jvp"
        torch.testing.assert_close(ours.cpu().double()[known], theirs[known], rtol=1e-4, atol=2e-4)
    assert any(t.abs().max() > 1e-3 for t in got)


def points(mask, batch=2, queries=130, keys=70, width=40, values=33):
    shapes = {
        "q": (batch, queries, width), "k": (batch, keys, width), "v": (batch, keys, values),
    }  # fmt: skip
    point = {name: torch.randn(shape) for name, shape in shapes.items()}
    along = [torch.randn(shape) for shape in shapes.values()]
    return point, along, torch.randn(2, batch, queries, values)


MASKS = {
    "none": (lambda: None, Form(0.3, False)),
    "causal": (lambda: None, Form(-0.2, True)),
    "boolean": (lambda: torch.rand(1, 130, 70) > 0.4, Form(0.3, False, (0, 0))),
    "additive": (lambda: torch.randn(2, 130, 70), Form(0.3, False, (0, 1))),
    "row": (lambda: torch.randn(1, 1, 70), Form(0.3, False, (0, 0))),
}


@pytest.mark.parametrize("name", MASKS)
def test_several_tiles_in_single_precision(name, device):
    make, form = MASKS[name]
    mask = make()
    point, (dq, dk, dv), (g, dg) = points(mask)
    dmask = torch.randn_like(mask) if mask is not None and mask.dtype != torch.bool else None
    needs = (True, True, True, dmask is not None)

    def every(module, put):
        q, k, v, m = (put(t) for t in (*point.values(), mask))
        out, stats = module.forward(q, k, v, m, form)
        saved = Saved(q, k, v, m, stats, out)
        tangents = [put(t) for t in (dq, dk, dv, dmask)]
        return [
            out,
            stats,
            module.tangent(saved, *tangents, form),
            *module.gradient(saved, put(g), form, needs),
            *module.second(saved, put(g), *tangents, put(dg), form, needs),
            *module.second(
                saved, put(g), None, tangents[1], None, None, None, form, (True, False, False, False)
            ),
        ]

    def double(t):
        return t if t is None or t.dtype == torch.bool else t.double()

    got = every(_attention_kernels, lambda t: None if t is None else t.to(device))
    expected = every(_attention_blocks, double)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            error = (ours.cpu() - theirs).abs().max() / theirs.abs().max()
            assert error < 5e-6


@pytest.mark.parametrize("width", [1, 3, 64, 65, 127, 128])
def test_widths(width, device):
    q, k, v = (torch.randn(2, 67, width) for _ in range(3))
    expected = decomposed(q.double(), k.double(), v[..., : width // 2 + 1].double(), is_causal=True)
    got = attention(*(t.to(device) for t in (q, k, v[..., : width // 2 + 1])), is_causal=True)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_edges_of_the_numbers(device):
    q, k, v = (torch.randn(1, 5, 4) for _ in range(3))
    lost = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)
    lost[0] = torch.finfo(torch.float32).min  # all equal: the mean of the values
    on = [t.to(device) for t in (q, k, v, lost)]
    torch.testing.assert_close(attention(*on).cpu(), decomposed(q, k, v, lost))
    never = torch.zeros(5, 5, dtype=torch.bool, device=device)
    assert not attention(*on[:3], never).any()
    torch.testing.assert_close(
        attention(1e3 * on[0], 1e2 * on[1], on[2]).cpu(), decomposed(1e3 * q, 1e2 * k, v)
    )
    on[0][0, 2, 1] = math.nan
    out = attention(*on[:3])
    assert out[0, 2].isnan().all()
    assert out[0, [0, 1, 3, 4]].isfinite().all()


def test_views_and_low_precision(device):
    base = torch.randn(2, 9, 3, 7)
    q, k, v = (t.to(device).transpose(1, 2) for t in (base, base.flip(-1), base[..., 1:4]))
    torch.testing.assert_close(attention(q, k, v).cpu(), decomposed(q.cpu(), k.cpu(), v.cpu()))
    low = [t.bfloat16() for t in (q, k, v)]
    expected = decomposed(*(t.cpu().double() for t in low))
    torch.testing.assert_close(attention(*low).cpu().double(), expected, rtol=1e-2, atol=1e-2)


def test_compiled_into_a_graph(device):
    q, k, v = (torch.randn(2, 5, 4, device=device) for _ in range(3))
    q.requires_grad_()
    compiled = torch.compile(lambda t: attention(t, k, v).sin().sum(), fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(q), q)
    (theirs,) = torch.autograd.grad(decomposed(q, k, v).sin().sum(), q)
    torch.testing.assert_close(ours, theirs)


def test_schemas_and_shapes(device):
    q, k, v, g = (torch.randn(2, 5, 4, device=device) for _ in range(4))
    mask, none, form = torch.randn(1, 5, 1, device=device), None, ([2], [0], 0.5, False)
    row, stats = torch.rand(2, 5, device=device), torch.rand(2, 5, 2, device=device)
    needs = (True, False, True, True)
    calls = {
        "forward": (q, k, v, mask, *form),
        "tangent": (q, k, v, mask, stats, g, q, none, v, none, *form),
        "gradient": (q, k, v, mask, stats, g, row, *form, *needs),
        "second": (q, k, v, mask, stats, g, row, row, row, q, none, none, mask, none, *form, *needs),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(
            getattr(torch.ops.flatkern, f"attention_{name}").default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )
    attention(q, k, v)


def test_what_the_operators_refuse():
    q = torch.randn(2, 5, 4)
    forward = torch.ops.flatkern.attention_forward
    for arguments in (
        (q, q[:, :3], q, None, [], [], 1.0, False),
        (q.double(),) * 3 + (None, [], [], 1.0, False),
        (torch.randn(1, 2, 129),) * 3 + (None, [], [], 1.0, False),
        (q, q, q, torch.randn(1, 5, 4), [2], [0], 1.0, False),
        (q, q, q, torch.randn(1, 5, 5), [2], [1], 1.0, False),
        (q, q, q, torch.randn(1, 5, 5), [3], [0], 1.0, False),
    ):
        with pytest.raises(RuntimeError, match="flatkern"):
            forward(*arguments)


@pytest.mark.parametrize(
    ("shape", "dtype", "taken"),
    [
        ((2, 5, 128), torch.float32, True),
        ((2, 5, 129), torch.float32, False),
        ((2, 5, 16), torch.float64, False),
    ],
)
def test_which_tensors_take_the_kernels(shape, dtype, taken, monkeypatch):
    monkeypatch.setitem(_select._state.build, "cuda", True)
    form = Form(0.3, False)
    with FakeTensorMode():
        q = torch.empty(shape, dtype=dtype, device="cuda")
        with _select.using("compiled"):
            assert _attention_kernels.takes(q, q, form) == taken
            assert not _attention_kernels.takes(q, q, Form(0.3, False, (0, 1, 0, 0)))
        with _select.using("reference"):
            assert not _attention_kernels.takes(q, q, form)
        cpu = torch.empty(shape, dtype=dtype)
        assert not _attention_kernels.takes(cpu, cpu, form)


def test_shapes_on_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setitem(_select._state.build, "cuda", True)
    with FakeTensorMode(), _select.using("compiled"), torch.no_grad():
        q, v = torch.empty(2, 3, 5, 4, device="cuda"), torch.empty(2, 3, 6, 7, device="cuda")
        out = attention(q, torch.empty(2, 3, 6, 4, device="cuda"), v)
        assert out.shape == (2, 3, 5, 7)
        assert out.device.type == "cuda"


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), max_size=4))
def test_places_of_masks(axes):
    rows = [0]
    for size, stride in axes:
        rows = [r + d * stride for r in rows for d in range(size)]
    found = _attention_kernels.places(tuple(rows))
    if found is None:  # more irregular than a broadcast; then PyTorch's form runs
        assert len(axes) > 1
        return
    again = [0]
    for size, stride in zip(*found, strict=True):
        again = [r + d * stride for r in again for d in range(size)]
    assert again == rows


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3), (4, 1), (4, 3), (2, 1, 3), (1, 4, 1)])
def test_places_of_broadcast_masks(shape):
    batch = (2, 4, 3)
    count = math.prod(shape)
    rows = torch.arange(count).reshape(shape).expand(batch).reshape(-1).tolist()
    vmapped = tuple(r + i * count for i in range(3) for r in rows)
    for given_rows in (tuple(rows), vmapped, tuple(rows) * 3):
        found = _attention_kernels.places(given_rows)
        assert found is not None
        sizes, strides = found
        index = torch.zeros((), dtype=torch.long)
        for size, stride in zip(sizes, strides, strict=True):
            index = index[..., None] + torch.arange(size) * stride
        assert index.reshape(-1).tolist() == list(given_rows)
