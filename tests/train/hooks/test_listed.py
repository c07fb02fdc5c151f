"""Hooks and sinks of the user's own: modules outside the package, in the real program."""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml

from megadiff.config.load import load_config
from megadiff.errors import ConfigError
from megadiff.metric_lines import read_metrics
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig
from megadiff.train.config import HOOKS, HookConfig
from megadiff.train.hooks import HookContext, MetricSinks, build_listed
from tests.support.runs import toy_config, toy_tree
from tests.support.whole_runs import Ranks, status

with quiet():
    from megadiff.testing.hooks import check_hook, check_sink
    from megadiff.testing.toy_run import LAYOUTS

pytestmark = pytest.mark.timeout(900)

HOOK = '''
import random
import numpy
import torch
from megadiff.config.section import Section
from megadiff.train.hooks import Hook

class Settings(Section):
    prefix: str = "own"

class Best(Hook):
    """The lowest loss so far, by a hook that also disturbs every random state there is."""

    def __init__(self, settings, context):
        self.settings, self.context, self.best = settings, context, float("inf")

    def __call__(self, info):
        for module, seed in ((random, random.seed), (numpy, numpy.random.seed), (torch, torch.manual_seed)):
            seed(info.step)
        torch.randn(3), numpy.random.rand(), random.random()
        self.best = min(self.best, info.metrics["loss"])
        self.context.write({f"{self.settings.prefix}/best": self.best}, info.step)

    def state(self):
        return {"best": self.best}

    def restore(self, state):
        self.best = state["best"]

def build(settings, context):
    return Best(settings, context)
'''

SINK = """
import json
from megadiff.config.section import Section
from megadiff.train.hooks import MetricSink

class Settings(Section):
    path: str

class Lines(MetricSink):
    def __init__(self, settings, context):
        self.path = settings.path

    def open(self):
        self.file = open(self.path, "a")

    def write(self, line, step):
        line["step"] = -line["step"]  # the line is its own: no other sink sees this
        self.file.write(json.dumps(line) + "\\n")

    def close(self):
        self.file.close()

def build(settings, context):
    return Lines(settings, context)
"""

RAISES = """
import torch
from megadiff.train.hooks import Hook

class Raises(Hook):
    def __call__(self, info):
        if info.step == 3 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            return 1 / 0

def build(settings, context):
    return Raises()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A function that writes a module outside the package."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)

    package = tmp_path / "outside"
    package.mkdir()
    (package / "__init__.py").write_text("")
    yield lambda name, text: write(f"outside/{name}", text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "outside"]:
        del sys.modules[name]


def layouts(*names):
    return {name: LAYOUTS[name] for name in names}


def test_an_outside_hook_runs_on_one_and_two_ranks_and_changes_nothing(module):
    module("best", HOOK)
    check_hook({"name": "outside.best", "every": 2, "prefix": "mine"}, layouts=layouts("one rank", "data parallel"))


def test_an_outside_sink_gets_the_lines_that_the_real_program_writes(module, tmp_path, toy_corpus):
    module("lines", SINK)
    hooks = [{"name": "outside.lines", "every": 2, "path": str(tmp_path / "mine.jsonl")}]
    config = toy_config(toy_corpus, tmp_path, schedule__steps=5, eval__sequences=4, model__layers=1, hooks=hooks)
    ranks = Ranks(config, 1)
    assert ranks.end(within_s=120) == [0], ranks.said(0)
    own = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    lines = read_metrics(config.folder / "metrics.jsonl")
    assert [(line["step"], "loss" in line) for line in lines if line["step"] in (0, 2, 4, 5)] == [
        (-line["step"], "loss" in line) for line in own
    ]
    assert {-line["step"]: line["loss"] for line in own if "loss" in line} == {
        line["step"]: line["loss"] for line in lines if line["step"] in (2, 4, 5) and "loss" in line
    }


BOTH = '''
from megadiff.train.hooks import Hook, MetricSink

class Both(Hook, MetricSink):
    """Counts its calls and ends with an error if they are not what they must be."""

    def __init__(self):
        self.calls = []

    def open(self):
        self.calls.append("open")

    def __call__(self, info):
        self.calls.append(info.step)

    def write(self, line, step):
        self.calls.append(f"line {step}")

    def close(self):
        self.calls.append("close")

def build(settings, context):
    global made
    made = Both()
    return made
'''


def test_an_object_that_is_hook_and_sink_is_opened_and_closed_once(module):
    """Called as `Trainer` and `MetricSinks` call: the sink is opened first, a validation line precedes the hooks."""
    module("both", BOTH)
    config = SimpleNamespace(steps=3)
    context = HookContext(config, *[None] * 2, SimpleNamespace(is_main=True), *[None] * 3, (), (), MetricSinks(), None)
    (hook,) = build_listed([HOOKS.build(HookConfig, name="outside.both", every=2)], context)
    with pytest.raises(ValueError, match="figures of a hook cannot be called loss"):
        context.write({"loss": 1.0}, 0)
    context.write({"own": 1.0}, 0)
    hook.open()
    for step in (1, 2, 3):
        context.write({"own": 1.0}, step)
        hook(SimpleNamespace(step=step))
    hook.close()
    context.sinks.close()
    assert sys.modules["outside.both"].made.calls == ["open", "line 0", "line 2", 2, "line 3", 3, "close"]


LATE = """
from megadiff.train.hooks import Hook

class Late(Hook):
    def __call__(self, info):
        pass

    def close(self):
        raise RuntimeError("too late")

def build(settings, context):
    return Late()
