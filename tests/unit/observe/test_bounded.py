from kvstore.observe.bounded import OTHER, BoundedLabels


def test_values_keep_their_label_and_late_ones_share_one() -> None:
    labels = BoundedLabels(2)
    assert [labels.label(value) for value in ("a", "b", "c", "a", "d")] == [
        "a", "b", OTHER, "a", OTHER,
    ]  # fmt: skip


def test_a_flood_of_values_makes_few_series() -> None:
    labels = BoundedLabels()
    assert len({labels.label(str(number)) for number in range(10_000)}) == 65
