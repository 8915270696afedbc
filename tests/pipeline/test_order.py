"""The order of samples: frozen, evenly spread, and a function of its arguments alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.order import (
    ORDER_VERSION,
    drop_hashes,
    hashes,
    latin_views,
    plan_windows,
    row_order,
    splitmix64,
    stream_key,
    unit_costs,
    unit_order,
)


def test_splitmix64_is_that_of_its_authors():
    # The reference seeds its state with 1234567 and adds the golden ratio before each output.
    states = np.array([1234567 + step * 0x9E3779B97F4A7C15 & (1 << 64) - 1 for step in range(3)], np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_order_never_changes():
    """Golden vectors: whoever changes them changes the order of every training run, and raises ORDER_VERSION."""
    assert ORDER_VERSION == 1
    assert unit_order(0, 0, 10).tolist() == GOLDEN_UNITS
    assert unit_order(7, 3, 10).tolist() == GOLDEN_UNITS_OF_SEED_7_EPOCH_3
    assert row_order(0, 0, np.arange(100, 112)).tolist() == GOLDEN_ROWS
    assert latin_views(5, np.arange(8), 4).tolist() == GOLDEN_VIEWS
    assert drop_hashes(0, np.arange(2)).tolist() == GOLDEN_DROPS


GOLDEN_UNITS = [1, 9, 7, 0, 8, 6, 4, 2, 5, 3]
GOLDEN_UNITS_OF_SEED_7_EPOCH_3 = [7, 8, 0, 6, 5, 2, 4, 3, 1, 9]
GOLDEN_ROWS = [9, 4, 11, 10, 6, 7, 3, 8, 2, 5, 1, 0]
GOLDEN_VIEWS = [0, 2, 0, 0, 1, 1, 2, 0]
GOLDEN_DROPS = [2216361556033812026, 10407477083536520858]


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**40), st.integers(1, 300))
def test_an_order_is_a_permutation(seed, epoch, count):
    assert sorted(unit_order(seed, epoch, count).tolist()) == list(range(count))
    assert sorted(row_order(seed, epoch, np.arange(count) * 977).tolist()) == list(range(count))


def test_seeds_epochs_and_purposes_give_orders_that_have_nothing_in_common():
    orders = [unit_order(seed, epoch, 2000) for seed in (0, 1) for epoch in (0, 1)]
    orders.append(row_order(0, 0, np.arange(2000)))
    for first in range(len(orders)):
        for second in range(first):
            assert (orders[first] == orders[second]).sum() < 12
            assert abs(np.corrcoef(orders[first], orders[second])[0, 1]) < 0.1


def test_hashes_are_even():
    counts = np.bincount((hashes(stream_key(1, 2), np.arange(64_000)) >> np.uint64(58)).astype(np.int64), minlength=64)
    assert ((counts - 1000) ** 2 / 1000).sum() < 110  # chi-square of 63 degrees of freedom, p < 0.0003


@given(st.integers(1, 9), st.integers(0, 50))
def test_each_view_comes_once_in_as_many_epochs(num_views, first_epoch):
    clips = np.arange(40)
    shown = np.stack([latin_views(first_epoch + epoch, clips, num_views) for epoch in range(num_views)])
    assert (np.sort(shown, axis=0) == np.arange(num_views)[:, np.newaxis]).all()


def test_views_are_spread_over_the_clips_of_one_epoch():
    counts = np.bincount(latin_views(0, np.arange(8000), 8), minlength=8)
    assert counts.min() > 900


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=60),
    st.integers(1, 100),
    st.integers(1, 5000),
)
def test_windows_cover_every_sample_once_and_keep_their_bounds(units, max_rows, max_bytes):
    rows = np.array([rows for rows, _ in units], np.int64)
    samples = np.minimum(rows, [samples for _, samples in units])
    num_bytes = rows * 30
    costs = unit_costs(rows, np.full(len(rows), 30), max_rows, max_bytes)
    plan = plan_windows(np.arange(len(units))[::-1], samples, costs)
    assert plan.units.tolist() == [unit for unit in range(len(units))[::-1] if samples[unit]]
    assert plan.first_sample[-1] == samples.sum()
    for number in range(plan.num_windows):
        inside = plan.units[plan.first_unit[number] : plan.first_unit[number + 1]]
        assert len(inside) and plan.first_sample[number + 1] - plan.first_sample[number] == samples[inside].sum()
        # Without its last unit a window is within its bounds.
        assert rows[inside[:-1]].sum() <= max_rows and num_bytes[inside[:-1]].sum() <= max_bytes
    for place in range(int(samples.sum())):
        number = plan.window_at(place)
        assert plan.first_sample[number] <= place < plan.first_sample[number + 1]
