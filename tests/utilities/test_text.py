from nernlit.utilities.text import abbreviated


def test_long_lists_are_abbreviated() -> None:
    names = [str(number) for number in range(7)]
    assert abbreviated(names) == "0, 1, 2, 3, 4 and 2 more"
    assert abbreviated(names[:5]) == "0, 1, 2, 3, 4"
