"""Plans: the paper's large runs come back, bounds have their price, and goals that cannot be met are refused."""

from __future__ import annotations

import math

import pytest

from megadiff.errors import ConfigError
from megadiff.platform.gpus import gpu
from megadiff.scaling.flops import flops_per_token
from megadiff.scaling.frontier import ModelSize, effective_tokens, frontier, model_sizes, wasted_by_batch
from megadiff.scaling.goal import Goal, Hardware, aim, laws_for, size_range, sizes
from megadiff.scaling.laws import Estimate, Law, LawBook, LawFile, compute_optimal, published
from megadiff.scaling.planner import efficiency_law, plan

BOOK = published()
HYPERBOLA = next(law for law in BOOK.files[0].laws if law.form == "hyperbola")

LARGE_RUNS = [
    ("masked", 18, 3072, 1e21, 512, 500, 23_500, 1536, 7.392e10, 1.005e21, 1.44, 1363),
    ("uniform", 19, 3072, 1e21, 512, 500, 22_500, 1536, 7.078e10, 1.015e21, 1.44, 1304),
    ("uniform", 34, 4608, 1e22, 1024, 1000, 29_000, 3072, 1.825e11, 1.019e22, 1.82, 2822),
]


@pytest.mark.parametrize(
    ("noise", "layers", "hidden", "flops", "batch", "step", "steps", "sequences", "tokens", "spent", "rate", "by_law"),
    LARGE_RUNS,
)
def test_the_papers_large_runs_follow_from_budget_shape_and_rounding(
    noise, layers, hidden, flops, batch, step, steps, sequences, tokens, spent, rate, by_law
):
    goal = Goal(
        noise,
        flops=flops,
        size=ModelSize(layers, hidden),
        batch_estimator="sizing",
        batch_multiple=batch,
        step_multiple=step,
    )
    made = plan(goal, BOOK)
    assert (made.steps, made.global_batch_size) == (steps, sequences)
    assert made.batch_wanted / 2048 == pytest.approx(by_law, abs=1)
    assert f"{made.tokens:.3e}" == f"{tokens:.3e}"
    assert made.flops("deepseek") == pytest.approx(spent, rel=1e-3)
    assert f"{made.learning_rate:.2f}" == f"{rate:.2f}"


def test_the_large_runs_have_the_published_losses_by_the_laws():
    for noise, flops, loss in (("masked", 1e21, 2.472), ("uniform", 1e21, 2.506), ("uniform", 1e22, 2.223)):
        assert frontier(BOOK, noise).best_loss(flops) == pytest.approx(loss, abs=1.5e-3)


def test_the_surface_reverses_the_headline_and_misses_the_10b_run():
    masked, uniform = (
        BOOK.law("loss", noise=noise, form="surface", flop_count="deepseek") for noise in ("masked", "uniform")
    )
    share = [law.parameter("beta") / (law.parameter("alpha") + law.parameter("beta")) for law in (masked, uniform)]
    assert share == pytest.approx([0.557, 0.531], abs=1e-3)
    goal = Goal("uniform", flops=1.019e22, size=ModelSize(34, 4608))
    other = plan(goal, BOOK).second_method(BOOK)
    assert other.loss(5.5844e10, 1.825e11) == pytest.approx(2.513, abs=0.003)
    assert other.best_size(1e20) / other.best_size(1e18) == pytest.approx(100**0.531, rel=5e-3)


@pytest.mark.parametrize(("noise", "curvature"), [("masked", 0.0100), ("uniform", 0.0112)])
def test_the_frontier_is_as_flat_as_the_reference_says(noise, curvature):
    laws = frontier(BOOK, noise)
    assert laws.curvature == pytest.approx(curvature, abs=6e-5)
    for factor in (0.5, 2.0):
        size = laws.best_size(1e20) * factor
        assert 0.0024 - 1e-4 < laws.loss(size, 1e20 / size) / laws.best_loss(1e20) - 1 < 0.0027 + 1e-4
    steps = [
        laws.loss(laws.best_size(1e20) * math.exp(h), 1e20 / laws.best_size(1e20) / math.exp(h))
        for h in (-0.01, 0, 0.01)
    ]
    second = (math.log(steps[0]) + math.log(steps[2]) - 2 * math.log(steps[1])) / 0.01**2
    assert second == pytest.approx(curvature, rel=0.01)


