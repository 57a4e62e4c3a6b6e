"""Places labels beside the points of a plot, so that they cover neither each other nor the points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

CHARACTER = 0.56  # mean width of a character in units of the font size, for common sans-serif fonts
POINT_RADIUS = 6.0  # pixels kept free about a point
DISTANCES = (10.0, 18.0, 28.0, 40.0, 54.0)  # pixels from point to label
DIRECTIONS = tuple(math.radians(angle) for angle in (0, 180, 270, 90, 315, 45, 225, 135, 340, 20, 200, 160))  # y down


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y down."""

    left: float
    top: float
    right: float
    bottom: float

    def shared(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class Label:
    """Where a label stands: its centre, and the end of its leader, which is None for a label right beside the point."""

    x: float
    y: float
    leader: tuple[float, float] | None


def place(
    points: list[tuple[float, float]], texts: list[str], obstacles: list[Box], frame: Box, font_size: float
) -> list[Label]:
    """A place for every text beside its point, all in pixels; greedy, the most crowded points first.

    Each label takes the candidate that covers the least of points, obstacles, labels and what is outside the frame;
    of equal ones the closest.
    """
    taken = [Box(x - POINT_RADIUS, y - POINT_RADIUS, x + POINT_RADIUS, y + POINT_RADIUS) for x, y in points]
    taken += obstacles
    crowd = [sum(math.dist(point, other) < 60 for other in points) for point in points]
    labels: dict[int, Label] = {}
    for i in sorted(range(len(points)), key=lambda i: (-crowd[i], points[i])):
        x, y = points[i]
        width, height = CHARACTER * font_size * len(texts[i]) + 4, font_size + 3
        best: tuple[float, Box, Label] | None = None
        for distance in DISTANCES:
            if best is not None and best[0] <= distance / 2:  # farther places cost more
                break
            for angle in DIRECTIONS:
                dx, dy = math.cos(angle), math.sin(angle)
                # The label's nearest edge is `distance` away; its centre half its size further.
                cx = x + dx * (distance + width / 2)
                cy = y + dy * (distance + height / 2)
                box = Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                outside = box.area() - box.shared(frame)
                cost = 20 * outside + sum(box.shared(other) for other in taken) + distance / 2
                if best is None or cost < best[0]:
                    near = (x + dx * (distance - 2), y + dy * (distance - 2)) if distance > DISTANCES[0] else None
                    best = cost, box, Label(cx, cy, near)
        assert best is not None
        taken.append(best[1])
        labels[i] = best[2]
    return [labels[i] for i in range(len(points))]


def spread(positions: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart, each moved as little as a sweep needs, within low..high if they fit."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    for before, i in pairwise(order):
        moved[i] = max(moved[i], moved[before] + gap)
    limit = high
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    limit = low
    for i in order:
        moved[i] = max(moved[i], limit)
        limit = moved[i] + gap
    return moved
