"""LaProp against the values of the paper's released optimizer."""

from __future__ import annotations

import copy

import pytest
import torch

from megadiff.optim.laprop import LaProp
from megadiff.optim.members.laprop import STATE_KEYS, Settings, build

SETTINGS = Settings(name="laprop", lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8)
GRADIENTS = (0.5, -1.0, 0.25, 2.0)

GOLDEN = [
    # nu, mu, theta without decay, theta with decay 0.1: learning rate 0.1, from theta = 1
    (0.25, 0.99999998, 0.900000002, 0.890000002),
    (0.626884422111, -0.191057087524, 0.919105710752, 0.900205710732),
    (0.436862395206, 0.0190157079014, 0.917204139962, 0.889302082835),
    (1.34112046775, 0.515671491619, 0.8656369908, 0.828841912845),
]


def group(*parameters: torch.nn.Parameter, lr: float = 0.1, weight_decay: float = 0.0, eps: float = 1e-8) -> dict:
    return {"params": list(parameters), "lr": lr, "weight_decay": weight_decay, "eps": eps}


def scalar(value: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([value], dtype=dtype))


def take(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, gradient: float) -> None:
    parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


@pytest.mark.parametrize(("weight_decay", "column"), [(0.0, 2), (0.1, 3)])
def test_four_steps_have_the_reference_values_to_every_printed_digit(weight_decay, column):
    theta = scalar()
    optimizer = build([group(theta, weight_decay=weight_decay)], SETTINGS)
    for gradient, golden in zip(GRADIENTS, GOLDEN, strict=True):
        take(optimizer, theta, gradient)
        state = optimizer.state[theta]
        found = (state["exp_avg_sq"].item(), state["exp_avg"].item(), theta.item())
        assert [f"{x:.12g}" for x in found] == [f"{x:.12g}" for x in (*golden[:2], golden[column])]


def test_the_first_step_goes_by_the_gradients_sign_alone():
    theta = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = build([group(theta, lr=0.25, eps=1e-30)], SETTINGS)
    theta.grad = torch.tensor([3e-5, -2.0, 1e4, -1e-9, 0.0], dtype=torch.float64)
    optimizer.step()
    assert theta.tolist() == [-0.25, 0.25, -0.25, 0.25, 0.0]


def test_normalising_comes_before_averaging():
    """After one huge gradient, Adam's first moment still remembers its size; LaProp's holds a sign."""
    theta = scalar()
    optimizer = build([group(theta)], SETTINGS)
    take(optimizer, theta, 1e6)
    take(optimizer, theta, 1.0)
    assert 0 < optimizer.state[theta]["exp_avg"].item() < 0.5


def test_bf16_parameters_have_float32_moments():
    theta = scalar(dtype=torch.bfloat16)
    optimizer = build([group(theta)], SETTINGS)
    for gradient, (nu, mu, _, _) in zip(GRADIENTS, GOLDEN, strict=True):
        take(optimizer, theta, gradient)
        state = optimizer.state[theta]
        assert theta.dtype == torch.bfloat16
        assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.float32}
        assert (state["exp_avg_sq"].item(), state["exp_avg"].item()) == pytest.approx((nu, mu), rel=1e-5)


def test_a_run_cut_in_two_by_its_state_dict_goes_on_bit_for_bit():
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 2, 33, generator=draw)
    whole, first, second = (
        [torch.nn.Parameter(torch.linspace(-1, 1, 33)), torch.nn.Parameter(torch.ones(33))] for _ in range(3)
    )

    def over(pair: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return build([group(pair[0], weight_decay=0.1), group(pair[1], lr=0.02, eps=1e-6)], SETTINGS)

    def run(optimizer: torch.optim.Optimizer, pair: list[torch.nn.Parameter], steps: range) -> None:
        for step in steps:
            for parameter, gradient in zip(pair, gradients[step], strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()

    run(over(whole), whole, range(6))
    before = over(first)
    run(before, first, range(3))
    for old, new in zip(first, second, strict=True):
        new.data.copy_(old.data)
    after = over(second)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    run(after, second, range(3, 6))
    for one, other in zip(whole, second, strict=True):
        assert torch.equal(one, other)
    assert [g["step"] for g in after.param_groups] == [6, 6]


def test_each_group_has_its_own_rate_decay_and_epsilon():
    thetas = [scalar() for _ in range(4)]
    groups = [
        group(thetas[0]),
        group(thetas[1], lr=0.01),
        group(thetas[2], eps=0.5),
        group(thetas[3], weight_decay=0.1),
    ]
    optimizer = build(groups, SETTINGS)
    for theta in thetas:
        theta.grad = torch.full_like(theta, 0.5)
    optimizer.step()
    # 1 - lr (g / (|g| + eps) + decay)
    assert [theta.item() for theta in thetas] == pytest.approx([0.9, 0.99, 0.95, 0.89], abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_parameters_updated_together_are_updated_as_each_alone(dtype, weight_decay):
    """And both as the formula has it, an operation at a time."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (33,), (1,), (4, 3, 2)]
    together, alone, plain = (
        [torch.nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel()).view(s).to(dtype)) for s in shapes]
        for _ in range(3)
    )
    optimizers = [build([group(*together, lr=0.01, weight_decay=weight_decay)], SETTINGS)]
    optimizers += [build([group(p, lr=0.01, weight_decay=weight_decay)], SETTINGS) for p in alone]
    moments = [(torch.zeros(s), torch.zeros(s)) for s in shapes]
    for t in range(1, 5):
        keep1, keep2 = (1 - (1 - beta) / (1 - beta**t) for beta in (SETTINGS.beta1, SETTINGS.beta2))
        for one, other, copy_, (mu, nu) in zip(together, alone, plain, moments, strict=True):
            one.grad = torch.randn(one.shape, generator=draw).to(dtype)
            other.grad = one.grad.clone()
            gradient = one.grad.float()
            nu.mul_(keep2).addcmul_(gradient, gradient, value=1 - keep2)
            mu.mul_(keep1).addcdiv_(gradient, nu.sqrt().add_(1e-8), value=1 - keep1)
            with torch.no_grad():
                copy_.mul_(1 - 0.01 * weight_decay).add_(mu, alpha=-0.01)
        for optimizer in optimizers:
            optimizer.step()
    for one, other, copy_ in zip(together, alone, plain, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, copy_)
    assert all(float(optimizers[0].state[p]["step"]) == 4.0 for p in together)


def test_the_rate_may_change_between_steps():
    """The schedule writes each group's `lr`; nothing of the old one may stick."""
    theta = scalar()
    optimizer = build([group(theta)], SETTINGS)
    optimizer.param_groups[0]["lr"] = 0.0
    take(optimizer, theta, 0.5)
    assert theta.item() == 1.0
    optimizer.param_groups[0]["lr"] = 1.0
    take(optimizer, theta, -1.0)
    assert theta.item() == pytest.approx(1 - GOLDEN[1][1], abs=1e-11)


def test_a_parameter_without_a_gradient_stays():
    moved, still = scalar(), scalar()
    optimizer = build([group(moved, still, weight_decay=0.1)], SETTINGS)
    take(optimizer, moved, 1.0)
    assert still.item() == 1.0
    assert moved.item() != 1.0


def test_it_keeps_the_state_that_it_declares():
    theta = scalar()
    optimizer = build([group(theta)], SETTINGS)
    take(optimizer, theta, 1.0)
    assert isinstance(optimizer, LaProp)
    assert set(optimizer.state[theta]) == set(STATE_KEYS)
