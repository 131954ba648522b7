from nernlit.analysis import pareto_figure


def test_the_figure_of_sizes_shows_the_front_and_says_what_is_not_shown() -> None:
    files = {"round": [(4_000, 0.9), (2_000, 0.1)], "table": [(1_000, 0.88), (3_000, 0.87)]}
    axis = pareto_figure(files, (16_000, 0.91), "digits").axes[0]
    original, size, front, rounded, table = axis.lines
    assert original.get_ydata() == [91, 91]
    assert size.get_xdata() == [16_000, 16_000]
    assert front.get_xydata().tolist() == [[1_000, 88], [4_000, 90]]
    assert rounded.get_xydata().tolist() == [[2_000, 10], [4_000, 90]]
    assert table.get_xydata().tolist() == [[1_000, 88], [3_000, 87]]
    assert axis.get_xscale() == "log"
    assert axis.get_ylim()[0] == 76
    assert axis.get_title() == "digits (1 of 4 files below 76%, not shown)"
