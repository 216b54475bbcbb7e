"""The drawn objects: each stands upright, and shows it when it is turned by a quarter.

An object is a list of layers, from back to front. Its colours are five tones that a scene fills in at random, so that
no class has a colour of its own. `vary` holds VARIATIONS numbers in [0, 1) that change its proportions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.drawing.shapes import Contour, arc, ellipse, polygon, rectangle, ring, stroke

VARIATIONS = 8
MAIN, SECOND, ACCENT, DARK, LIGHT = range(5)


@dataclass(frozen=True)
class Layer:
    """Contours painted in one tone; `edged` draws a dark edge around them."""

    contours: list[Contour]
    tone: int
    edged: bool = True


Vary = Sequence[float]


def house(vary: Vary) -> list[Layer]:
    """Gable roof, chimney, door and two windows."""
    eaves = -0.15 + 0.2 * vary[0]
    door = -0.5 + 0.25 * vary[1]
    chimney = 0.35 + 0.2 * vary[2]
    pane_top, pane_bottom = eaves + 0.2, eaves + 0.58
    return [
        Layer([rectangle(chimney, -0.85, chimney + 0.22, eaves - 0.05)], SECOND),
        Layer([rectangle(-0.78, eaves - 0.1, 0.78, 1.0)], MAIN),
        Layer([polygon((-1.0, eaves), (-0.0, -1.0), (1.0, eaves))], ACCENT),
        Layer([rectangle(door, eaves + 0.3, door + 0.36, 1.0)], DARK),
        Layer([ellipse(door + 0.28, 0.62, 0.045, 0.045)], LIGHT, edged=False),
        Layer([rectangle(0.12, pane_top, 0.58, pane_bottom)], LIGHT),
        Layer(
            [rectangle(0.32, pane_top, 0.38, pane_bottom), rectangle(0.12, pane_top + 0.16, 0.58, pane_top + 0.22)],
            DARK,
            edged=False,
        ),
    ]


def tree(vary: Vary) -> list[Layer]:
    """A round crown of leaves with fruit, on a trunk with roots."""
    spread = 0.9 + 0.2 * vary[0]
    trunk = 0.13 + 0.06 * vary[1]
    crown = [
        (-0.5, -0.15, 0.4),
        (0.5, -0.15, 0.4),
        (-0.32, -0.52, 0.4),
        (0.34, -0.5, 0.4),
        (0.0, -0.68, 0.34),
        (0, -0.1, 0.5),
    ]
    fruit = [(-0.5, -0.2), (0.45, -0.3), (-0.1, -0.6), (0.05, -0.05), (-0.2, -0.3 - 0.1 * vary[2])]
    return [
        Layer(
            [
                polygon(
                    (-trunk, 0.1), (trunk, 0.1), (trunk + 0.03, 0.8), (0.36, 1.0), (-0.36, 1.0), (-trunk - 0.03, 0.8)
                )
            ],
            SECOND,
        ),
        Layer([ellipse(x * spread, y, radius, radius) for x, y, radius in crown], MAIN),
        Layer([ellipse(x * spread, y, 0.1, 0.1) for x, y in fruit], ACCENT),
    ]


def mug(vary: Vary) -> list[Layer]:
    """A mug with a handle, a band and steam."""
    taper = 0.04 + 0.14 * vary[0]
    band = 0.15 + 0.2 * vary[1]
    side = [(0.5, -0.4), (0.5 - taper, 0.8)]
    foot = arc(0.0, 0.8, 0.5 - taper, 0.16, 0, 16)
    return [
        Layer(stroke([(-0.25, -0.62), (-0.17, -0.73), (-0.25, -0.84), (-0.17, -0.95)], 0.08), LIGHT, edged=False),
        Layer(stroke([(0.1, -0.62), (0.18, -0.73), (0.1, -0.84), (0.18, -0.95)], 0.08), LIGHT, edged=False),
        Layer(ring(0.55, 0.18, 0.38, 0.4, 0.16), MAIN),
        Layer([polygon(*side, *foot, (-0.5, -0.4))], MAIN),
        Layer(
            [polygon((-0.48, band), (0.48, band), (0.46 - taper / 2, band + 0.24), (taper / 2 - 0.46, band + 0.24))],
            ACCENT,
            edged=False,
        ),
        Layer([ellipse(0.0, -0.4, 0.5, 0.15)], SECOND),
        Layer([ellipse(0.0, -0.38, 0.38, 0.09)], DARK, edged=False),
    ]


def car(vary: Vary) -> list[Layer]:
    """A saloon from the side, with wheels, windows and lamps."""
    roof = -0.55 - 0.12 * vary[0]
    front = 0.3 + 0.15 * vary[1]
    wheel = 0.23 + 0.05 * vary[2]
    body = [(-1.0, 0.3), (-1.0, 0.0), (-0.88, -0.1), (0.75, -0.08), (0.97, 0.06), (1.0, 0.3)]
    return [
        Layer([polygon((-0.75, -0.06), (-0.5, roof), (front - 0.08, roof), (front + 0.25, -0.06))], SECOND),
        Layer([polygon((-0.58, -0.1), (-0.41, roof + 0.12), (-0.12, roof + 0.12), (-0.12, -0.1))], LIGHT, edged=False),
        Layer(
            [polygon((0.0, -0.1), (0.0, roof + 0.12), (front - 0.12, roof + 0.12), (front + 0.1, -0.1))],
            LIGHT,
            edged=False,
        ),
        Layer([polygon(*body)], MAIN),
        Layer([rectangle(-0.2, 0.04, -0.02, 0.09)], DARK, edged=False),
        Layer([ellipse(0.9, 0.08, 0.08, 0.07)], ACCENT, edged=False),
        Layer([ellipse(x, 0.3, wheel, wheel) for x in (-0.55, 0.55)], DARK),
        Layer([ellipse(x, 0.3, wheel / 2, wheel / 2) for x in (-0.55, 0.55)], LIGHT, edged=False),
    ]


def sailboat(vary: Vary) -> list[Layer]:
    """A hull with a mast, two sails and a pennant."""
    lean = 0.1 * vary[0]
    boom = 0.7 + 0.15 * vary[1]
    return [
        Layer([polygon((0.0, -1.0), (0.34, -0.92), (0.0, -0.83))], ACCENT),
        Layer([rectangle(-0.04, -1.0, 0.05, 0.5)], DARK),
        Layer([polygon((0.1, -0.78), (boom, 0.36), (0.1, 0.36))], LIGHT),
        Layer([polygon((0.1, 0.1), (boom - 0.15, 0.1), (boom - 0.01, 0.36), (0.1, 0.36))], SECOND, edged=False),
        Layer([polygon((-0.1, -0.68 - lean), (-0.1, 0.36), (-0.66, 0.36))], ACCENT),
        Layer([polygon((-0.95, 0.46), (0.98, 0.46), *arc(0.05, 0.46, 0.72, 0.52, 3, 13))], MAIN),
        Layer([polygon((-0.88, 0.53), (0.92, 0.53), (0.88, 0.63), (-0.83, 0.63))], SECOND, edged=False),
    ]


def lamp(vary: Vary) -> list[Layer]:
    """A table lamp: shade, stand, foot and a pull cord."""
    top = 0.28 + 0.16 * vary[0]
    shade = -0.05 + 0.2 * vary[1]
    stand = 0.07 + 0.05 * vary[2]
    middle = (shade - 1.0) / 2
    return [
        Layer([polygon(*arc(0.0, 1.0, 0.55, 0.28, 16, 32))], SECOND),
        Layer([rectangle(-stand, shade - 0.05, stand, 0.8)], DARK),
        Layer([ellipse(0.0, 0.45, 0.2, 0.17)], ACCENT),
        Layer(
            [*stroke([(0.4, shade), (0.4, shade + 0.3)], 0.05), ellipse(0.4, shade + 0.32, 0.07, 0.07)],
            DARK,
            edged=False,
        ),
        Layer([ellipse(0.0, shade, 0.3, 0.16)], LIGHT),
        Layer([polygon((-top, -1.0), (top, -1.0), (0.78, shade), (-0.78, shade))], MAIN),
        Layer(
            [polygon((-0.76, shade - 0.06), (-0.7, shade - 0.2), (0.7, shade - 0.2), (0.76, shade - 0.06))],
            ACCENT,
            edged=False,
        ),
        Layer([polygon((-0.12, -0.94), (0.12, -0.94), (0.2, middle + 0.2), (-0.2, middle + 0.2))], LIGHT, edged=False),
    ]


def mushroom(vary: Vary) -> list[Layer]:
    """A spotted cap with gills on a thick stem."""
    brim = -0.2 + 0.15 * vary[0]
    stem = 0.2 + 0.1 * vary[1]
    skirt = brim + 0.12
    spots = [(-0.52, -0.22, 0.13), (0.05, -0.5, 0.16), (0.52, -0.16, 0.13), (-0.12, -0.12, 0.1), (-0.38, -0.5, 0.08)]
    foot = arc(0.0, 0.82, stem + 0.16, 0.18, 0, 16)
    return [
        Layer([polygon((-stem, brim), (stem, brim), (stem + 0.03, 0.6), *foot, (-stem - 0.03, 0.6))], LIGHT),
        Layer(
            [polygon((-stem, skirt), (stem, skirt), (stem + 0.18, skirt + 0.24), (-stem - 0.18, skirt + 0.24))], SECOND
        ),
        Layer([ellipse(0.0, brim, 0.92, 0.15)], SECOND),
        Layer([polygon(*arc(0.0, brim, 1.0, 0.8, 16, 32), *arc(0.0, brim, 1.0, 0.08, 0, 16))], MAIN),
        Layer([ellipse(x, y + brim, radius, radius * 0.9) for x, y, radius in spots], ACCENT),
    ]


def umbrella(vary: Vary) -> list[Layer]:
    """An open umbrella: panels with a scalloped hem, a shaft and a crook."""
    height = 0.75 + 0.15 * vary[0]
    crook = 0.16 + 0.06 * vary[1]
    hem = [point for middle in (0.8, 0.4, 0.0, -0.4, -0.8) for point in arc(middle, 0.0, 0.2, 0.12, 32, 16)]
    panel = [
        (0.0, -height),
        (-0.51, -0.72 * height),
        *arc(-0.4, 0.0, 0.2, 0.12, 16, 32),
        (-0.15, -0.6 * height),
    ]
    return [
        Layer(stroke([(0.0, -height - 0.1), (0.0, 0.82)], 0.09), DARK),
        Layer(stroke(arc(-crook, 0.82, crook, 0.17, 0, 16), 0.13), ACCENT),
        Layer([polygon(*arc(0.0, 0.0, 1.0, height, 16, 32), *hem)], MAIN),
        Layer([polygon(*panel), polygon(*((-x, y) for x, y in panel))], SECOND, edged=False),
    ]


def chair(vary: Vary) -> list[Layer]:
    """A chair with a slatted back, seen from the front."""
    seat = 0.08 + 0.12 * vary[0]
    top = -1.0 + 0.15 * vary[1]
    slats = [rectangle(x - 0.06, top + 0.1, x + 0.06, seat) for x in (-0.2, 0.0, 0.2)]
    posts = [rectangle(-0.5, top, -0.36, seat), rectangle(0.36, top, 0.5, seat), rectangle(-0.5, top, 0.5, top + 0.2)]
    return [
        Layer([rectangle(-0.46, seat, -0.34, 0.8), rectangle(0.34, seat, 0.46, 0.8)], DARK),
        Layer(slats, ACCENT),
        Layer(posts, MAIN),
        Layer([rectangle(-0.66, seat + 0.25, -0.5, 1.0), rectangle(0.5, seat + 0.25, 0.66, 1.0)], MAIN),
        Layer([polygon((-0.5, seat), (0.5, seat), (0.7, seat + 0.22), (-0.7, seat + 0.22))], SECOND),
        Layer([rectangle(-0.7, seat + 0.22, 0.7, seat + 0.32)], MAIN),
    ]


def bird(vary: Vary) -> list[Layer]:
    """A standing bird with beak, wing, tail and legs."""
    head = 0.5 + 0.1 * vary[0]
    tail = 0.1 + 0.2 * vary[1]
    feet = [(-0.16, 0.5), (0.12, 0.5)]
    legs = [part for x, y in feet for part in stroke([(x, y), (x, 0.95), (x + 0.2, 0.97)], 0.07)]
    wing = [(-0.55, -0.02), *arc(0.02, 0.02, 0.34, 0.26, 28, 40)]
    return [
        Layer(legs, DARK, edged=False),
        Layer([polygon((-0.4, -0.1), (-1.0, -0.25 - tail), (-0.92, 0.1 - tail), (-0.4, 0.3))], SECOND),
        Layer([polygon((head + 0.22, -0.66), (head + 0.52, -0.5), (head + 0.2, -0.42))], ACCENT),
        Layer(
            [
                polygon((-0.6, 0.0), *arc(0.0, 0.15, 0.6, 0.46, 16, 0)),
                ellipse(head - 0.02, -0.56, 0.3, 0.3),
                polygon((-0.35, -0.15), (head - 0.26, -0.7), (head + 0.2, -0.4), (0.59, 0.2)),
            ],
            MAIN,
        ),
        Layer([polygon(*wing)], SECOND),
        Layer([ellipse(head + 0.06, -0.62, 0.09, 0.09)], LIGHT, edged=False),
        Layer([ellipse(head + 0.08, -0.62, 0.05, 0.05)], DARK, edged=False),
    ]


def fish(vary: Vary) -> list[Layer]:
    """A fish from the side: fins, tail, gill, stripes and an eye."""
    deep = 0.42 + 0.12 * vary[0]
    fin = 0.2 + 0.15 * vary[1]
    return [
        Layer([polygon((-0.35, -0.15), (-0.95, -0.48), (-0.78, 0.0), (-0.95, 0.48), (-0.35, 0.15))], SECOND),
        Layer(
            [polygon((-0.4, -deep * 0.6), (-0.25, -deep - fin), (0.1, -deep - fin * 0.7), (0.35, -deep * 0.7))], ACCENT
        ),
        Layer([polygon((0.0, deep * 0.7), (-0.18, deep + 0.2), (0.2, deep * 0.8))], ACCENT),
        Layer([ellipse(0.2, 0.0, 0.72, deep)], MAIN),
        Layer(
            [
                polygon(
                    (x - 0.08, -deep * 0.75), (x + 0.06, -deep * 0.8), (x + 0.06, deep * 0.8), (x - 0.08, deep * 0.75)
                )
                for x in (-0.1, 0.16)
            ],
            SECOND,
            edged=False,
        ),
        Layer([polygon((0.0, 0.02), (-0.22, 0.22), (0.05, 0.2))], ACCENT),
        Layer([ellipse(0.62, -0.1, 0.13, 0.13)], LIGHT),
        Layer([ellipse(0.64, -0.1, 0.07, 0.07)], DARK, edged=False),
        Layer(stroke([(0.72, 0.16), (0.86, 0.12)], 0.05), DARK, edged=False),
    ]


def rocket(vary: Vary) -> list[Layer]:
    """A rocket with nose, porthole, fins and flame."""
    wide = 0.26 + 0.08 * vary[0]
    flame = 0.15 * vary[1]
    return [
        Layer(
            [
                polygon(
                    (-0.2, 0.6), (-0.26, 0.8), (-0.1, 0.78), (0.0, 0.85 + flame), (0.1, 0.78), (0.26, 0.8), (0.2, 0.6)
                )
            ],
            LIGHT,
        ),
        Layer(
            [
                polygon((-wide + 0.04, 0.1), (-0.68, 0.55), (-0.62, 0.8), (-wide + 0.04, 0.56)),
                polygon((wide - 0.04, 0.1), (0.68, 0.55), (0.62, 0.8), (wide - 0.04, 0.56)),
            ],
            ACCENT,
        ),
        Layer(
            [
                polygon(
                    (-wide, -0.4), (wide, -0.4), (wide, 0.45), (wide - 0.08, 0.65), (-wide + 0.08, 0.65), (-wide, 0.45)
                )
            ],
            MAIN,
        ),
        Layer([polygon((-wide, -0.4), (-wide * 0.7, -0.72), (0.0, -1.0), (wide * 0.7, -0.72), (wide, -0.4))], SECOND),
        Layer([ellipse(0.0, -0.1, 0.17, 0.17)], LIGHT),
        Layer([ellipse(0.0, -0.1, 0.09, 0.09)], DARK, edged=False),
        Layer([rectangle(-wide, 0.3, wide, 0.4)], SECOND, edged=False),
    ]


OBJECTS: dict[str, Callable[[Vary], list[Layer]]] = {
    draw.__name__: draw
    for draw in (house, tree, mug, car, sailboat, lamp, mushroom, umbrella, chair, bird, fish, rocket)
}