def test_the_implied_surface_has_its_optimum_on_the_laws():
    laws = frontier(BOOK, "masked")
    alpha, beta = 0.04961 / 0.56629, 0.04961 / (1 - 0.56629)
    at = {(m, d): laws.loss(m, d) for m in (1e9, 1e10, 1e11) for d in (1e10, 1e11, 1e12)}
    a = (at[1e9, 1e10] - at[1e10, 1e10]) / (1e9**-alpha - 1e10**-alpha)
    b = (at[1e9, 1e10] - at[1e9, 1e11]) / (1e10**-beta - 1e11**-beta)
    for (m, d), loss in at.items():
        assert loss == pytest.approx(a * m**-alpha + b * d**-beta, rel=2e-4)


def test_each_question_of_the_frontier_answers_another():
    laws = frontier(BOOK, "uniform")
    for flops in (1e18, 3e20):
        size = laws.best_size(flops)
        assert laws.budget_for_loss(laws.best_loss(flops)) == pytest.approx(flops, rel=1e-9)
        assert laws.budget_for_size(size) == pytest.approx(flops, rel=1e-9)
        assert laws.budget_for_tokens(flops / size) == pytest.approx(flops, rel=1e-9)
        assert laws.tokens_for_loss(size, laws.best_loss(flops)) == pytest.approx(flops / size, rel=1e-6)


def test_repeats_are_worth_less_and_less():
    assert effective_tokens(5e9, 1e10) == 5e9
    assert effective_tokens(2e10, 1e10) == pytest.approx(1e10 * (1 + 15 * (1 - math.exp(-1 / 15))))
    assert effective_tokens(1e13, 1e10) == pytest.approx(1.6e11, rel=1e-6)


def test_a_batch_off_the_best_wastes_tokens_as_the_hyperbola_says():
    """Steps and tokens follow from the hyperbola itself, solved for S at a given B."""
    g, least_steps, least_batch = (HYPERBOLA.parameter(name) for name in ("g", "S_min", "B_min"))
    best = 2 ** (1 / g) * least_batch

    def tokens(batch: float) -> float:
        x = (batch / least_batch) ** g
        return batch * least_steps * (x / (x - 1)) ** (1 / g)

    for ratio in (0.25, 0.5, 1.0, 2.0, 4.0):
        assert wasted_by_batch(ratio, HYPERBOLA) == pytest.approx(tokens(ratio * best) / tokens(best), rel=1e-9)
    assert wasted_by_batch(1.0, HYPERBOLA) == pytest.approx(1)
    assert wasted_by_batch(0.01, HYPERBOLA) == math.inf
    assert wasted_by_batch(3.0, None) == 1.0


@pytest.mark.parametrize("noise", ["masked", "balanced", "uniform"])
@pytest.mark.parametrize("flops", [1e18, 1e19, 1e20, 1e22])
def test_a_budget_alone_gives_the_laws_optimum_in_a_usual_shape(noise, flops):
    made = plan(Goal(noise, flops=flops), BOOK)
    best = compute_optimal(flops, noise)
    assert made.flops("deepseek") == pytest.approx(flops, rel=2e-3)
    assert 0 <= made.size_cost <= 0.0025
    assert made.flops_per_token("deepseek") == pytest.approx(best.flops_per_token, rel=0.15)
    assert made.global_batch_size * 2048 == pytest.approx(best.batch_tokens, rel=0.15)
    assert made.loss == pytest.approx(best.loss, rel=1e-3)
    assert made.annealed_loss == pytest.approx(made.loss / 1.0245)
    low, high = made.interval()
    assert low <= made.loss <= high
    size = made.size
    assert size.hidden % size.heads == 0
    assert size.hidden // size.heads in (64, 128)
    assert 48 <= size.hidden / size.layers <= 220


def test_the_papers_own_shapes_are_among_those_considered():
    known = {(8, 512), (10, 640), (12, 768), (16, 1024), (20, 1536), (18, 3072), (19, 3072), (34, 4608)}
    assert known <= {(size.layers, size.hidden) for size in model_sizes()}
    assert [ModelSize(*shape).heads for shape in ((16, 1024), (20, 1536), (34, 4608))] == [16, 12, 36]
    assert [ModelSize(1, width).heads for width in (16, 20, 24, 64, 80, 96, 192, 200)] == [1, 1, 1, 1, 1, 1, 3, 2]
    assert (1, 16) in {(size.layers, size.hidden) for size in model_sizes()}


