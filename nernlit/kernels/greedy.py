"""The exact greedy nearest-neighbor walk in about O(M log M) memory accesses, instead of O(M^2).

The items are stored in a k-d tree whose nodes count the items that the walk has not visited yet. From the current item
the search goes up the tree. It enters a branch only if the branch's bounding box could contain an item more similar
than the best one so far, so the result equals that of a scan of all items.

Shapes: M items, D features. The tree is a complete binary tree of 2L nodes in an array: node n has the children 2n and
2n + 1, the root is 1, and the L leaves come last.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nernlit.utilities.compiled import compiled

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_LEAF = 64  # largest number of items in a leaf, which are all compared
_SCAN = 1024  # below this number of items, scanning all of them is faster than a tree
_TOLERANCE = 1e-12  # added to bounds, so that rounding errors do not prune an item that ties with the best


def greedy_walk(items_MD: Floats, penalty_M: Floats) -> Integers:
    """The greedy walk (M,) from item 0: after x comes the unvisited item y with the largest 2xy - penalty(y).

    Ties go to the lower item number. With unit vectors and zero penalties this selects the largest cosine; with |y|^2
    as the penalty, the smallest distance.

    >>> greedy_walk(np.array([[0.0], [3.0], [1.0]]), np.array([0.0, 9.0, 1.0])).tolist()
    [0, 2, 1]
    """
    levels = 0
    while len(items_MD) > _SCAN and len(items_MD) >> levels > _LEAF:
        levels += 1
    leaves = _split(items_MD, np.arange(len(items_MD)), levels)
    starts = np.cumsum([0, *map(len, leaves[:-1])])
    numbers_M = np.concatenate(leaves)
    points_MD = items_MD[numbers_M]
    reach_M = np.square(points_MD).sum(1) - penalty_M[numbers_M]
    low, high, reach = (
        _nodes(function, values, starts)
        for function, values in ((np.minimum, points_MD), (np.maximum, points_MD), (np.maximum, reach_M))
    )
    count = _nodes(np.add, np.ones(len(items_MD), np.int64), starts)
    walked: Integers = _compiled()(points_MD.T.copy(), penalty_M[numbers_M], numbers_M, starts, low, high, reach, count)
    return walked


def _split(items_MD: Floats, numbers: Integers, levels: int) -> list[Integers]:
    """The item numbers of each leaf: items are halved `levels` times, each time along the feature of largest range."""
    if levels == 0:
        return [numbers]
    values_MD = items_MD[numbers]
    widest = np.ptp(values_MD, axis=0).argmax()
    middle = len(numbers) // 2
    halves = np.argpartition(values_MD[:, widest], middle)
    left, right = numbers[halves[:middle]], numbers[halves[middle:]]
    return _split(items_MD, left, levels - 1) + _split(items_MD, right, levels - 1)


def _nodes(function: Any, values: NDArray[Any], starts: Integers) -> NDArray[Any]:
    """A reduction of every node's items; entry 0 is unused."""
    levels = [function.reduceat(values, starts, axis=0)]
    while len(levels[0]) > 1:
        levels.insert(0, function(levels[0][::2], levels[0][1::2]))
    return np.concatenate([levels[0][:1], *levels])


@functools.cache
def _compiled() -> Callable[..., Integers]:
    """The compiled walk."""
    one, nodes, zero = np.ones(1), np.ones(2), np.zeros(1, np.int64)
    boxes = nodes[:, None]
    example = one[None], one, zero.copy(), zero, boxes, boxes, nodes, nodes.astype(np.int64)
    return compiled(_walk, "the greedy order", *example)


def _walk(
    points_DM: Floats,
    penalty_M: Floats,
    numbers_M: Integers,
    starts: Integers,
    low: Floats,
    high: Floats,
    reach: Floats,
    count: Integers,
) -> Integers:
    features, items = points_DM.shape
    leaves = len(starts)
    place, leaf_of = np.empty(items, np.int64), np.empty(items, np.int64)
    for leaf in range(leaves):
        for i in range(starts[leaf], starts[leaf] + count[leaves + leaf]):
            place[numbers_M[i]] = i
            leaf_of[numbers_M[i]] = leaf
    walked, unused = np.empty(items, np.int64), np.ones(items, np.bool_)
    point, score = np.empty(features), np.empty(count.max())
    stack = np.empty(64, np.int64)
    current = lowest = 0
    zero_ties_all = not penalty_M.any()
    for step in range(items):
        walked[step] = current
        unused[current] = False
        i, own = place[current], leaves + leaf_of[current]
        point[:] = points_DM[:, i]
        power = (point * point).sum()
        # Remove the current item from its leaf: the leaf's last item takes its place.
        last = starts[own - leaves] + count[own] - 1
        points_DM[:, i], penalty_M[i], numbers_M[i] = points_DM[:, last], penalty_M[last], numbers_M[last]
        place[numbers_M[i]] = i
        node = own
        while node > 0:
            count[node] -= 1
            node >>= 1
        if step == items - 1:
            break
        if power == 0 and zero_ties_all:
            while not unused[lowest]:
                lowest += 1
            current = lowest
            continue
        best, current = -np.inf, -1
        node, stack[0], top = own, own, 1
        while True:
            while top > 0:
                top -= 1
                branch = stack[top]
                if count[branch] == 0:
                    continue
                # Upper bound of the score in the box: 2xy - penalty = |x|^2 + (|y|^2 - penalty) - |x - y|^2, and
                # |x - y| is at least the distance from x to the box. `spare` is the bound minus the best score so far.
                spare = power + reach[branch] - best + _TOLERANCE
                for d in range(features):
                    outside = max(low[branch, d] - point[d], point[d] - high[branch, d], 0.0)
                    spare -= outside * outside
                    if spare < 0:
                        break
                if spare < 0:
                    continue
                if branch < leaves:
                    stack[top], stack[top + 1] = 2 * branch, 2 * branch + 1
                    top += 2
                    continue
                first, length = starts[branch - leaves], count[branch]
                score[:length] = 0
                for d in range(features):
                    for i in range(length):
                        score[i] += point[d] * points_DM[d, first + i]
                for i in range(length):
                    value = 2 * score[i] - penalty_M[first + i]
                    if value > best or (value == best and numbers_M[first + i] < current):
                        best, current = value, numbers_M[first + i]
            if node == 1:
                break
            stack[0], top = node ^ 1, 1
            node >>= 1
    return walked
