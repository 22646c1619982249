"""A loss curve that stays small however long the run: when it is full, neighbouring points become one."""

from __future__ import annotations

from dataclasses import dataclass

from ..events import Step

MOST_POINTS = 1000


@dataclass(frozen=True)
class Point:
    """The steps up to `step`: their mean loss, and the average and rates at the last of them."""

    step: int
    loss: float
    loss_ema: float
    rates: tuple[float, ...]
    count: int = 1

    def plain(self) -> list[object]:
        """[step, loss, loss_ema, [rates]] for JSON."""
        return [self.step, self.loss, self.loss_ema, list(self.rates)]


class Curve:
    """Points of a run in order. `revision` changes when points that were handed out are no longer valid."""

    def __init__(self, revision: int = 0) -> None:
        self.revision = revision
        self._points: list[Point] = []
        self._open: Point | None = None
        self._stride = 1

    def add(self, event: Step) -> None:
        """Take in one step."""
        new = Point(event.step, event.loss, event.loss_ema, tuple(event.rates))
        self._open = new if self._open is None else _join(self._open, new)
        if self._open.count < self._stride:
            return
        self._points.append(self._open)
        self._open = None
        if len(self._points) >= MOST_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [_join(first, second) for first, second in pairs]
            self._stride *= 2
            self.revision += 1

    def since(self, revision: int, start: int) -> dict[str, object]:
        """`revision`, `from` and `points`: those from index `from` on. A caller who holds another revision gets all and
        must forget what it has.
        """
        first = start if revision == self.revision and 0 <= start <= len(self._points) else 0
        return {"revision": self.revision, "from": first, "points": [point.plain() for point in self._points[first:]]}


def _join(first: Point, second: Point) -> Point:
    count = first.count + second.count
    mean = (first.loss * first.count + second.loss * second.count) / count
    return Point(second.step, mean, second.loss_ema, second.rates, count)
