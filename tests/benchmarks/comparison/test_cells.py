import pytest

from benchmarks.comparison.cells import Cell, parse_cell, parse_cells, protocols
from ulfine_fast.cache.io.errors import InputError


def test_a_protocol_cell_brings_its_counts():
    assert parse_cell("fashion_mnist:150:consistent") == Cell("fashion_mnist", 150, "consistent", 100, 1000, 100)
    assert parse_cell("fashion_mnist:50:uniform") == Cell("fashion_mnist", 50, "uniform", 50, 250, 100)
    assert parse_cell("cifar100:50:reversed") == Cell("cifar100", 50, "reversed", 10, 400, 10)


def test_gamma_u_of_the_command_line_wins():
    assert parse_cell("cifar10:500:reversed", 30.0).gamma_u == 30
    assert parse_cell("cifar10:500:reversed").gamma_u == 100


@pytest.mark.parametrize("shape", ["uniform", "middle"])
def test_m1_of_the_command_line_wins(shape):
    assert parse_cell(f"cifar100:50:{shape}", m1=200).m1 == 200


def test_the_config_has_the_cells_counts_and_the_options():
    config = parse_cell("fashion_mnist:50:head-tail", 150).config(method="linear_probe", seed=3, lr=0.1)
    assert (config.n1, config.m1, config.gamma_l, config.gamma_u) == (50, 1000, 50, 150)
    assert (config.shape, config.method, config.seed, config.lr) == ("head-tail", "linear_probe", 3, 0.1)
    assert config.labeled_fraction == 1


@pytest.mark.parametrize(("text", "fraction"), [("tux_paint::natural", 0.5), ("tux_paint:25%:natural", 0.25)])
def test_without_n1_the_data_is_taken_as_it_is(text, fraction):
    config = parse_cell(text).config()
    assert (config.n1, config.labeled_fraction, config.shape) == (None, fraction, "natural")


def test_a_folder_may_hold_colons_and_takes_any_n1():
    cell = parse_cell("folder=/a:b/c:7:middle")
    assert (cell.data, cell.n1, cell.m1, cell.gamma_l) == ("folder=/a:b/c", 7, None, 100)


@pytest.mark.parametrize("text", ["fashion_mnist:150:middle", "tux_paint:25%:natural", "folder=/a:b:7:middle"])
def test_a_name_is_read_back(text):
    assert parse_cell(text).name == text
    assert parse_cell(parse_cell(text).name) == parse_cell(text)


def test_superclasses_of_another_seed_have_the_same_protocol():
    assert protocols("fashion_mnist_merged=7") == protocols("fashion_mnist")


def test_stl10_keeps_its_own_unlabelled_images():
    assert parse_cell("stl10:150:natural").config().n1 == 150


def test_cells_are_separated_by_commas_and_each_counts_once():
    cells = parse_cells("digits:40:uniform, digits:10:uniform,digits:40:uniform,")
    assert [cell.n1 for cell in cells] == [40, 10]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fashion_mnist:150", "DATA:N1:SHAPE"),
        (":150:uniform", "DATA:N1:SHAPE"),
        ("fashion_mnist:150:round", "shape"),
        ("fashion_mnist:77:uniform", "150, 50"),
        ("folder=/a:0:uniform", "above 0"),
        ("folder=/a:many:uniform", "'many'"),
        ("tux_paint::uniform", "natural"),
        ("tux_paint:0%:natural", "between"),
        ("tux_paint:x%:natural", "percentage"),
    ],
)
def test_what_is_no_cell_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        parse_cell(text)


def test_no_cell_at_all_is_refused():
    with pytest.raises(InputError, match="at least one cell"):
        parse_cells(" ,")
