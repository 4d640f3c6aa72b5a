import torch

from elastic3d.elastic.rows import put_rows, row_factor, rows_index, take_rows


def test_rows_are_taken_and_put_back():
    whole, device = torch.arange(12.0).view(4, 3), torch.device("cpu")
    for rows in ([1, 2], [0, 3], [2], [0, 1, 2, 3]):
        index = rows_index(rows, device)
        [part] = take_rows((whole,), rows)
        assert torch.equal(part, whole[rows]) and torch.equal(whole[index], part)
        found = put_rows(whole, index, -part)
        expected = [-row if i in rows else row for i, row in enumerate(whole)]
        assert torch.equal(found, torch.stack(expected)) and whole.min() == 0  # a new tensor


def test_consecutive_rows_are_a_view_and_equal_factors_a_number():
    whole = torch.randn(4, 3, 2)
    assert rows_index([1, 2], whole.device) == slice(1, 3)
    assert take_rows((whole,), range(4))[0] is whole
    assert row_factor([0.5, 0.5], whole) == 0.5
    assert torch.equal(row_factor([0.5, 2.0], whole[:2]), torch.tensor([0.5, 2.0])[:, None, None])