def test_the_range_of_sizes_ends_where_the_tolerance_is_used_up():
    goal = Goal("masked", flops=1e20, tolerance=0.0025)
    laws = laws_for(goal, BOOK)
    aimed = aim(goal, laws, 1.0245)
    for end in size_range(goal, laws, aimed):
        assert laws.loss(end, 1e20 / end) == pytest.approx(1.0025 * laws.best_loss(1e20), rel=1e-6)
    for size in sizes(goal, laws, aimed):
        per_token = flops_per_token(size.layers, size.hidden, 2048)
        assert laws.loss(per_token, 1e20 / per_token) <= 1.0025 * laws.best_loss(1e20)


@pytest.mark.parametrize(
    ("given", "check"),
    [
        ({"tokens": 1e10}, lambda made: 0.99e10 < made.tokens <= 1e10),
        ({"params": 5e8}, lambda made: made.size.params == pytest.approx(5e8, rel=0.05)),
        ({"params": 5e8, "tokens": 1e10}, lambda made: 0.99e10 < made.tokens <= 1e10),
        ({"loss": 2.7}, lambda made: made.annealed_loss == pytest.approx(2.7, abs=2e-4)),
        ({"loss": 2.7, "params": 8e8}, lambda made: made.annealed_loss == pytest.approx(2.7, abs=2e-4)),
        ({"loss": 2.8, "flops": 1e20}, lambda made: made.annealed_loss <= 2.8 and made.size.params < 2e8),
        ({"loss": 2.8, "tokens": 3e10}, lambda made: made.tokens <= 3e10 and made.annealed_loss < 2.801),
        ({"flops": 1e20, "params": 1e9}, lambda made: made.flops("deepseek") == pytest.approx(1e20, rel=1e-3)),
    ],
)
def test_one_or_two_of_the_goals_determine_a_run(given, check):
    made = plan(Goal("uniform", **given), BOOK)
    assert check(made)
    assert made.epochs is None or made.epochs <= 1 or "flops" in given


def test_a_size_that_was_given_has_its_price_against_the_optimum():
    made = plan(Goal("masked", flops=1e20, size=ModelSize(24, 3072)), BOOK)
    laws, per_token = made.frontier, flops_per_token(24, 3072, 2048)
    assert made.size_cost == pytest.approx(laws.loss(per_token, 1e20 / per_token) / laws.best_loss(1e20) - 1)
    assert made.size_cost > 0.01
    low, high = size_range(made.goal, laws, made.aim)
    assert low < laws.best_size(1e20) < high < per_token


def test_a_corpus_that_is_too_small_makes_the_model_larger_and_costs_loss():
    free = plan(Goal("uniform", flops=1e20), BOOK)
    bound = plan(Goal("uniform", flops=1e20, tokens=1e10), BOOK)
    tight = plan(Goal("uniform", flops=1e20, tokens=1e9), BOOK)
    assert not free.bounds
    assert bound.size.params > free.size.params
    (found,) = bound.bounds
    assert found.what.startswith("tokens: the optimum wants 2.71e+10 and 1e+10 are at hand")
    assert 0.0005 < found.cost < 0.005
    assert bound.loss / free.loss - 1 == pytest.approx(found.cost, abs=1e-4)
    assert tight.bounds[0].cost > 10 * found.cost
    assert tight.epochs == pytest.approx(4, abs=0.01)
    assert "what repeated tokens are worth was measured for autoregressive models alone" in bound.extrapolations


def test_bounds_on_batch_rate_and_steps_are_named_with_their_price():
    def only(**given):
        (bound,) = plan(Goal("masked", **given), BOOK).bounds
        return bound

    batch = only(flops=1e22, max_batch=1000)
    assert batch.what == "batch: at most 1,000 sequences; 1,000 sequences in place of 3,834"
    assert batch.cost == pytest.approx(0.04, abs=0.02)
    rate = plan(Goal("masked", flops=1e22, max_learning_rate=1.5), BOOK)
    assert rate.bounds[0].what.startswith("learning rate: at most 1.5; ")
    assert rate.learning_rate == pytest.approx(1.5, rel=1e-3)
    assert rate.learning_rate <= 1.5
    cluster = only(flops=1e18, batch_multiple=512)
    assert cluster.what == "cluster: the batch is a multiple of 512 sequences; 512 sequences in place of 153"
    assert cluster.cost > 0.001
    few = plan(Goal("masked", flops=1e18, batch_multiple=512), BOOK)
    assert few.steps < 5000
    assert "steps 3,785 are fewer than 5,000, the fewest that were measured" in few.extrapolations


