"""Law files: published numbers come back to the printed digits, damaged files are refused, written ones read equal."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from megadiff.errors import ConfigError
from megadiff.scaling.laws import (
    NOISES,
    Estimate,
    Excluded,
    Law,
    LawFile,
    UnseenPoint,
    compute_optimal,
    extrapolations,
    law_book,
    optimal_batch_tokens,
    optimal_learning_rate,
    published,
    read_law_file,
    write_law_file,
)

ROOT = Path(__file__).parents[2]

TABLE = [
    ("masked", 1e18, "2.75e+08", "3.64e+09", "3.482", "3.399", "2.91e+05", 142, "0.64", 12_504),
    ("masked", 1e20, "3.73e+09", "2.68e+10", "2.771", "2.705", "1.50e+06", 735, "1.12", 17_825),
    ("masked", 1e22, "5.06e+10", "1.98e+11", "2.205", "2.152", "7.78e+06", 3798, "1.96", 25_410),
    ("uniform", 1e18, "2.45e+08", "4.08e+09", "3.594", "3.508", "3.20e+05", 156, "0.66", 12_763),
    ("uniform", 1e20, "3.69e+09", "2.71e+10", "2.826", "2.759", "1.52e+06", 742, "1.12", 17_862),
    ("uniform", 1e22, "5.55e+10", "1.80e+11", "2.222", "2.169", "7.21e+06", 3521, "1.91", 24_999),
    ("uniform", 1e23, "2.15e+11", "4.65e+11", "1.971", "1.924", "1.57e+07", 7672, "2.49", 29_574),
]


@pytest.mark.parametrize(("noise", "flops", "size", "tokens", "loss", "after", "batch", "rows", "rate", "steps"), TABLE)
def test_the_optimum_of_a_budget_has_the_digits_of_the_table(
    noise, flops, size, tokens, loss, after, batch, rows, rate, steps
):
    found = compute_optimal(flops, noise)
    assert f"{found.flops_per_token:.2e}" == size
    assert f"{found.tokens:.2e}" == tokens
    assert (f"{found.loss:.3f}", f"{found.loss / 1.0245:.3f}") == (loss, after)
    assert (f"{found.batch_tokens:.2e}", round(found.batch_tokens / 2048)) == (batch, rows)
    assert f"{found.learning_rate:.2f}" == rate
    assert round(found.tokens / found.batch_tokens) == pytest.approx(steps, abs=2)


METHOD_2 = {
    "masked": ((23.10227, -0.04622), (294.51814, 0.40285), (0.00340, 0.59714)),
    "low_uniform": ((24.75090, -0.04755), (80.69196, 0.43305), (0.01239, 0.56695)),
    "balanced": ((25.33846, -0.04789), (87.87601, 0.43152), (0.01138, 0.56848)),
    "high_uniform": ((25.92804, -0.04832), (872.33185, 0.37881), (0.00115, 0.62119)),
    "uniform": ((26.75888, -0.04903), (744.89348, 0.38224), (0.00134, 0.61776)),
}
METHOD_1 = {
    "masked": ((27.21883, -0.04961), (56.78711, 0.43371), (0.01761, 0.56629), (0.00017, 0.62339)),
    "low_uniform": ((29.12047, -0.05088), (15.31607, 0.46459), (0.06529, 0.53541), (0.00069, 0.59040)),
    "balanced": ((29.84096, -0.05124), (14.45680, 0.46642), (0.06918, 0.53358), (0.00072, 0.58881)),
    "high_uniform": ((30.19375, -0.05141), (81.86373, 0.42701), (0.01222, 0.57298), (0.00011, 0.63110)),
    "uniform": ((31.26171, -0.05219), (161.92545, 0.41121), (0.00618, 0.58879), (0.00005, 0.64820)),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("count", "rows"), [("deepseek", METHOD_1), ("chinchilla", METHOD_2)])
def test_every_law_of_both_counts_is_the_published_one(noise, count, rows):
    found = compute_optimal(3e19, noise, method=count)
    values = (found.loss, found.tokens, found.flops_per_token, found.params)
    for value, (factor, exponent) in zip(values, rows[noise], strict=False):
        assert value == pytest.approx(factor * 3e19**exponent, rel=1e-12)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("count", ["deepseek", "chinchilla"])
@pytest.mark.parametrize("estimator", ["vertex", "best_run"])
def test_budget_is_size_times_tokens(noise, count, estimator):
    """C = M D holds as far as four printed digits of the coefficients of M* allow."""
    size, tokens = (
        published().law(quantity, noise=noise, flop_count=count, estimator=estimator)
        for quantity in ("flops_per_token", "tokens")
    )
    assert size.parameter("alpha") + tokens.parameter("alpha") == pytest.approx(1, abs=2.1e-5)
    assert size.value(1e19) * tokens.value(1e19) / 1e19 == pytest.approx(1, abs=0.006)


@pytest.mark.parametrize(
    ("tokens", "batch", "sizing", "rate"),
    [
        (1e9, 1.006e5, 8.30e4, 0.444),
        (1e10, 6.683e5, 5.458e5, 0.846),
        (7.36e10, 3.451e6, 2.792e6, 1.482),
        (1.79e11, 7.173e6, 5.780e6, 1.902),
        (1e12, 2.951e7, 2.359e7, 3.08),
    ],
)
def test_batch_and_rate_follow_the_published_laws(tokens, batch, sizing, rate):
    found = optimal_batch_tokens(tokens)
    assert found == pytest.approx(batch, rel=1e-3)
    assert optimal_batch_tokens(tokens, estimator="sizing") == pytest.approx(sizing, rel=1e-3)
    assert optimal_learning_rate(found) == pytest.approx(rate, rel=2e-3)


def test_laws_by_noise_and_size_and_the_surfaces_are_there():
    book = published()
    balanced = book.files[1]
    batch = next(law for law in balanced.laws if (law.quantity, law.noise) == ("batch_tokens", "balanced"))
    assert math.log(batch.value(1e10)) == pytest.approx(0.8373 * math.log(1e10) - 5.8452, abs=2e-3)
    assert batch.parameters["alpha"].interval == pytest.approx((0.8373 - 0.0214, 0.8373 + 0.0214), abs=1e-4)
    slopes = [law for law in balanced.laws if law.form == "slope"]
    assert [law.parameter("alpha") for law in slopes if law.quantity == "batch_tokens"] == [
        *(0.7847, 0.8148, 0.8395, 0.8127, 0.8365)
    ]
    surface = book.law("loss", noise="uniform", form="surface")
    assert surface.value(5.5844e10, 1.825e11) == pytest.approx(2.513, abs=0.003)


def test_every_published_law_says_where_it_holds():
    for file in published().files:
        for law in file.laws:
            assert law.valid["flops"] == (5e17, 2e20)
            assert law.valid["params"] == (25e6, 567e6)
    law = published().law("tokens", noise="masked", flop_count="deepseek")
    said = extrapolations([law], {"flops": 1e22, "params": 1e8, "learning_rate": 0.1})
    assert list(said.values()) == [
        "flops 1e+22 is above 2e+20, the end of what was measured",
        "learning_rate 0.1 is below 0.2, the end of what was measured",
    ]


def test_the_interval_opens_away_from_the_middle_of_the_range():
    law = published().law("loss", noise="uniform", flop_count="deepseek")
    low, high = law.interval(1e22)
    assert (low, high) == pytest.approx((law.value(1e22) * 1000**-0.00029, law.value(1e22) * 1000**0.00026))
    assert law.interval(1e19) == pytest.approx((law.value(1e19),) * 2)


def test_intervals_by_covariance_and_by_draws_agree():
    """log y = log A + alpha log x has the variance of a straight line."""
    generator = np.random.default_rng(3)
    covariance = np.array([[0.04, -0.0008], [-0.0008, 2e-5]])
    drawn = generator.multivariate_normal([math.log(5.0), -0.05], covariance, size=20_000)
    shared = {"quantity": "loss", "of": "flops", "form": "power", "flop_count": "deepseek"}
    shared["parameters"] = {"A": Estimate(value=5.0), "alpha": Estimate(value=-0.05)}
    by_covariance = Law(**shared, covariance=covariance.tolist())
    by_draws = Law(**shared, draws=[(math.exp(a), alpha) for a, alpha in drawn])
    x = 1e19
    sd = math.sqrt(0.04 - 2 * 0.0008 * math.log(x) + 2e-5 * math.log(x) ** 2)
    middle = 5.0 * x**-0.05
    wanted = (middle * math.exp(-1.95996 * sd), middle * math.exp(1.95996 * sd))
    assert by_covariance.interval(x) == pytest.approx(wanted, rel=1e-5)
    assert by_draws.interval(x) == pytest.approx(wanted, rel=0.01)


OWN = LawFile(
    name="mine",
    source="runs/mine, 2: both",
    valid={"flops": (1e11, 1e13)},
    provisional=True,
    excluded=(Excluded(run="a: b", reason="diverged at step 3"),),
    laws=(
        Law(
            quantity="loss",
            of="flops",
            form="power",
            noise="masked",
            flop_count="full",
            parameters={
                "A": Estimate(value=1.2345678901234567, standard_error=0.1, interval=(1.0, 1.5)),
                "alpha": Estimate(value=-0.1),
                "floor": Estimate(value=0.5),
            },
            confidence=0.9,
            covariance=((1.0, 0.0, 0.0), (0.0, 1e-9, 0.0), (0.0, 0.0, 0.0)),
            valid={"flops": (1e11, 1e12)},
            runs=12,
            r_squared=-0.5,
            held_out=(UnseenPoint(at=1e13, predicted=2.0, measured=2.1),),
            provisional=True,
            source="2026",
        ),
        Law(
            quantity="loss",
            form="surface",
            noise="masked",
            flop_count="full",
            parameters={name: Estimate(value=1e-7) for name in ("E", "a", "alpha", "b", "beta")},
            draws=((1.0, 2.0, 3.0, 4.0, 5.0), (1.0, 2.0, 3.0, 4.0, 6.5)),
        ),
    ),
)


def test_what_is_written_reads_equal(tmp_path):
    write_law_file(tmp_path / "own.yaml", OWN)
    found = read_law_file(tmp_path / "own.yaml")
    second = OWN.laws[1].model_copy(update={"valid": OWN.valid})
    assert found == OWN.model_copy(update={"laws": (OWN.laws[0], second)})
    text = (tmp_path / "own.yaml").read_text()
    assert text.count("flops: [100000000000.0") == 2, "a range that a law shares with its file is written once"
    write_law_file(tmp_path / "again.yaml", found)
    assert (tmp_path / "again.yaml").read_text() == text


@pytest.mark.parametrize("name", ["gidd", "gidd_variants"])
def test_published_files_survive_being_written(name, tmp_path):
    file = read_law_file(ROOT / f"megadiff/scaling/published/{name}.yaml")
    write_law_file(tmp_path / "copy.yaml", file)
    assert read_law_file(tmp_path / "copy.yaml") == file


GOOD = """\
format: 1
name: mine
source: runs
laws:
  - quantity: loss
    of: flops
    form: power
    noise: low-uniform
    flop_count: deepseek
    parameters: {A: 27, alpha: -0.05}
