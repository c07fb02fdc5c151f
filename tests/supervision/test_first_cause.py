"""Which of the accounts is the cause, and that one watcher alone speaks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megadiff.supervision.first_cause import RankReport, Records, find_root_cause

HERE = RankReport(0, "node0", 100, "section step 17 at reduce", 17, 3, 30.2, 30.0, "S")


def ranks(**changed: RankReport) -> list[RankReport]:
    """Four at `reduce`, some of them changed."""
    return [changed.get(f"r{rank}", replace(HERE, rank=rank, pid=100 + rank)) for rank in range(4)]


def test_the_least_advanced_rank_is_the_culprit():
    behind = replace(HERE, rank=2, pid=102, place="section step 17 at data", index=1)
    assert find_root_cause(ranks(r2=behind), 4) == (
        "rank 2 (node0, pid 102) stalled: in section step 17 at data for 30.2 s (limit 30 s); state S (sleeping); "
        "the others wait in section step 17 at reduce"
    )


def test_an_earlier_step_is_less_advanced_whatever_its_marks():
    behind = replace(HERE, rank=1, pid=101, place="section step 16 at agree", step=16, index=9)
    assert find_root_cause(ranks(r1=behind), 4).startswith("rank 1 ")


def test_a_stopped_rank_is_the_culprit_wherever_it_is():
    behind = replace(HERE, rank=2, pid=102, place="section step 17 at data", index=1)
    stopped = replace(HERE, rank=3, pid=103, state="T")
    found = find_root_cause(ranks(r2=behind, r3=stopped), 4)
    assert found.startswith("rank 3 ")
    assert "rank 2" not in found
    assert found.endswith("state T (stopped)")


def test_ranks_in_one_place_are_distinguished_by_their_process_states():
    busy = replace(HERE, rank=1, pid=101, state="R")
    assert find_root_cause(ranks(r1=busy), 4) == (
        "all 4 ranks stalled in the same place, a collective or the network: in section step 17 at reduce for 30.2 s "
        "(limit 30 s); state R (running) of rank 1, S (sleeping) of ranks 0, 2, 3"
    )
    assert find_root_cause(ranks()[:2], 1024).startswith("2 of 1024 ranks stalled in the same place")


def test_one_watcher_of_a_launch_speaks(tmp_path):
    (tmp_path / "run").mkdir()
    records = [Records(tmp_path / "run" / "first_cause" / "local-0-ab", tmp_path / f"node{node}") for node in range(3)]
    assert [each.claim(f"cause {place}") for place, each in enumerate(records)] == [True, False, False]
    assert records[2].verdict()[0] == "cause 0"


def test_one_watcher_of_a_node_speaks_if_the_run_folder_is_gone(tmp_path):
    for node in range(2):
        (tmp_path / f"node{node}").mkdir()
    nodes = [Records(tmp_path / "gone" / "first_cause" / "x", tmp_path / f"node{node}") for node in (0, 0, 1)]
    assert [records.claim("cause") for records in nodes] == [True, False, True]
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rank": 1}', "null"])
def test_an_account_that_is_not_whole_is_passed_over(text, tmp_path):
    records = Records(tmp_path / "first_cause" / "x", tmp_path)
    records.write_account(HERE)
    (tmp_path / "first_cause" / "x" / "rank-00001.json").write_text(text)
    assert records.accounts() == [HERE]


def test_what_an_earlier_launch_left_is_cleared_and_nothing_else(tmp_path):
    folder = tmp_path / "first_cause" / "x"
    records = Records(folder, tmp_path)
    records.write_account(HERE)
    records.write_stacks(0, "stacks")
    records.claim("old")
    (folder / "notes.txt").touch()

    records.clear()

    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert records.claim("new")