def test_gpus_and_hours_are_a_budget_converted_at_the_shape():
    goal = Goal("masked", hardware=Hardware(gpu("h100"), 64, 0.4, 24))
    made = plan(goal, BOOK)
    budget = 989e12 * 64 * 0.4 * 24 * 3600
    assert made.flops("full") == pytest.approx(budget, rel=1e-3)
    assert made.aim.flops / budget == pytest.approx(
        made.flops_per_token("deepseek") / made.flops_per_token("full"), rel=0.02
    )
    assert made.flops("deepseek") < 0.95 * made.flops("full")


def test_laws_of_a_count_answer_budgets_of_that_count():
    made = plan(Goal("masked", flops=1e20, flop_count="chinchilla"), BOOK)
    assert made.frontier.flop_count == "chinchilla"
    assert made.flops("chinchilla") == pytest.approx(1e20, rel=1e-3)
    assert made.aim.size == pytest.approx(0.00340 * 1e20**0.59714)


def test_every_extrapolation_is_named():
    inside = plan(Goal("masked", flops=1e19), BOOK)
    assert inside.extrapolations == ()
    outside = plan(Goal("masked", flops=1e22, seq_length=4096, vocab_size=50_000), BOOK)
    assert [said.split()[0] for said in outside.extrapolations] == [
        *("flops", "params", "batch_tokens", "seq_length", "vocab_size")
    ]
    assert "flops 1e+22 is above 2e+20, the end of what was measured" in outside.extrapolations
    assert "seq_length 4,096 is above 2,048, the end of what was measured" in outside.extrapolations


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "nothing determines the run; give one or two of a budget"),
        ({"hardware": Hardware(gpu("h100"), 8, 0.4)}, "nothing determines the run"),
        ({"flops": 1e20, "tokens": 1e10, "params": 1e8}, "cannot all hold; give at most two of them"),
        ({"flops": -1.0}, "the budget must be a positive number, found -1"),
        ({"tokens": math.nan}, "the number of tokens must be a positive number, found nan"),
        ({"flops": 1e30}, r"the goal needs 1e\+30 FLOPs, but the laws hold between 5e\+17 and 2e\+20"),
        ({"flops": 1e10}, "nothing can be planned"),
        ({"loss": 1.5}, "nothing can be planned"),
        ({"loss": 0.1}, r"a loss of 0\.10245 nats per token is out of reach of the law"),
        ({"loss": 1.0, "flops": 1e20}, "a loss of 1.0245 is out of reach: the best that this budget gives is 2.771"),
        ({"loss": 2.0, "params": 1e6}, "never reaches a loss of"),
        ({"flops": 1e20, "hardware": Hardware(gpu("h100"), 8, 0.4, 3)}, "are two budgets"),
    ],
)
def test_a_goal_that_cannot_be_met_is_refused_in_one_sentence(given, sentence):
    with pytest.raises(ConfigError, match=sentence) as refused:
        plan(Goal("masked", **given), BOOK)
    assert "\n" not in str(refused.value)


def own_laws(**more) -> LawBook:
    surface = Law(
        quantity="loss",
        form="surface",
        noise="masked",
        flop_count="deepseek",
        parameters={name: Estimate(value=value) for name, value in
                    {"E": 1.5, "a": 222.0, "alpha": 0.292, "b": 1920.0, "beta": 0.367}.items()},
        valid={"flops": (1e17, 1e19)},
        **more,
    )  # fmt: skip
    return LawBook((LawFile(name="mine", source="runs/mine", laws=(surface,)), *BOOK.files))


