"""Where workers fit: never two on one CPU or GPU, none split over nodes, and one line when there is no room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.placement import Node, count_room, place_workers
from schemas.errors import SpecError

NODES = st.lists(st.builds(Node, st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=4)


def fits(nodes: list[Node], workers: int, cpus: int, gpus: int) -> bool:
    """Put workers on nodes one by one, as Ray does."""
    for node in nodes:
        free_cpus, free_gpus = node.cpus, node.gpus
        while workers and free_cpus >= cpus and free_gpus >= gpus:
            workers, free_cpus, free_gpus = workers - 1, free_cpus - cpus, free_gpus - gpus
    return workers == 0


@given(nodes=NODES, workers=st.integers(0, 12), cpus=st.integers(0, 9), shards=st.integers(1, 20))
def test_workers_are_placed_exactly_when_they_fit(nodes: list[Node], workers: int, cpus: int, shards: int) -> None:
    each = 1 if any(node.gpus for node in nodes) else 0
    wanted = min(workers or sum(node.gpus for node in nodes) or sum(node.cpus > 0 for node in nodes) or 1, shards)
    try:
        placement = place_workers(nodes, workers=workers, cpus_per_worker=cpus, num_shards=shards, exclusive=True)
    except SpecError as refusal:
        assert not fits(nodes, wanted, cpus or 1, each)
        assert "\n" not in str(refusal) and "Ask for" in str(refusal)
        return
    assert placement.workers == wanted
    assert fits(nodes, placement.workers, placement.cpus_per_worker, each)
    if cpus:
        assert placement.cpus_per_worker == cpus
    else:
        assert not fits(nodes, wanted, placement.cpus_per_worker + 1, each), "as many CPUs as all can have"


@given(nodes=NODES, cpus=st.integers(1, 9), gpus=st.integers(0, 1))
def test_room_is_the_most_workers_that_fit(nodes: list[Node], cpus: int, gpus: int) -> None:
    room = count_room(nodes, cpus=cpus, gpus=gpus)
    assert fits(nodes, room, cpus, gpus) and not fits(nodes, room + 1, cpus, gpus)


def test_a_gpu_node_beside_a_head_without_gpus_keeps_its_own_cpus() -> None:
    nodes = [Node(cpus=16), Node(cpus=8, gpus=2), Node(cpus=8, gpus=2)]
    placement = place_workers(nodes, workers=0, cpus_per_worker=0, num_shards=100, exclusive=True)
    assert (placement.workers, placement.cpus_per_worker, placement.gpus) == (4, 4, 4)


@pytest.mark.parametrize(
    ("workers", "cpus", "said"),
    [
        (5, 0, "5 workers were asked for, but there are 4 GPUs. Ask for 4 or fewer."),
        (
            4,
            6,
            "4 workers of 1 GPU and 6 CPU each were asked for, but there is room for 2: 3 nodes with 32 CPU and 4 GPU "
            "in all, at most 16 CPU and 2 GPU on one. Ask for fewer workers or --cpus-per-worker.",
        ),
    ],
)
def test_a_refusal_says_what_was_asked_and_what_there_is(workers: int, cpus: int, said: str) -> None:
    nodes = [Node(cpus=16), Node(cpus=8, gpus=2), Node(cpus=8, gpus=2)]
    with pytest.raises(SpecError) as refusal:
        place_workers(nodes, workers=workers, cpus_per_worker=cpus, num_shards=100, exclusive=True)
    assert str(refusal.value) == said


def test_processes_of_one_host_may_share_its_cpus() -> None:
    placement = place_workers([Node(cpus=2)], workers=4, cpus_per_worker=0, num_shards=9, exclusive=False)
    assert (placement.workers, placement.cpus_per_worker) == (4, 1)
