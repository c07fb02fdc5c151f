"""Charts of a report, made from the records of its runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megadiff.metric_lines import Line, number
from megadiff.report.line_chart import Chart, Curve, Point
from megadiff.report.run_record import AXIS_LABELS, Axis, RunRecord, levels, position_of

_NOISY = "nats per noisy token"
_BIN = "w (KL + IS), nats per token"
_Placed = list[tuple[float, Line]]


class RunCharts:
    """Charts of several runs over one axis; a run has the same colour in all of them."""

    def __init__(self, runs: Sequence[RunRecord], axis: Axis) -> None:
        self._runs = runs
        self._x_label = AXIS_LABELS[axis]
        self._positions = [position_of(axis, run.metrics.training) for run in runs]
        both = list(zip(runs, self._positions, strict=True))
        self._training = [_placed(run.metrics.training, position) for run, position in both]
        self._evaluations = [_placed(run.metrics.evaluations, position) for run, position in both]
        self._noise = [_placed(run.metrics.gradient_noise, position) for run, position in both]

    def learning(self) -> list[Chart]:
        """Return charts of the held-out bound, bound and loss of training batches, gradient norm, and learning rate.

        Runs that measured their gradient noise have two more.
        """
        skipped = self._skipped()
        foot = "Bars at the foot: steps that made no update." if skipped else ""
        return [
            self._chart(
                "held-out",
                "Held-out ELBO",
                "nats per token",
                [*self._held_out(), *self._baselines()],
                remark="Bars: one standard error over rows. Fixed rows and noise, so runs can be compared. "
                "Unigram: the best value of a model without context. Bigram: a model that knows the previous token.",
            ),
            self._chart("elbo", "ELBO of training batches", _NOISY, self._figure("elbo")),
            self._chart(
                "loss",
                "Training loss",
                _NOISY,
                self._figure("loss"),
                marks=skipped,
                remark=f"The quantity that is minimised, a reweighted bound. {foot}",
            ),
            self._chart("grad-norm", "Gradient norm before clipping", "norm", self._figure("grad_norm")),
            self._chart("lr", "Learning rate", "learning rate", self._figure("lr")),
            *self._gradient_noise(),
        ]

    def speed(self) -> list[Chart]:
        """Return charts of throughput, FLOP/s and memory."""
        charts = [
            self._chart("tokens-per-s", "Throughput", "tokens per second", self._figure("tokens_per_s")),
            self._chart(
                "tflops",
                "Model arithmetic",
                "TFLOP/s per device",
                self._figure("tflops_per_device"),
                remark="Model FLOPs: 6 per matrix entry and token, the output head's included, and 12 L d S.",
            ),
            self._chart(
                "executed-tflops",
                "Executed arithmetic",
                "TFLOP/s per device",
                self._figure("executed_tflops_per_device"),
                remark="Matrix products as computed: the output head where it is applied, recomputed parts twice.",
            ),
        ]
        if any(number(line, "mfu") is not None for run in self._runs for line in run.metrics.training):
            charts.append(self._chart("mfu", "Model FLOPs utilisation", "share of peak", self._figure("mfu")))
            charts.append(self._chart("hfu", "Executed FLOPs utilisation", "share of peak", self._figure("hfu")))
        memory = _curves(self._runs, self._training, lambda line: _scaled(number(line, "peak_bytes"), 2**30))
        return [*charts, self._chart("memory", "Peak memory of the main rank", "GiB", memory)]

    def last_levels(self) -> Chart:
        """Return a chart of the bound by noise level at each run's last evaluation that has it, constant within
        a bin."""
        curves = []
        for style, run in enumerate(self._runs):
            lines = [line for line in run.metrics.evaluations if levels(line, "eval_loss_by_log_snr")]
            if lines:
                bins = levels(lines[-1], "eval_loss_by_log_snr")
                points = [Point(edge, value) for low, high, value in bins for edge in (low, high)]
                curves.append(Curve(f"{run.label} (step {lines[-1]['step']})", style, points))
        return Chart(
            name="levels-last",
            title="By noise level, last evaluation",
            x_label="log-SNR (left: pure noise, right: clean text)",
            y_label=_BIN,
            curves=curves,
            can_x_be_log=False,
        )

    def levels_over_training(self) -> list[Chart]:
        """Return one chart per log-SNR bin, most noise first: training batches as a line, evaluations as dots."""
        trained = [_by_bin(placed, "loss_by_log_snr") for placed in self._training]
        held_out = [_by_bin(placed, "eval_loss_by_log_snr") for placed in self._evaluations]
        bins = sorted({edges for found in (*trained, *held_out) for edges in found})
        return [
            self._chart(
                f"level-{place}",
                f"log-SNR {edges[0]:g} to {edges[1]:g}",
                _BIN,
                [
                    Curve(run.label, style, found[style].get(edges, []), has_dots)
                    for found, has_dots in ((trained, False), (held_out, True))
                    for style, run in enumerate(self._runs)
                ],
                remark="Line: training batches that drew such noise levels. Dots: held-out.",
            )
            for place, edges in enumerate(bins)
        ]

    def _gradient_noise(self) -> list[Chart]:
        """Return charts of the gradient noise scale and of the noise draws' part in it; none if no run measured it."""
        if not any(run.metrics.gradient_noise for run in self._runs):
            return []
        scale, share = (
            _curves(
                self._runs,
                self._noise,
                lambda line, key=name: number(line, key),
                error=lambda line, key=f"{name}_stderr": number(line, key),
                has_dots=True,
            )
            for name in ("gradient_noise/scale", "gradient_noise/noise_share")
        )
        remark = "Bars: one standard error. A batch far below the scale wastes steps, one far above it wastes tokens."
        shared = "The rest comes from which sequences a batch holds."
        return [
            self._chart("noise-scale", "Gradient noise scale", "sequences", scale, remark=remark),
            self._chart("noise-share", "Gradient variance from noise draws", "share of it", share, remark=shared),
        ]

    def _held_out(self) -> list[Curve]:
        return _curves(
            self._runs,
            self._evaluations,
            lambda line: number(line, "eval_elbo"),
            error=lambda line: number(line, "eval_elbo_stderr"),
            has_dots=True,
        )

    def _baselines(self) -> list[Curve]:
        """Return a level line for each figure of a model without a network; runs with the same figure share it."""
        levels_seen: dict[tuple[str, float], list[float]] = {}
        for placed in self._evaluations:
            for x, line in placed:
                for key in ("eval_unigram", "eval_bigram"):
                    if (value := number(line, key)) is not None:
                        levels_seen.setdefault((key.removeprefix("eval_"), value), []).append(x)
        return [
            Curve(f"{name} {value:.4f}", place, [Point(x, value) for x in sorted(set(xs))], is_reference=True)
            for place, ((name, value), xs) in enumerate(levels_seen.items())
        ]

    def _figure(self, key: str) -> list[Curve]:
        """Return curves of one figure of the training lines; null, written for a value that was not finite, breaks the
        curve."""
        having = [[(x, line) for x, line in placed if key in line] for placed in self._training]
        return _curves(self._runs, having, lambda line: number(line, key))

    def _skipped(self) -> dict[int, list[float]]:
        found = {}
        for style, (run, position) in enumerate(zip(self._runs, self._positions, strict=True)):
            places = [position(unusual.step) for unusual in run.unusual if unusual.is_skipped]
            if places:
                found[style] = [place for place in places if place is not None]
        return found

    def _chart(self, name: str, title: str, y_label: str, curves: Sequence[Curve], **more: Any) -> Chart:
        return Chart(name=name, title=title, x_label=self._x_label, y_label=y_label, curves=curves, **more)


def _placed(lines: Iterable[Line], position: Callable[[int], float | None]) -> _Placed:
    """Return lines with their positions on the x axis, without those whose position is not known."""
    places = ((position(line["step"]), line) for line in lines)
    return [(x, line) for x, line in places if x is not None]


def _curves(
    runs: Sequence[RunRecord],
    placed: Sequence[_Placed],
    value: Callable[[Line], float | None],
    *,
    error: Callable[[Line], float | None] = lambda _: None,
    has_dots: bool = False,
) -> list[Curve]:
    """Return one curve per run."""
    return [
        Curve(run.label, style, [Point(x, value(line), error(line)) for x, line in lines], has_dots)
        for style, (run, lines) in enumerate(zip(runs, placed, strict=True))
    ]


def _by_bin(placed: _Placed, key: str) -> dict[tuple[float, float], list[Point]]:
    """Return points by log-SNR bin; a batch without draws in a bin causes no gap in the bin's curve."""
    found: dict[tuple[float, float], list[Point]] = {}
    for x, line in placed:
        for low, high, value in levels(line, key):
            found.setdefault((low, high), []).append(Point(x, value))
    return found


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
