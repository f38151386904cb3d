"""Models of Hugging Face, batches as dicts, the embedding tied to the head: against explicit matrices, and at size."""

import pytest
import torch

import flatkern as fk
from flatkern.allocation import AllocationMeter
from flatkern.losses import TokenCrossEntropyLoss, resolve_loss

transformers = pytest.importorskip("transformers")

LOSS = TokenCrossEntropyLoss()


def gpt2(vocabulary, length, width, heads, layers, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=width, n_head=heads, n_layer=layers,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval().to(dtype)
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


def tokens(n, length, vocabulary):
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(0, vocabulary, (n, length), generator=generator)}


def next_token(model, batch):
    """Logits at all positions but the last, and the tokens that follow."""
    ids = batch["input_ids"]
    return model(**batch, use_cache=False).logits[:, :-1], ids[:, 1:]


def tiny():
    """Large initial weights, so that nothing is nearly linear."""
    model = gpt2(7, 5, 8, 2, 1, torch.float64, n_inner=8)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    return model, tokens(3, 5, 7)


def jacobians(model, batch):
    """∂f_i/∂θ of every sample, [n, N, P]."""
    output, target = next_token(model, batch)
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(entry, list(model.parameters()), retain_graph=True)]
        )
        for entry in output.flatten()
    ]
    return torch.stack(rows).reshape(len(output), -1, len(rows[0])), output.detach(), target


def explicit_ggn(model, batch):
    """Σ_i J_iᵀ H_i J_i / number of tokens, and the samples' own traces."""
    jacobian, output, target = jacobians(model, batch)
    p = output.softmax(-1)
    blocks = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)  # [n, T, V, V]
    by_token = jacobian.reshape(*output.shape, -1)
    each = torch.einsum("ntvp,ntvw,ntwq->npq", by_token, blocks, by_token)
    return each.sum(0) / target.numel(), each.diagonal(dim1=1, dim2=2).sum(1) / target.numel()


def test_ggn_traces_of_a_tied_model():
    model, batch = tiny()
    want, by_sample = explicit_ggn(model, batch)
    exact = fk.ggn_trace(model, LOSS, batch, forward=next_token, method="exact", per_parameter=True)
    assert exact.stderr == 0
    assert exact.value == pytest.approx(float(want.trace()), rel=1e-10)
    torch.testing.assert_close(exact.per_sample, 3 * by_sample, rtol=1e-10, atol=0)
    assert exact.notes == ()  # no per-sample gradient was formed
    first = model.transformer.wte.weight.numel()
    tied = exact.per_parameter["transformer.wte.weight"]
    assert tied == pytest.approx(float(want.diagonal()[:first].sum()), rel=1e-10)
    sketch = fk.ggn_trace(model, LOSS, batch, forward=next_token, method="sketch", samples=200, seed=3)
    assert abs(sketch.value - exact.value) < 4 * sketch.stderr < 0.3 * exact.value


def test_sharpness_and_tangent_kernel():
    model, batch = tiny()
    jacobian, output, _ = jacobians(model, batch)
    want = jacobian.square().sum() / len(output)
    assert fk.sharpness(model, batch, forward=next_token).value == pytest.approx(float(want), rel=1e-10)
    rows = jacobian.flatten(0, 1)
    torch.testing.assert_close(
        fk.ntk(model, batch, forward=next_token), rows @ rows.T, rtol=1e-10, atol=1e-10
    )
    part = {"input_ids": batch["input_ids"][:1]}
    torch.testing.assert_close(
        fk.ntk(model, batch, part, forward=next_token), rows @ jacobian[0].T, rtol=1e-10, atol=1e-10
    )


def test_gradient_norms():
    model, batch = tiny()
    found = fk.gradient_norms(model, LOSS, batch, forward=next_token)
    for i in range(3):
        one = {"input_ids": batch["input_ids"][i : i + 1]}
        output, target = next_token(model, one)
        loss = torch.nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum")
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert float(found.values[i]) == pytest.approx(float(sum(g.square().sum() for g in grads)), rel=1e-10)


def test_spectrum_and_factors():
    model, batch = tiny()
    want = torch.linalg.eigvalsh(explicit_ggn(model, batch)[0]).flip(0)
    found = fk.ggn_spectrum(model, LOSS, batch, forward=next_token)
    torch.testing.assert_close(found.values, want[: len(found)], rtol=1e-8, atol=1e-12)
    assert float(want[len(found)]) < 1e-10
    factors = fk.kfac(model, LOSS, batch, forward=next_token)
    assert factors.shape == (len(want), len(want))
    assert factors.loss == pytest.approx(float(LOSS(*next_token(model, batch)).detach()))


