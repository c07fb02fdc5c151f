"""Machine code against numpy: the same bits, the same refusals, no lock held, and numpy wherever numba cannot help."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import threading
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from megadiff.diffusion import noising
from megadiff.diffusion.config import ConditioningConfig
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.noising import NoisedBatch, noise_batch
from megadiff.diffusion.processes.gidd_snr import GiddSnr
from megadiff.diffusion.processes.gidd_time import GiddTime, TimeSchedule
from megadiff.diffusion.schedules import SCHEDULES
from megadiff.errors import ConfigError, DataError
from tests.golden import make_noise_hashes

CONDITIONINGS = (
    {},
    {"preset": "as_described"},
    {"preset": "as_released"},
    {"per_token_noise": 0.3, "linear_noise": 0.3, "prompt": 0.5, "infilling": 0.5, "pad_insertion": 0.3},
    {"linear_noise": 1.0, "prompt": 1.0, "max_fraction": 0.4, "pad_insertion": 0.4, "pad_insertion_law": "released"},
)


@pytest.fixture(scope="module")
def machine_code() -> ModuleType:
    pytest.importorskip("numba")
    code = noising.load_kernel()
    assert code is not None
    return code


@pytest.fixture
def by_machine_code(machine_code, monkeypatch) -> None:
    monkeypatch.setattr(noising, "kernel", noising.Kernel(module=machine_code, is_settled=True))


def processes(vocab: int, mask: int) -> list[NoiseProcess]:
    hybrid = [HybridMixing(vocab, mask, shift) for shift in (-1000.0, -2.0, 0.0, 1000.0)]
    scheduled = [HybridMixing(vocab, mask, 2.0, 0.5).with_schedule(kind(-7.0, 8.5)) for kind in SCHEDULES.values()]
    laws = [GiddTime(0.0), GiddTime(0.2), GiddTime(0.2, 0.5)]
    return hybrid + scheduled + [NoiseProcess(vocab, mask, law, TimeSchedule(law)) for law in laws]


def both(monkeypatch, machine_code: ModuleType, *arguments: Any, **options: Any) -> tuple[NoisedBatch, NoisedBatch]:
    """Return a batch by numpy and by machine code, the latter made by no other."""
    monkeypatch.setattr(noising, "kernel", noising.Kernel(is_settled=True))
    plain = noise_batch(*arguments, **options)
    monkeypatch.setattr(noising, "kernel", noising.Kernel(module=machine_code, is_settled=True))
    with monkeypatch.context() as only:
        only.setattr(noising, "_noise_part", None)
        return plain, noise_batch(*arguments, **options)


def assert_same(one: NoisedBatch, other: NoisedBatch) -> None:
    for name, values in one.columns().items():
        found = getattr(other, name)
        assert (values.dtype, values.shape) == (found.dtype, found.shape), name
        assert torch.equal(values, found), name


@pytest.mark.parametrize(("vocab", "mask"), [(2, 0), (11, 10), (131072, 3)])
def test_the_bits_are_numpy_s_for_every_noise(vocab, mask, machine_code, monkeypatch):
    cases = itertools.product(processes(vocab, mask), CONDITIONINGS)
    for number, (process, conditioning) in enumerate(cases):
        draw = np.random.default_rng(number)
        count, length = (6, 75) if number % 5 else (1, (0, 1, 2, 700)[number // 5 % 4])
        ids = draw.integers(0, vocab - 1, (count, length))
        first = 2**32 - 3 if number % 2 else int(draw.integers(0, 2**40))
        options = {"global_batch": (None, 24, 7)[number % 3], "batch_origin": number % 4, "stratified": number % 7 > 0}
        plain, fast = both(
            monkeypatch,
            machine_code,
            ids + (ids >= mask),
            seed=number,
            sample_index=np.arange(first, first + count),
            process=process,
            conditioning=ConditioningConfig.model_validate(conditioning),
            pad_id=1 - mask if vocab == 2 else 2,
            **options,
        )
        assert_same(plain, fast)


@pytest.mark.usefixtures("by_machine_code")
def test_the_committed_hashes_are_those_of_machine_code_too():
    assert make_noise_hashes.make() == json.loads(make_noise_hashes.FILE.read_text())
    assert make_noise_hashes.make_time() == json.loads(make_noise_hashes.TIME_FILE.read_text())


def test_ids_of_other_types_and_layouts_give_the_same(machine_code, monkeypatch):
    options = {"seed": 1, "sample_index": [4, 5, 6], "process": HybridMixing(11, 3, 0.0)}
    ids = np.arange(4, 11)[np.random.default_rng(0).integers(0, 7, (3, 40))]
    want, _ = both(monkeypatch, machine_code, ids, **options)
    for same in (ids.astype(np.uint16), ids.astype(np.int32), np.asfortranarray(ids), torch.from_numpy(ids).int()):
        assert_same(want, both(monkeypatch, machine_code, same, **options)[1])
    read_only = ids.copy()
    read_only.flags.writeable = False
    both(monkeypatch, machine_code, read_only, **options)[1].clean.zero_()
    assert (read_only == ids).all()


@pytest.mark.usefixtures("by_machine_code")
def test_wrong_input_is_refused_as_numpy_s_code_refuses_it():
    options = {"seed": 0, "process": HybridMixing(11, 6, 0.0)}
    for ids, index, error, words in (
        (np.full((1, 4), 6), [0], DataError, "contain the mask token"),
        (np.full((1, 4), 11), [0], DataError, "outside the vocabulary of 11"),
        (np.full((1, 4), -1), [0], DataError, "outside the vocabulary of 11"),
        (np.zeros((1, 4), dtype=np.int64), [-1], ValueError, "counts from 0"),
        (np.zeros((2, 4), dtype=np.int64), [0], ValueError, r"sample_index \[B\]"),
    ):
        with pytest.raises(error, match=words):
            noise_batch(ids, sample_index=index, **options)
    clean = np.zeros((1, 4), dtype=np.int64)
    with pytest.raises(ConfigError, match="pad id"):
        noise_batch(clean, sample_index=[0], conditioning=ConditioningConfig(pad_insertion=0.1), **options)
    with pytest.raises(ValueError, match="global_batch must be at least 1"):
        noise_batch(clean, sample_index=[0], global_batch=0, **options)


@dataclass(frozen=True)
class OwnLaw(GiddSnr):
    """A law of a user's own, with another formula than the one it derives from."""

    def logit_u(self, log_snr: Any, functions: Any) -> Any:
        """Return the log odds of uniform noise."""
        return super().logit_u(log_snr, functions) - 1.0