"""


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("format: 1", "format: 2", "own.yaml: `format` must be 1, the law file format of this version, found `2`"),
        ("format: 1\n", "", "own.yaml: `format` must be 1, the law file format of this version, found none"),
        ("quantity: loss", "quantity: los", "own.yaml:5: `laws.0.quantity` "),
        ("    noise: low", "    nose: low", "own.yaml:8: unknown key `laws.0.nose`; did you mean `laws.0.noise`?"),
        ("A: 27", "A: fast", "own.yaml:10: `laws.0.parameters.A`: a parameter is a number, or a mapping with `value`"),
        ("A: 27", "A: -27", "the factors A, a and b of a law must be positive"),
        ("A: 27", "A: .nan", "`laws.0.parameters.A` must be a finite number, found `.nan`"),
        ("A: 27", "A: {value: 3, interval: [5, 4]}", "lower end 5 lies above"),
        (", alpha: -0.05", "", "the form power lacks alpha; it has A, alpha, floor"),
        ("alpha: -0.05", "alpha: -0.05, gamma: 1", "the form power has no parameter gamma"),
        ("    of: flops\n", "", "the form power needs `of`"),
        ("    flop_count: deepseek\n", "", "a law with FLOPs needs `flop_count`"),
        ("flop_count: deepseek", "flop_count: kaplan", "`laws.0.flop_count` "),
        ("noise: low-uniform", "draws: [[1]]", "each of the draws must have 2 values"),
        ("noise: low-uniform", "covariance: [[1, 2]]", "the covariance of 2 parameters must be 2 x 2"),
        ("source: runs\n", "", "missing required key `source`"),
        (GOOD[GOOD.index("laws:") :], "laws: []\n", "`laws` is empty; at least one law is wanted"),
        ("name: mine", "name: mine\nname: yours", "own.yaml:3: the key `name` is given twice"),
        (GOOD, "- 1\n", "own.yaml: a law file is a mapping with the keys"),
        (GOOD, "", "own.yaml: a law file is a mapping with the keys"),
        ("parameters: {", "parameters: {{", "own.yaml:11: not valid YAML"),
    ],
)
def test_a_damaged_file_is_refused_by_file_and_key(tmp_path, old, new, sentence):
    path = tmp_path / "own.yaml"
    path.write_text(GOOD)
    assert read_law_file(path).laws[0].noise == "low_uniform"
    assert GOOD.replace(old, new) != GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError) as refused:
        read_law_file(path)
    assert sentence in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_and_two_laws_of_a_kind_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: the law file does not exist; check the path"):
        read_law_file(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder, not a plain file"):
        read_law_file(tmp_path)
    (tmp_path / "own.yaml").write_text(GOOD + GOOD[GOOD.index("  - ") :])
    with pytest.raises(
        ConfigError, match=r"two laws are of one kind \(loss, power, low_uniform, all, deepseek, vertex"
    ):
        read_law_file(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("flops", "noise", "method", "sentence"),
    [
        (
            1e20,
            "maskd",
            "deepseek",
            r"for the noise `maskd`; did you mean `masked`\? there are masked, ",
        ),
        (0, "masked", "deepseek", "a budget is a positive number of FLOPs, found 0"),
        (math.inf, "masked", "deepseek", "a budget is a positive number of FLOPs, found inf"),
        (1e20, "masked", "full", "no law of loss for masked noise by the count full "),
    ],
)
def test_a_budget_that_no_law_answers_is_refused(flops, noise, method, sentence):
    with pytest.raises(ConfigError, match=sentence):
        compute_optimal(flops, noise, method=method)


def test_laws_of_ones_own_come_before_the_published_ones(tmp_path):
    (tmp_path / "own.yaml").write_text(GOOD)
    book = law_book(tmp_path / "own.yaml")
    assert book.noises == ["low_uniform"]
    own = book.law("loss", noise="low_uniform", flop_count="deepseek")
    assert own.value(1e20) == 27 * 1e20**-0.05
    assert book.file_of(own).name == "mine"
    assert compute_optimal(1e20, "low-uniform", laws=book).loss == own.value(1e20)
    assert compute_optimal(1e20, "low-uniform", laws=book).tokens == compute_optimal(1e20, "low_uniform").tokens


_BATCH = re.compile(r"\bB\*? = 10\^(-[\d.]+) D\^(\d\.\d+)")
_RATE = re.compile(r"eta\* = 10\^(-[\d.]+) B\^(\d\.\d+)")
_SIZE = re.compile(r"M\* = (\d\.\d+) C\^(\d\.\d+)")
_NOISE = re.compile(r"compute-optimal for (\w+) noise")


def quoted() -> dict[str, str]:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.yaml")]
    pages += (ROOT / "examples").rglob("*.md")
    texts = {page.relative_to(ROOT).as_posix(): re.sub(r"\n *#", "\n", page.read_text()) for page in pages}
    return {name: " ".join(text.split()) for name, text in texts.items()}


def test_every_place_that_quotes_a_law_quotes_the_file():
    batch = [published().law("batch_tokens", noise="all", estimator=name) for name in ("vertex", "sizing")]
    rate = published().law("learning_rate", noise="all")
    counted = 0
    for page, text in quoted().items():
        for pattern, laws in ((_BATCH, batch), (_RATE, [rate])):
            for factor, exponent in pattern.findall(text):
                known = [(f"{math.log10(law.parameter('A')):.3f}", f"{law.parameter('alpha'):g}") for law in laws]
                assert (f"{float(factor):.3f}", f"{float(exponent):g}") in known, page
                counted += 1
        for factor, exponent in _SIZE.findall(text):
            noise = _NOISE.findall(text)[0]
            law = published().law("flops_per_token", noise=noise, flop_count="deepseek")
            assert (float(factor), float(exponent)) == (law.parameter("A"), law.parameter("alpha")), page
            counted += 1
    assert counted >= 20


def test_rates_at_a_number_of_steps_are_quoted_from_the_file():
    text = quoted()["examples/experiments/batch_size_sweep/README.md"]
    found = re.search(r"(\S+) B\^(\S+) \(1e5 steps\) and (\S+) B\^(\S+) \(5e4\), B in sequences", text)
    for steps, factor, exponent in ((100_000, *found.groups()[:2]), (50_000, *found.groups()[2:])):
        law = published().law("learning_rate", noise="all", estimator=f"at_{steps}_steps")
        assert float(factor) == pytest.approx(law.value(2048.0), rel=1e-5)
        assert float(exponent) == pytest.approx(law.parameter("alpha"), abs=5e-4)
    longest = published().law("learning_rate", noise="all", estimator="at_100000_steps")
    assert (f"{longest.value(2048.0):.2f}", f"{longest.parameter('alpha'):.2f}") == ("0.08", "0.34")
    assert "is about 0.08 B^0.34" in quoted()["docs/learning-rates.md"]


def test_the_gain_of_a_cooldown_is_quoted_from_the_file():
    ratio = published().law("annealing_ratio", noise="all", form="constant")
    text = quoted()["examples/presets/gidd.yaml"]
    assert f"worth {100 * (ratio.value() - 1):.2f} % of the ELBO" in text
    assert ratio.interval(1.0) == (1.0231, 1.0259)