@pytest.mark.parametrize("tie", [True, False])
def test_hessian_trace(tie):
    model, batch = tiny()
    if not tie:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    hessian = fk.hessian(model, LOSS, batch, forward=next_token)
    want = fk.trace(hessian, method="exact").value
    found = fk.hessian_trace(model, LOSS, batch, forward=next_token, samples=200, seed=0)
    assert abs(found.value - want) < 4 * found.stderr
    assert found.stderr < 0.25 * abs(want)
    assert len(found.sampled) > 10


def test_padding_and_several_batches():
    model, batch = tiny()
    ids = batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    loss = TokenCrossEntropyLoss(ignore_index=-100)

    def forward(model, batch):
        output, target = next_token(model, batch)
        return output, target.masked_fill(batch["attention_mask"][:, 1:] == 0, -100)

    whole = fk.ggn_trace(model, loss, padded, forward=forward)
    loader = [{k: v[:2] for k, v in padded.items()}, {k: v[2:] for k, v in padded.items()}]
    parts = fk.ggn_trace(model, loss, loader, forward=forward)
    assert parts.value == pytest.approx(whole.value, rel=1e-10)
    dense = fk.ggn(model, loss, padded, forward=forward)
    assert whole.value == pytest.approx(fk.trace(dense, method="exact").value, rel=1e-9)


def test_a_model_that_gives_no_tensor_says_what_to_do():
    model, batch = tiny()
    with pytest.raises(TypeError, match="forward"):
        fk.sharpness(model, batch["input_ids"])


def peak(function):
    with AllocationMeter() as meter:
        function()
    return meter.peak


def gradient(model, batch):
    """The unit of memory: one gradient, the logits given back before the backward pass."""
    output, target = next_token(model, batch)
    loss = torch.nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())
    del output
    return torch.autograd.grad(loss, list(model.parameters()))


def check_at_size(model, batch, probes):
    """Traces in less than two gradients' memory, with nothing of the size n × P."""
    n = len(batch["input_ids"])
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    unit = peak(lambda: gradient(model, batch))
    found = {}

    def run(name, function, *arguments, **options):
        used = peak(lambda: found.update({name: function(*arguments, **options, forward=next_token)}))
        assert used <= 2 * unit, name
        assert used < unit + n * parameters, name

    run("norms", fk.gradient_norms, model, LOSS, batch)
    run("ggn", fk.ggn_trace, model, LOSS, batch, rtol=0.2)
    run("sharpness", fk.sharpness, model, batch, rtol=0.2)
    assert found["ggn"].method == found["sharpness"].method == "sign sketch (ghost norms)"
    assert found["ggn"].notes == found["norms"].notes == ()
    if probes:
        run("hessian", fk.hessian_trace, model, LOSS, batch, samples=probes)
        assert "tangent passes" in found["hessian"].method
    assert all(torch.isfinite(found[name].per_sample).all() for name in ("ggn", "sharpness"))


def test_a_vocabulary_in_bounded_memory():
    check_at_size(gpt2(5000, 16, 64, 2, 1), tokens(16, 16, 5000), probes=2)


@pytest.mark.slow
def test_fifty_thousand_tokens():
    check_at_size(gpt2(50257, 64, 128, 4, 2), tokens(4, 64, 50257), probes=2)


@pytest.mark.slow
def test_a_hundred_million_parameters():
    model = gpt2(50257, 64, 768, 12, 12)
    assert sum(p.numel() for p in model.parameters()) > 100e6
    check_at_size(model, tokens(4, 64, 50257), probes=0)


def test_sketches_of_a_vocabulary_keep_their_digits_in_float32():
    generator = torch.Generator().manual_seed(0)
    output = 20 * torch.randn(2, 3, 50257, generator=generator)  # some tokens nearly certain
    target = torch.zeros(2, 3, dtype=torch.long)
    loss = resolve_loss(LOSS)
    signs = torch.randint(0, 2, output.shape, generator=generator).float() * 2 - 1
    exact = loss.sketch(output.double(), target, signs.double())
    found = loss.sketch(output, target, signs.clone())
    worst = (found.double() - exact).flatten(0, 1).norm(dim=-1) / exact.flatten(0, 1).norm(dim=-1)
    assert float(worst.max()) < 1e-5


def test_a_thousand_classes():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.GELU(), torch.nn.Linear(40, 1000))
    x, y = torch.randn(8, 20), torch.randint(0, 1000, (8,))
    loss = torch.nn.CrossEntropyLoss()
    exact = fk.ggn_trace(model, loss, (x, y), method="exact", max_memory=64 << 20)
    assert exact.passes == 999
    found = fk.ggn_trace(model, loss, (x, y))
    assert found.method == "sign sketch (ghost norms)"
    assert abs(found.value - exact.value) < 5 * found.stderr < 0.3 * exact.value
    assert peak(lambda: fk.ggn_trace(model, loss, (x, y))) < 8 << 20