@dataclass(frozen=True)
class OwnTime(GiddTime):
    """A law of time of a user's own."""


@pytest.mark.usefixtures("by_machine_code")
def test_noise_of_a_user_s_own_is_left_to_numpy():
    process = NoiseProcess(11, 3, OwnLaw(0.0))
    own_schedule = NoiseProcess(11, 3, GiddSnr(0.0), TimeSchedule(OwnTime(0.2)))
    for unknown in (process, own_schedule, NoiseProcess(11, 3, OwnTime(0.2))):
        assert noising.kernel.for_tokens(10, unknown) is None
    options = {"seed": 0, "sample_index": range(4)}
    own = noise_batch(np.zeros((4, 500), dtype=np.int64), process=process, **options)
    same = noise_batch(np.zeros((4, 500), dtype=np.int64), process=HybridMixing(11, 3, -1.0), **options)
    assert torch.equal(own.noised, same.noised)


def test_machine_code_is_loaded_once_and_after_enough_tokens(monkeypatch):
    loaded = []
    monkeypatch.setattr(noising, "load_kernel", lambda: loaded.append("code") or "code")
    kernel, process = noising.Kernel(), HybridMixing(11, 3, 0.0)
    assert kernel.for_tokens(noising.KERNEL_WORTH_TOKENS - 1, process) is None
    assert [kernel.for_tokens(1, process), kernel.for_tokens(1, process)] == ["code", "code"]
    assert loaded == ["code"]


def test_without_a_working_numba_numpy_noises(monkeypatch):
    numba = pytest.importorskip("numba")
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, "megadiff.diffusion.noise_kernel", None)
        broken.delattr("megadiff.diffusion.noise_kernel", raising=False)
        with pytest.warns(UserWarning, match="noised by numpy, since numba fails"):
            assert noising.load_kernel() is None
    with monkeypatch.context() as switched_off:
        switched_off.setattr(numba.config, "DISABLE_JIT", 1)
        assert noising.load_kernel() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert noising.load_kernel() is None


def test_code_is_compiled_where_no_cache_can_be_written(machine_code, tmp_path, monkeypatch):
    """A file in the place of the cache's folder refuses everyone, a superuser too."""
    source = tmp_path / "twice.py"
    source.write_text("def twice(x):\n    return 2 * x\n")
    spec = importlib.util.spec_from_file_location("twice", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cache, signature = tmp_path / "__pycache__", "int64(int64)"
    assert machine_code.compiled(module.twice, signature)(4) == 8
    assert any(path.suffix == ".nbi" for path in cache.iterdir())
    for path in cache.iterdir():
        path.write_bytes(b"")  # as a full disk may leave it
    assert machine_code.compiled(module.twice, signature)(4) == 8
    for path in cache.iterdir():
        path.unlink()
    cache.rmdir()
    cache.touch()
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "/dev/null")
    assert machine_code.compiled(module.twice, signature)(4) == 8


@pytest.mark.usefixtures("by_machine_code")
def test_other_threads_run_while_machine_code_does(monkeypatch):
    """A result half written is visible to another thread only if the interpreter's lock is released meanwhile."""
    count, seen = 4096, []
    clean = np.zeros((count, 128), dtype=np.int64)
    empty = np.empty
    made: list[np.ndarray] = []

    def remembered(shape: Any, dtype: Any) -> np.ndarray:
        array = empty(shape, dtype)
        array.fill(77)
        made.append(array)
        return array

    monkeypatch.setattr(np, "empty", remembered)
    options = {"seed": 0, "sample_index": range(count), "process": HybridMixing(11, 3, 0.0)}
    for _ in range(200):
        made.clear()
        thread = threading.Thread(target=noise_batch, args=(clean,), kwargs=options)
        thread.start()
        while thread.is_alive() and not seen:
            patterns = [array for array in list(made) if array.dtype == np.int8]
            if patterns and patterns[0][0] == 0 and patterns[0][-1] == 77:
                seen.append(True)
        thread.join()
        if seen:
            break
    assert seen