"""


def test_a_hook_that_cannot_be_closed_is_logged_and_harms_nothing(module, caplog):
    """The run is over by then. Importing the module `log` of the hooks must not hide the logger."""
    import megadiff.train.hooks.log  # noqa: F401

    module("late", LATE)
    config = SimpleNamespace(steps=1)
    context = HookContext(config, *[None] * 2, SimpleNamespace(is_main=True), *[None] * 3, (), (), MetricSinks(), None)
    (hook,) = build_listed([HOOKS.build(HookConfig, name="outside.late")], context)
    hook.close()
    assert "hook `outside.late` could not be closed: RuntimeError: too late" in caplog.text


def test_a_sink_from_outside_keeps_the_contract(module, tmp_path):
    module("lines", SINK)
    entry = {"name": "outside.lines", "path": str(tmp_path / "mine.jsonl")}
    check_sink(entry, layouts=layouts("data parallel"))


def test_a_hook_that_raises_on_one_rank_ends_the_run_with_its_name(module, tmp_path, toy_corpus):
    module("raises", RAISES)
    hooks = [{"name": "outside.raises"}]
    config = toy_config(toy_corpus, tmp_path, schedule__steps=6, data__valid=[], model__layers=1, hooks=hooks)
    ranks = Ranks(config, 2)
    codes = ranks.end(within_s=120)
    sentence = (
        "hook `outside.raises` failed after step 3: ZeroDivisionError: division by zero (raises.py, line 8); correct "
        "it or take it out of `hooks`, then run the same command again"
    )
    assert codes[1] == 2, ranks.said(1)
    assert f"error: {sentence}" in ranks.said(1)
    assert "Traceback" not in ranks.said(1)
    assert codes[0] not in (0, None)
    end = time.monotonic() + 120
    while (found := status(config.folder))["state"] == "running" and time.monotonic() < end:
        time.sleep(0.05)  # the watcher of a rank writes it
    assert "hook `outside.raises` failed after step 3" in found["reason"], found


BREAKERS = {
    "in_place": (
        "for p in self.context.chunks[0].parameters():\n            with torch.no_grad():\n                p.mul_(1.5)",
        "hook `outside.breaks` changed weights of the model after step 1",
    ),
    "data": (
        "next(iter(self.context.chunks[0].parameters())).data.mul_(1.5)",
        "one rank: the figures of the run differ",
    ),
    "collective": ("dist.barrier()", "calls torch.distributed.barrier; declare `collectives = True`"),
    "state": ("self.calls += 1", "one rank: the state after a resume is "),
}


@pytest.mark.parametrize("kind", BREAKERS)
def test_the_contract_finds_what_breaks_it(module, kind):
    code, message = BREAKERS[kind]
    module(
        "breaks",
        "import torch\nimport torch.distributed as dist\nfrom megadiff.train.hooks import Hook\n"
        "class Breaks(Hook):\n    calls = 0\n    def __init__(self, context):\n        self.context = context\n"
        f"    def __call__(self, info):\n        {code}\n"
        "    def state(self):\n        return {'calls': self.calls}\n"
        "def build(settings, context):\n    return Breaks(context)\n",
    )
    with pytest.raises(AssertionError) as caught:
        check_hook("outside.breaks", layouts=layouts("one rank"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("{name: wanb, project: x}", "`hooks.0.name`: unknown name `wanb`; did you mean `wandb`"),
        ("{name: log}", "`log` is part of every run, with its settings under `log`; leave it out here"),
        ("{name: outside.empty}", "the module `outside.empty` has no function `build(settings, context)`"),
        ("{name: outside.gone}", "the module `outside.gone` cannot be found"),
        ("{name: outside.best, prefx: a}", "unknown key `hooks.0.prefx`"),
        ("{name: outside.best, every: 0}", "`hooks.0.every`"),
        ("{every: 2}", "hooks.0.name"),
    ],
)
def test_a_wrong_entry_is_refused_when_the_description_is_read(module, tmp_path, toy_corpus, entry, sentence):
    module("best", HOOK)
    module("empty", "")
    tree = toy_tree(toy_corpus, tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.dump(tree) + f"hooks:\n  - {entry}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml", [], RunConfig)
    assert sentence in str(caught.value)
    assert f"{tmp_path / 'run.yaml'}:" in str(caught.value)


def test_an_entry_keeps_its_own_keys_in_the_resolved_tree(module, tmp_path, toy_corpus):
    module("best", HOOK)
    config = toy_config(toy_corpus, tmp_path, hooks=[{"name": "outside.best", "every": 3}, {"name": "outside.best"}])
    found = config.model_dump(mode="json")["hooks"]
    assert found == [{"name": "outside.best", "every": every, "prefix": "own"} for every in (3, 1)]
    assert RunConfig.model_validate(config.model_dump(mode="json", by_alias=True)) == config


def test_what_a_hook_is_given_of_a_step_is_the_line_of_the_step():
    from megadiff.parallel.step_metrics import SIZE, metrics_of
    from megadiff.train.hooks import StepInfo, curves

    sums = torch.arange(1.0, SIZE + 1, dtype=torch.float64)
    info = StepInfo(4, sums, 1e-3, 2.0, 0.5)
    assert info.metrics == metrics_of(sums.tolist())
    line = {
        "step": 4,
        "loss": 0.5,
        "elbo": float("nan"),
        "epochs": {"a": 1},
        "mfu": None,
        "loss_by_log_snr": [[1, 2, 3]],
    }
    assert curves(line) == {"train/loss": 0.5, "epochs/a": 1.0}
    assert curves({"step": 4, "eval_elbo": 2, "eval_unigram": 3.0}) == {"eval/elbo": 2.0, "eval/unigram": 3.0}
    assert curves({"step": 4, "rms/w": 2.0, "skipped": "spike"}) == {"rms/w": 2.0}