def test_a_surface_of_ones_own_plans_and_names_the_other_laws():
    book = own_laws(provisional=True)
    made = plan(Goal("masked", flops=1e19), book)
    assert made.frontier.size_law is None
    assert made.frontier.floor == 1.5
    size = made.aim.size
    assert made.frontier.loss(size, 1e19 / size) < min(
        made.frontier.loss(size * factor, 1e19 / size / factor) for factor in (0.9, 1.1)
    )
    assert made.remarks == (
        "the laws of mine are provisional",
        "batch_tokens and learning_rate and annealing_ratio by the laws of gidd; mine has none of its own",
    )
    assert made.second_method(book) is None
    with pytest.raises(ConfigError, match=r"a loss of 1\.2294 is never reached: the law's floor is 1\.5"):
        plan(Goal("masked", loss=1.2), book)


@pytest.mark.parametrize(("loss", "size"), [((30.0, -0.06), (0.1, 1.2)), ((30.0, 0.01), (0.1, 0.5))])
def test_laws_that_have_no_optimum_are_refused(loss, size):
    power = {"of": "flops", "form": "power", "noise": "masked", "flop_count": "deepseek"}
    laws = tuple(
        Law(quantity=name, parameters={"A": Estimate(value=a), "alpha": Estimate(value=b)}, **power)
        for name, (a, b) in {"loss": loss, "flops_per_token": size}.items()
    )
    book = LawBook((LawFile(name="mine", source="runs", laws=laws), *BOOK.files))
    with pytest.raises(
        ConfigError, match=r"the laws of mine for masked noise cannot be planned with: .* fit more runs"
    ):
        plan(Goal("masked", flops=1e19), book)


def of_my_own(quantity: str, parameters: dict[str, float], **more) -> Law:
    """Return a law of a user's own file."""
    fields = {"form": "power", "of": "flops", "noise": "masked", "flop_count": "chinchilla"} | more
    return Law(
        quantity=quantity, parameters={name: Estimate(value=value) for name, value in parameters.items()}, **fields
    )


def with_my_laws(*laws: Law) -> LawBook:
    return LawBook((LawFile(name="mine", source="runs/mine", laws=laws), *BOOK.files))


def of_the_optimum(**more) -> tuple[Law, Law]:
    loss = of_my_own("loss", {"A": 30.0, "alpha": -0.05}, **more)
    return loss, of_my_own("flops_per_token", {"A": 0.1, "alpha": 0.5}, **more)


def test_laws_of_ones_own_of_another_count_are_not_passed_over():
    made = plan(Goal("masked", flops=1e20, flop_count="deepseek"), with_my_laws(*of_the_optimum()))
    assert made.frontier.flop_count == "chinchilla"
    assert made.flops("deepseek") == pytest.approx(1e20, rel=1e-3)
    ratio = made.flops_per_token("chinchilla") / made.flops_per_token("deepseek")
    assert made.aim.flops / 1e20 == pytest.approx(ratio, rel=0.03)  # at the best size, not at the shape beside it


def test_laws_that_name_no_noise_plan_any_and_say_so():
    made = plan(Goal("uniform", flops=1e20), with_my_laws(*of_the_optimum(noise="all")))
    assert "the laws of mine name no noise; they are taken for uniform" in made.remarks
    with pytest.raises(ConfigError, match=r"no law is known for the noise `unifrom`; did you mean `uniform`"):
        plan(Goal("unifrom", flops=1e20), with_my_laws(*of_the_optimum(noise="all")))


def hyperbola(g: float, noise: str = "masked") -> Law:
    fields = {"form": "hyperbola", "of": None, "noise": noise, "size": f"size {g}"}
    return of_my_own("batch_efficiency", {"S_min": 1e3, "B_min": 1e5, "g": g}, **fields)


def test_the_middle_hyperbola_of_the_noise_prices_a_batch():
    laws = [hyperbola(g) for g in (0.2, 3.0, 0.4)] + [hyperbola(0.9, "uniform")]
    assert efficiency_law(with_my_laws(*laws), "masked").parameter("g") == 0.4
    assert efficiency_law(with_my_laws(*laws[:3]), "uniform") is efficiency_law(BOOK, "uniform")


def test_a_batch_that_never_gets_there_is_refused():
    book = with_my_laws(*of_the_optimum(), hyperbola(3.0))
    with pytest.raises(ConfigError, match=r"a batch of 100 sequences \(batch: at most 100 sequences.*allow a larger"):
        plan(Goal("masked", flops=1e20, max_batch=100), book)
