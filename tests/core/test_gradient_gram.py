"""Gram matrices of parameter gradients (empirical NTK) against explicit Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatkern.gradient_gram import gradient_gram, incompatible, parameter_gradients
from flatkern.layers.embedding import RowsTerm
from flatkern.layers.outer import Features, OuterTerm
from flatkern.linearize import linearizations
from flatkern.losses import identity_cotangents
from flatkern.problem import select_parameters
from tests.core.networks import NAMES, RULE_NAMES, TinyGPT, networks, parameter_jacobian, rule_networks


def linearized(model, x):
    parameters = select_parameters(model)
    (lin,) = linearizations(model, x, parameters, with_input=False, max_memory=1 << 30)
    return lin, parameters


@pytest.mark.parametrize("max_memory", [1 << 30, 3000])
@pytest.mark.parametrize("name", NAMES + RULE_NAMES)
def test_gram_of_two_sets_of_samples(name, max_memory):
    model, x = {**networks(), **rule_networks()}[name]
    jacobians = {p: j.flatten(0, 1) for p, j in parameter_jacobian(model, x).items()}
    lin, parameters = linearized(model, x)
    other, _ = linearized(model, x[1:])  # fewer samples
    assert incompatible(lin, other) == []
    first = parameter_gradients(model, lin, identity_cotangents(lin.output), parameters)
    second = parameter_gradients(model, other, identity_cotangents(other.output), parameters)
    got = gradient_gram(first, second, max_memory)
    outputs = lin.output[0].numel()
    for p, j in jacobians.items():
        want = j @ j[outputs:].mT
        torch.testing.assert_close(got.get(p, torch.zeros_like(want)), want, rtol=1e-9, atol=1e-10, msg=p)


def test_runs_of_different_length_meet_in_the_parameters_space():
    torch.manual_seed(0)
    model = TinyGPT().double()
    x, longer = torch.randint(11, (2, 3)), torch.randint(11, (3, 5))
    lin, parameters = linearized(model, x)
    other, _ = linearized(model, longer)
    apart = incompatible(lin, other)
    assert "places.weight" in apart
    first = parameter_gradients(model, lin, identity_cotangents(lin.output), parameters, apart)
    second = parameter_gradients(model, other, identity_cotangents(other.output), parameters, apart)
    got = gradient_gram(first, second, 1 << 20)
    left, right = parameter_jacobian(model, x), parameter_jacobian(model, longer)
    for p, gram in got.items():
        torch.testing.assert_close(gram, left[p].flatten(0, 1) @ right[p].flatten(0, 1).mT, msg=p)


@pytest.mark.parametrize("sizes", [(1, 1, 3, 4), (1, 5, 2, 3), (3, 4, 2, 2), (2, 1, 3, 2)])
def test_every_form_of_the_outer_gram(sizes):
    groups, t, d_a, d_g = sizes
    shape = torch.Size((groups * d_g, d_a))

    def term(n, k, positions):
        a = torch.randn(n, groups, positions, d_a).double()
        return OuterTerm(Features.of(a), torch.randn(k, n, groups, positions, d_g).double(), shape)

    a, b = term(3, 2, t), term(4, 5, t + (t > 1))
    want = a._rows(slice(0, 3)) @ b._rows(slice(0, 4)).mT
    for memory in (1, 1000, 1 << 20):
        torch.testing.assert_close(a.gram(b, memory), want)
        torch.testing.assert_close(a.gram(a, memory), a._rows(slice(0, 3)) @ a._rows(slice(0, 3)).mT)


def test_a_table_never_forms_its_vocabulary():
    n, vocabulary = 3, 10**12
    rows = torch.tensor([5, 7, 5, 10**11, 7, 7])
    samples = torch.arange(n).repeat_interleave(2)
    g = torch.randn(2, 6, 4).double()
    term = RowsTerm(samples, rows, g, n, torch.Size((vocabulary, 4)))
    same = (rows[:, None] == rows[None]).double()
    owner = nn.functional.one_hot(samples).double()
    pairs = torch.einsum("kef,ldf,ed->kled", g, g, same)
    want = torch.einsum("kled,ei,dj->ikjl", pairs, owner, owner).reshape(6, 6)
    torch.testing.assert_close(term.gram(term, 100), want)
    torch.testing.assert_close(term.squared_norms(100), want.diagonal().reshape(n, 2).sum(1))
